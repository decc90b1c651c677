"""Draw which patches each token holds on the image, and how similar the tokens of each layer are."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_letters
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from scipy import ndimage

from famba.analysis.figures import FAINT, INK

Grid = npt.NDArray[np.int64]
"""Array (rows, columns) of the tokens that hold the patches."""
PRUNED = -1
"""Stands in a grid where no token holds a patch any more."""
_KEY = (
    "Outlined: patches that share a token, in their mean colour. Equal marks or letters in a panel: parts of one token "
    "that do not touch."
)
_GREY = 200
_LETTERS, _LINE = 14, 0.155  # of the title: letters to an inch, and inches to a line
_PANEL, _LARGEST, _GAP = 1.55, 3.0, 0.32  # inches: a panel of 8 x 8 patches, the widest panel, between rows
_COLUMNS = 5  # of a single strategy's panels, which go on in a second row
_WIDEST_LABEL = 13  # characters
_AREA, _HEIGHT = 0.14, 0.72  # of a patch: its area for a mark, its height for a letter
# Bins of a tenth: more where even the layer with the fewest tokens has enough to fill them.
_BINS, _FINE_BINS, _ENOUGH = 2, 4, 100
_SIDE_BY_SIDE = 4


class Tag(NamedTuple):
    """Hold a mark with its colour (of Okabe and Ito) and its edge, or a letter, white on black."""

    sign: str
    color: str = "white"
    edge: str = "black"
    is_letter: bool = False


_MARKS = (
    Tag("o", "#E69F00"), Tag("s", "#56B4E9"), Tag("^", "#009E73", "white"), Tag("D", "#F0E442"), Tag("v", "#CC79A7"),
    Tag("P", "#0072B2", "white"), Tag("X", "#D55E00", "white"), Tag("h", "#FFFFFF"),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """Hold what one way of fusing makes of an image: for each layer shown its tokens, and which of them holds a patch.

    A patch that was pruned is held by PRUNED.
    """

    label: str
    tokens: Sequence[int]
    held: Sequence[Grid]


@dataclass(frozen=True)
class Column:
    """Hold the similarities of one way of fusing.

    closest: for each layer the cosine of each token with its closest partner, of all images (n,). mean: for each layer
    the mean cosine of all pairs. removed: tokens that each layer removes.
    """

    label: str
    closest: Sequence[npt.NDArray[np.floating]]
    mean: Sequence[float]
    removed: Sequence[int]


def draw_patches(image: npt.NDArray[np.uint8], layers: Sequence[int], rows: Sequence[Row]) -> Figure:
    """Draw an image (s, s, 3), and for each way of fusing a row with a panel for each layer."""
    panels, patches, is_alone = len(layers) + 1, len(rows[0].held[0]), len(rows) == 1
    lines = -(-panels // _COLUMNS) if is_alone else len(rows)
    across = -(-panels // lines) if is_alone else panels
    panel = min(_LARGEST, _PANEL * max(1.0, patches / 8) ** 0.5)  # so that marks have room in finer grids
    beside = 0.05 if is_alone else 1.2
    width = beside + panel * across + 0.05
    key = f"{_KEY} Grey: pruned." if any((held == PRUNED).any() for row in rows for held in row.held) else _KEY
    title = [row.label for row in rows if is_alone] + textwrap.wrap(key, int(_LETTERS * width))
    above, below = 0.18 + _LINE * len(title), 0.24
    height = above + panel * lines + _GAP * (lines - 1) + below
    figure = Figure(figsize=(width, height))
    sides = {"left": beside / width, "right": 1 - 0.05 / width, "top": 1 - above / height, "bottom": below / height}
    grid = figure.add_gridspec(lines, across, **sides, wspace=0.06, hspace=_GAP / panel)
    for number, row in enumerate(rows):
        first, *others = np.ndindex(lines, across) if is_alone else ((number, column) for column in range(across))
        axes = figure.add_subplot(grid[first])
        _show(axes, image, "image")
        if not is_alone:
            text = "\n".join(textwrap.wrap(row.label, _WIDEST_LABEL))
            axes.set_ylabel(text, rotation="horizontal", ha="right", va="center", fontsize=10, color=INK)
        for place, layer, tokens, held in zip(others, layers, row.tokens, row.held, strict=False):
            axes, said = figure.add_subplot(grid[place]), f"layer {layer}: {tokens} tokens"
            if (held == PRUNED).any():
                _show(axes, np.where(_spread(held == PRUNED, image)[..., None], np.uint8(_GREY), image), said)
                continue
            _show(axes, mean_colours(image, held), said)
            # Pixels of imshow have their centres at whole numbers. White with black around it is seen on any image.
            outline = len(image) / patches * borders(held) - 0.5
            for colour, thickness in (("black", 1.7), ("white", 0.8)):
                axes.add_collection(LineCollection(list(outline), colors=colour, linewidths=thickness,
                                                   capstyle="projecting"))  # fmt: skip
            draw_tags(axes, held, len(image) // patches, 72 * panel / patches)
    figure.suptitle("\n".join(title), fontsize=9, color=INK, y=1 - 0.08 / height, va="top")
    return figure


def _show(axes: Axes, image: npt.NDArray[np.uint8], label: str) -> None:
    axes.imshow(image, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel(label, labelpad=3, color=INK)
    for spine in axes.spines.values():
        spine.set(visible=True, color=FAINT, linewidth=0.4)


def _spread(values: npt.NDArray, image: npt.NDArray[np.uint8]) -> npt.NDArray:
    """Return values of patches (rows, columns, ...) for each pixel of an image."""
    return values.repeat(image.shape[0] // values.shape[0], axis=0).repeat(image.shape[1] // values.shape[1], axis=1)


def _shared(held: Grid) -> npt.NDArray[np.bool_]:
    """Return which patches are held by a token that holds others too (rows, columns)."""
    _, places, counts = np.unique(held, return_inverse=True, return_counts=True)
    return (counts[places] > 1).reshape(held.shape)


def mean_colours(image: npt.NDArray[np.uint8], held: Grid) -> npt.NDArray[np.uint8]:
    """Give the patches of each token that holds several the mean colour of all of them, rounded half up.

    image: (height, width, 3), each a whole multiple of the grid's side. Returns the same shape.
    """
    rows, columns = held.shape
    patches = image.reshape(rows, image.shape[0] // rows, columns, image.shape[1] // columns, 3).mean(axis=(1, 3))
    tokens, places = np.unique(held, return_inverse=True)
    means = np.stack([ndimage.mean(patches[..., c], held, tokens) for c in range(3)], axis=-1)[places]
    filled = np.floor(means + 0.5).astype(np.uint8).reshape(*held.shape, 3)
    return np.where(_spread(_shared(held), image)[..., None], _spread(filled, image), image)


def borders(held: Grid) -> npt.NDArray[np.int64]:
    """Return lines (n, 2, 2) around the tokens that hold several patches, each from (x, y) to (x, y), in patches.

    They lie between patches of different tokens, and on the image's edge, where either side is a token that holds
    several; between two patches that stand alone there is none.
    """
    around, several = np.pad(held, 1, constant_values=PRUNED), np.pad(_shared(held), 1)
    found = []
    for turn in (False, True):  # between rows, and between columns
        ids, many = (around.T, several.T) if turn else (around, several)
        y, x = np.nonzero(((ids[1:] != ids[:-1]) & (many[1:] | many[:-1]))[:, 1:-1])
        lines = np.stack([np.stack([x, y], axis=1), np.stack([x + 1, y], axis=1)], axis=1)
        found.append(lines[..., ::-1] if turn else lines)
    return np.concatenate(found)


def tagged(held: Grid) -> list[tuple[Tag, list[tuple[int, int]]]]:
    """Give each token whose patches do not all touch a tag of its own: a mark the largest, then letters, then numbers.

    Returns for each such token, those with the most patches first, its tag, and of each part the patch (row, column)
    nearest to its middle.
    """
    found: list[tuple[int, list[tuple[int, int]]]] = []
    for token in dict.fromkeys(held.flat):
        parts, count = ndimage.label(held == token)
        if count > 1:
            found.append((-int((held == token).sum()), [_middle(np.argwhere(parts == n + 1)) for n in range(count)]))
    letters = (Tag(sign, is_letter=True) for sign in itertools.chain(ascii_letters, map(str, itertools.count(1))))
    ordered = sorted(found, key=lambda sized: sized[0])
    return [(tag, places) for tag, (_, places) in zip(itertools.chain(_MARKS, letters), ordered, strict=False)]


def _middle(part: npt.NDArray[np.int64]) -> tuple[int, int]:
    row, column = part[np.square(part - part.mean(axis=0)).sum(axis=1).argmin()].tolist()
    return row, column


def draw_tags(axes: Axes, held: Grid, pixels: int, points: float) -> None:
    """Draw the tag of each token in each of its parts, on patches of so many pixels, and on paper of so many points."""
    for tag, places in tagged(held):
        y, x = (np.array(places).T + 0.5) * pixels - 0.5
        if not tag.is_letter:
            axes.scatter(x, y, s=_AREA * points**2, c=tag.color, marker=tag.sign, edgecolors=tag.edge, linewidths=0.5,
                         zorder=3)  # fmt: skip
            continue
        for place in zip(x, y, strict=True):
            axes.text(*place, tag.sign, size=_HEIGHT * points, color=tag.color, ha="center", va="center_baseline",
                      path_effects=[withStroke(linewidth=1.4, foreground=tag.edge)], zorder=3)  # fmt: skip


def edges(columns: Sequence[Column]) -> npt.NDArray[np.float64]:
    """Return the borders of bins of cosines up to 1, the same for all columns.

    From below the mean of every layer and all but a hundredth of the tokens, which count in the lowest bin.
    """
    lowest = min(min(*one.mean, float(np.quantile(np.concatenate(one.closest), 0.01))) for one in columns)
    tenths = max(1, 10 - math.floor(10 * lowest))
    fewest = min(len(values) for one in columns for values in one.closest)
    return np.linspace(1 - tenths / 10, 1, tenths * (_FINE_BINS if fewest >= _ENOUGH else _BINS) + 1)


def shares(column: Column, bins: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the share of a layer's tokens in each bin of cosines, in percent (bins, layers)."""
    # A cosine of equal tokens may come out a rounding above 1, too.
    counts = [np.histogram(np.clip(values, bins[0], bins[-1]), bins)[0] / len(values) for values in column.closest]
    return 100 * np.stack(counts, axis=1)


