"""What the log of a run that ended says of its end."""

from __future__ import annotations

import re
from pathlib import Path

_READ = 1 << 16
_SHOWN = 20
_TRACEBACK = "Traceback (most recent call last):"
_EXCEPTION = re.compile(r"^[A-Za-z_][\w.]*(: |$)")

_OURS = re.compile(r"^famba\.[\w.]+: ")  # the message says it all


def last_error(path: Path, begin: int = 0) -> str:
    """Return the error with which a log ends, else its last line; "" for an empty one. It is read from byte `begin`."""
    lines = [line for line in _tail(path, begin) if line.strip()]
    for index in range(len(lines) - 1, -1, -1):
        if lines[index].startswith("error: "):
            return "\n".join([lines[index].removeprefix("error: "), *lines[index + 1 : index + _SHOWN]])
        if lines[index].startswith(_TRACEBACK):
            return exception_of("\n".join(lines[index:]))
    own = [line for line in lines if not line.startswith("$ ")]
    return own[-1] if own else ""


def exception_of(text: str) -> str:
    """Return the exception's own lines of a traceback."""
    lines = text.rsplit(_TRACEBACK, 1)[-1].strip().splitlines()
    for index, line in enumerate(lines):
        if _EXCEPTION.match(line):
            return "\n".join([_OURS.sub("", line), *lines[index + 1 : index + _SHOWN]])
    return lines[-1] if lines else ""


def _tail(path: Path, begin: int) -> list[str]:
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(begin, size - _READ))
            return file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
