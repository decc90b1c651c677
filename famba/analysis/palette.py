"""How strategies look in every plot, told apart by colour-blind readers and in grey too.

Colours are those of Okabe and Ito (2008), and a few more where they do not suffice. Markers all differ, and of two
lines of a similar style one is dark, the other pale.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

Line = str | tuple[float, tuple[float, ...]]


class Look(NamedTuple):
    """Colour, marker, the marker's filling, and line style, as matplotlib takes them."""

    color: str
    marker: str
    face: str
    line: Line


def _look(color: str, marker: str, line: Line) -> Look:
    return Look(color, marker, color, line)


_DASHED: Line = (0, (3.5, 1.8))
_LONG: Line = (0, (9, 2.5))
_LOOKS = {
    "none": _look("#000000", "o", "-"),
    "all": _look("#E69F00", "s", _DASHED),
    "interleaved": _look("#009E73", "D", "-."),
    "lower": _look("#56B4E9", "v", ":"),
    "upper": _look("#0072B2", "^", _LONG),
    "decreasing": _look("#8C6D00", "*", _DASHED),
    "adaptive": _look("#CC79A7", "P", "-"),
    "custom": _look("#D55E00", "X", (0, (5, 1.5, 1, 1.5, 1, 1.5))),
}
_OTHERS = (_look("#7F7F7F", "h", "-"), _look("#7A3FB0", "p", ":"), _look("#882255", ">", _LONG))
_FACES = ("white", "#BDBDBD")
_LINES: tuple[Line, ...] = ("-", _DASHED, ":", "-.")


def looks(strategies: Sequence[str]) -> list[Look]:
    """Return how each of several curves or points looks, by the names of their strategies.

    A strategy has one colour and marker everywhere. The second of a strategy and those after it have other lines and
    fillings. Strategies that are not the project's own take three more looks in turn.
    """
    own = [name for name in dict.fromkeys(strategies) if name not in _LOOKS]
    turns: Counter[str] = Counter()
    found = []
    for name in strategies:
        first = _LOOKS.get(name) or _OTHERS[own.index(name) % len(_OTHERS)]
        lines = [first.line, *(line for line in _LINES if line != first.line)]
        turn = turns[name]
        turns[name] += 1
        face = _FACES[(turn - 1) % len(_FACES)] if turn else first.color
        found.append(first._replace(line=lines[turn % len(lines)], face=face))
    return found
