"""Errors that a user can mend.

Every message says what was given, what is allowed and what to do. The command line prints the message
without a traceback and ends with status 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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


def near_miss(given: str, allowed: Iterable[str]) -> str:
    """Return ", did you mean 'x'?" for the closest allowed name, or the two that are as close, or an empty string."""
    close = difflib.get_close_matches(given, list(allowed), n=2, cutoff=0.5)
    ratios = [difflib.SequenceMatcher(None, name, given).ratio() for name in close]
    as_close = [repr(name) for name, ratio in zip(close, ratios, strict=True) if ratio > ratios[0] - _AS_CLOSE]
    return f", did you mean {' or '.join(as_close)}?" if close else ""
