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


_CLOSE, _AS_CLOSE = 0.5, 0.03  # likeness, from 0 to 1, and a difference in it
_SHOWN = 5


def near_miss(given: str, allowed: Iterable[str]) -> str:
    """Return ", did you mean 'x'?" for the closest of the allowed names; "" if none is close, or it is one of them.

    A key such as trainer.epochs is as close as its last part.
    """
    ratios = dict.fromkeys(allowed, 0.0)
    for name in ratios:
        parts = {name, name.rpartition(".")[2]}
        ratios[name] = max(difflib.SequenceMatcher(None, part, given).ratio() for part in parts)
    best = max(ratios.values(), default=0.0)
    close = [repr(name) for name, ratio in ratios.items() if ratio > best - _AS_CLOSE]
    return f", did you mean {' or '.join(close[:3])}?" if best >= _CLOSE and given not in ratios else ""


def some(names: Sequence[str]) -> str:
    """Return the first few names for a message, and the number of the others."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def check_choice(name: str, value: object, allowed: Collection[str], argument: str | None = None) -> None:
    """Raise ConfigError if a value is none of those allowed; argument: the argument at fault, if not called `name`."""
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
        argument, message = error.argument or "", str(error)
        name = names.format(argument) if isinstance(names, str) else names.get(argument, "")
        if not argument or not name or name in message:
            raise
        rest = message.removeprefix(f"{argument} ")
        raise type(error)(f"{name}{': ' if rest == message else ' '}{rest}", argument) from error
