"""Pictures of which patches each token holds, layer by layer, drawn on the image."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from famba.analysis.figures import FAINT, INK
from famba.analysis.pictures.regions import Grid, borders, mean_colours
from famba.analysis.pictures.tags import draw_tags

_KEY = (
    "Outlined: patches that share a token, in their mean colour. Equal marks or letters in a panel: parts of one token "
    "that do not touch."
)
_PRUNED_KEY = "Grey: pruned."
_GREY = 200
# Of the title: letters to an inch, and inches to a line.
_LETTERS, _LINE = 14, 0.155
# Inches: of a panel of 8 x 8 patches, of the widest panel, and between rows.
_PANEL, _LARGEST, _GAP = 1.55, 3.0, 0.32
_COLUMNS = 5  # of a single strategy's panels, which go on in a second row
_POINTS = 72  # to an inch
_WIDEST_LABEL = 13  # characters


PRUNED = -1
"""In a grid, stands where no token holds a patch any more."""


@dataclass(frozen=True)
class Row:
    """What one way of fusing makes of an image: for each layer shown, its tokens and which of them holds each patch.

    A patch that was pruned is held by PRUNED.
    """

    label: str
    tokens: Sequence[int]
    held: Sequence[Grid]


def draw_patches(image: npt.NDArray[np.uint8], layers: Sequence[int], rows: Sequence[Row]) -> Figure:
    """Draw an image (s, s, 3), and for each way of fusing a row with a panel for each layer."""
    shape = _shape(len(layers), len(rows))
    patches = len(rows[0].held[0])
    panel = min(_LARGEST, _PANEL * max(1.0, patches / 8) ** 0.5)  # so that marks have room in finer grids
    pixels = image.shape[0] // patches
    beside = 0.05 if len(rows) == 1 else 1.2
    width = beside + panel * shape[1] + 0.05
    title = [rows[0].label] if len(rows) == 1 else []
    some_pruned = any((held == PRUNED).any() for row in rows for held in row.held)
    title += textwrap.wrap(f"{_KEY} {_PRUNED_KEY}" if some_pruned else _KEY, int(_LETTERS * width))
    above, below = 0.18 + _LINE * len(title), 0.24
    height = above + panel * shape[0] + _GAP * (shape[0] - 1) + below
    figure = Figure(figsize=(width, height))
    grid = figure.add_gridspec(
        *shape,
        left=beside / width,
        right=1 - 0.05 / width,
        top=1 - above / height,
        bottom=below / height,
        wspace=0.06,
        hspace=_GAP / panel,
    )
    for number, row in enumerate(rows):
        panels = list(np.ndindex(shape)) if len(rows) == 1 else [(number, column) for column in range(shape[1])]
        first = figure.add_subplot(grid[panels[0]])
        _show(first, image)
        first.set_xlabel("image", labelpad=3, color=INK)
        if len(rows) > 1:
            text = "\n".join(textwrap.wrap(row.label, _WIDEST_LABEL))
            first.set_ylabel(text, rotation="horizontal", ha="right", va="center", fontsize=10, color=INK)
        for place, layer, tokens, held in zip(panels[1:], layers, row.tokens, row.held, strict=False):
            axes = figure.add_subplot(grid[place])
            if (held == PRUNED).any():
                _show(axes, _without(image, held == PRUNED, pixels))
            else:
                _show(axes, mean_colours(image, held))
                _outline(axes, held, pixels)
                draw_tags(axes, held, pixels, _POINTS * panel / patches)
            axes.set_xlabel(f"layer {layer}: {tokens} tokens", labelpad=3, color=INK)
    figure.suptitle("\n".join(title), fontsize=9, color=INK, y=1 - 0.08 / height, va="top")
    return figure


def _without(image: npt.NDArray[np.uint8], pruned: npt.NDArray[np.bool_], pixels: int) -> npt.NDArray[np.uint8]:
    """The image with grey in place of patches (rows, columns)."""
    missing = pruned.repeat(pixels, axis=0).repeat(pixels, axis=1)
    return np.where(missing[..., None], np.uint8(_GREY), image)


def _shape(layers: int, rows: int) -> tuple[int, int]:
    if rows > 1:
        return rows, layers + 1
    lines = -(-(layers + 1) // _COLUMNS)
    return lines, -(-(layers + 1) // lines)


def _show(axes: Axes, image: npt.NDArray[np.uint8]) -> None:
    axes.imshow(image, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(visible=True, color=FAINT, linewidth=0.4)


def _outline(axes: Axes, held: Grid, side: int) -> None:
    """Lines that are seen on light and on dark: white with black around it."""
    # Pixels of imshow have their centres at whole numbers.
    lines = [[(side * x - 0.5, side * y - 0.5) for x, y in line] for line in borders(held)]
    for colour, width in (("black", 1.7), ("white", 0.8)):
        axes.add_collection(LineCollection(lines, colors=colour, linewidths=width, capstyle="projecting"))