def draw_similarity(columns: Sequence[Column], images: int) -> Figure:
    """Draw a heat map for each way of fusing side by side, colours alike, and below it where tokens are removed."""
    bins, depth = edges(columns), len(columns[0].closest)
    found = [shares(column, bins) for column in columns]
    most = max(1, *(max(column.removed) for column in columns))
    lines = -(-len(columns) // _SIDE_BY_SIDE)
    across = -(-len(columns) // lines)
    width = min(5.5, max(2.6, 0.16 * depth + 1.2))
    figure = Figure(figsize=(1.4 + width * across, 0.7 + 3.7 * lines), layout="constrained")
    grid = figure.add_gridspec(2 * lines, across, height_ratios=[3.4, 1] * lines)
    maps: list[Axes] = []
    for number, (column, values) in enumerate(zip(columns, found, strict=True)):
        line, place = divmod(number, across)
        axes = figure.add_subplot(grid[2 * line, place])
        below = figure.add_subplot(grid[2 * line + 1, place], sharex=axes)
        brightest = max(float(one.max()) for one in found)
        mesh = axes.pcolormesh(np.arange(depth + 1) - 0.5, bins, values, cmap="cividis", vmin=0, vmax=brightest)
        medians = [float(np.median(one)) for one in column.closest]
        for line_values, colour, style, label in (
            (medians, "#D55E00", "-", "median"), (column.mean, "#FFFFFF", "--", "mean over all pairs of tokens")
        ):  # fmt: skip
            casing = [withStroke(linewidth=3.2, foreground="black")]
            axes.plot(line_values, style, color=colour, linewidth=1.6, label=label, path_effects=casing)
        axes.set_title(column.label, fontsize=10, color=INK)
        axes.set_ylim(bins[0], bins[-1])
        axes.tick_params(labelbottom=False, labelleft=place == 0)
        below.bar(range(depth), column.removed, width=0.8, color="#0072B2")
        below.set(xlim=(-0.5, depth - 0.5), ylim=(0, most * 1.08), xlabel="layer")
        below.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        below.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        below.tick_params(labelleft=place == 0)
        if place == 0:
            axes.set_ylabel("cosine of a token with the\nclosest that it could join")
            below.set_ylabel("tokens\nremoved")
        maps.append(axes)
    bar = figure.colorbar(mesh, ax=maps, pad=0.015, fraction=0.04, aspect=20 * lines)
    bar.set_label("share of the layer's tokens, %")
    figure.legend(*maps[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, handlelength=4)
    of = f"{images} image{'s' if images > 1 else ''}"
    figure.suptitle(f"How similar tokens are in each layer, {of}", fontsize=10, color=INK)
    return figure
