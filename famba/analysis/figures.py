"""Draw figures in one style, whatever the user's matplotlib is set to; equal figures are equal bytes.

A strategy looks the same in every plot, and colour-blind readers tell strategies apart, in grey too: colours are those
of Okabe and Ito (2008) and a few more, markers all differ, and of two lines of a similar style one is dark.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import matplotlib as mpl
from matplotlib.figure import Figure

INK, FAINT = "#222222", "#777777"
_STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#555555",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "famba",
    "text.parse_math": False,
}
_METADATA = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None, "Format": None, "Type": None}}
Line = str | tuple[float, tuple[float, ...]]


@contextmanager
def drawing() -> Iterator[None]:
    """Use the project's style inside the block; `files` belongs inside too."""
    with mpl.rc_context():
        mpl.rcdefaults()
        cast(Any, mpl.rcParams).update(_STYLE)  # some releases' stubs know each name, others none
        yield


def files(stem: str, figure: Figure, kinds: Sequence[str] = ("svg", "png")) -> dict[str, bytes]:
    """Return a figure as the content of files by their names."""
    found = {}
    for kind in kinds:
        content = io.BytesIO()
        figure.savefig(content, format=kind, dpi=200, metadata=_METADATA[kind])
        found[f"{stem}.{kind}"] = content.getvalue()
    return found


class Look(NamedTuple):
    """Hold colour, marker, the marker's filling, and line style, as matplotlib takes them."""

    color: str
    marker: str
    face: str
    line: Line

    def marked(self, size: float) -> dict[str, Any]:
        """Return the marker as arguments of `Axes.plot`, its size in points."""
        size *= 1.4 if self.marker == "*" else 1.0
        return {"color": self.color, "marker": self.marker, "markersize": size, "markerfacecolor": self.face}


_DASHED: Line = (0, (3.5, 1.8))
_LONG: Line = (0, (9, 2.5))
_LOOKS: dict[str, tuple[str, str, Line]] = {
    "none": ("#000000", "o", "-"),
    "all": ("#E69F00", "s", _DASHED),
    "interleaved": ("#009E73", "D", "-."),
    "lower": ("#56B4E9", "v", ":"),
    "upper": ("#0072B2", "^", _LONG),
    "decreasing": ("#8C6D00", "*", _DASHED),
    "adaptive": ("#CC79A7", "P", "-"),
    "custom": ("#D55E00", "X", (0, (5, 1.5, 1, 1.5, 1, 1.5))),
}
_OTHER: tuple[str, str, Line] = ("#7A3FB0", "p", ":")  # strategies of other packages
_FACES = ("white", "#BDBDBD")
_LINES: tuple[Line, ...] = ("-", _DASHED, ":", "-.")


def looks(strategies: Sequence[str]) -> list[Look]:
    """Return how each of several curves or points looks, by the names of their strategies.

    A strategy has one colour and marker everywhere; its second curve and those after it have other lines and fillings.
    """
    found: list[Look] = []
    for place, name in enumerate(strategies):
        color, marker, first = _LOOKS.get(name, _OTHER)
        turn = strategies[:place].count(name)
        lines = [first, *(line for line in _LINES if line != first)]
        found.append(Look(color, marker, _FACES[(turn - 1) % 2] if turn else color, lines[turn % len(lines)]))
    return found
