"""Marks that say which patches of a picture are of one token, where they do not touch."""

from __future__ import annotations

from collections.abc import Iterator
from string import ascii_lowercase, ascii_uppercase
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke

from famba.analysis.pictures.regions import Grid, scattered

# Of a patch's side: of its area for a mark, of its height for a letter.
_AREA, _HEIGHT = 0.14, 0.72


class Tag(NamedTuple):
    """A mark with its colour (of Okabe and Ito) and its edge, or a letter, white on black."""

    sign: str
    color: str = "white"
    edge: str = "black"
    is_letter: bool = False


_MARKS = (
    Tag("o", "#E69F00"),
    Tag("s", "#56B4E9"),
    Tag("^", "#009E73", "white"),
    Tag("D", "#F0E442"),
    Tag("v", "#CC79A7"),
    Tag("P", "#0072B2", "white"),
    Tag("X", "#D55E00", "white"),
    Tag("h", "#FFFFFF"),
)
_LETTERS = ascii_lowercase + ascii_uppercase


def tagged(held: Grid) -> list[tuple[Tag, list[tuple[int, int]]]]:
    """Give each token whose patches do not all touch a tag of its own: a mark the largest, a letter the others.

    Returns:
        For each such token its tag, and a patch (row, column) in each of its parts.
    """
    return list(zip(_tags(), scattered(held), strict=False))


def draw_tags(axes: Axes, held: Grid, pixels: int, points: float) -> None:
    """Draw the tag of each token in each of its parts, on patches of so many pixels, and on paper of so many points."""
    for tag, places in tagged(held):
        rows, columns = np.array(places).T
        # Pixels of imshow have their centres at whole numbers.
        x, y = pixels * (columns + 0.5) - 0.5, pixels * (rows + 0.5) - 0.5
        if not tag.is_letter:
            axes.scatter(x, y, s=_AREA * points**2, c=tag.color, marker=tag.sign, edgecolors=tag.edge, linewidths=0.5,
                         zorder=3)  # fmt: skip
            continue
        casing = [withStroke(linewidth=1.4, foreground=tag.edge)]
        for place in zip(x, y, strict=True):
            axes.text(*place, tag.sign, size=_HEIGHT * points, color=tag.color, ha="center", va="center_baseline",
                      path_effects=casing, zorder=3)  # fmt: skip


def _tags() -> Iterator[Tag]:
    """Marks, then letters, then numbers."""
    yield from _MARKS
    yield from (Tag(letter, is_letter=True) for letter in _LETTERS)
    number = 0
    while True:
        number += 1
        yield Tag(str(number), is_letter=True)
