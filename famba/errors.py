"""Errors that a user can mend.

Every message says what was given, what is allowed and what to do. The command line prints the message
without a traceback and ends with status 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager


class FambaError(Exception):
    """Base of all errors that come from input, files or the machine rather than from a defect.

    argument: the name of the argument at fault where there is one, so that a caller can put its own name for it.
    """

    def __init__(self, message: str = "", argument: str | None = None) -> None:
        super().__init__(message)
        self.argument = argument


class ConfigError(FambaError, ValueError):
    """A value or a combination of values that cannot work."""


class DataError(FambaError):
    """Data that is missing, unreadable or of another kind than asked for."""


class CheckpointError(FambaError):
    """A checkpoint that is missing, damaged, foreign or of another model."""


class DamagedError(CheckpointError):
    """A checkpoint that is not what was written: cut off, or changed since."""


class BackendError(FambaError, RuntimeError):
    """A backend that is unknown or cannot be used here."""


class TrainingError(FambaError, RuntimeError):
    """A run that cannot go on: a loss that is not finite, or too little memory."""


_AS_CLOSE = 0.03
_SHOWN = 5


def near_miss(given: str, allowed: Iterable[str]) -> str:
    """Return ", did you mean 'x'?" for the closest allowed name, or the two that are as close, or an empty string."""
    close = difflib.get_close_matches(given, list(allowed), n=2, cutoff=0.5)
    ratios = [difflib.SequenceMatcher(None, name, given).ratio() for name in close]
    as_close = [repr(name) for name, ratio in zip(close, ratios, strict=True) if ratio > ratios[0] - _AS_CLOSE]
    return f", did you mean {' or '.join(as_close)}?" if close else ""


def some(names: Sequence[str]) -> str:
    """Return the first few names for a message, and the number of the others."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def check_choice(name: str, value: object, allowed: Collection[str], argument: str | None = None) -> None:
    """Raise ConfigError where a named choice is none of those allowed; argument: where it is not called by its name."""
    if value not in allowed:
        close = near_miss(str(value), allowed)
        raise ConfigError(f"unknown {name} {value!r}{close}; allowed: {', '.join(allowed)}", argument or name)


@contextmanager
def named(names: str | Mapping[str, str]) -> Iterator[None]:
    """Let errors inside the block call the argument at fault as the caller knows it.

    names: a pattern such as "fusion.{}" or "--{}", or a map from arguments to names; an argument that it lacks stays.
    """
    try:
        yield
    except FambaError as error:
        argument = error.argument or ""
        name = names.format(argument) if isinstance(names, str) else names.get(argument)
        if not argument or name is None or name in str(error):
            raise
        message = str(error)
        start = f"{argument} "
        told = f"{name} {message[len(start) :]}" if message.startswith(start) else f"{name}: {message}"
        raise type(error)(told, argument) from error
