"""How similar the tokens of each layer are, as a heat map over layers: what fusing across layers goes by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from famba.analysis.figures import INK

# Bins of a tenth: more where even the layer with the fewest tokens has enough to fill them.
_BINS, _FINE_BINS, _ENOUGH = 2, 4, 100
_LEFT_OUT = 0.01
_MAP = "cividis"
_MEDIAN, _MEAN, _BARS = "#D55E00", "#FFFFFF", "#0072B2"
_SIDE_BY_SIDE = 4


@dataclass(frozen=True)
class Column:
    """One way of fusing. closest: for each layer the cosine of each token with its closest partner, of all images (n,).

    mean: for each layer the mean cosine of all pairs. removed: tokens that each layer removes.
    """

    label: str
    closest: Sequence[npt.NDArray[np.floating]]
    mean: Sequence[float]
    removed: Sequence[int]


def edges(columns: Sequence[Column]) -> npt.NDArray[np.float64]:
    """Borders of the bins of cosines up to 1, the same for all.

    From below the mean of every layer and all but a hundredth of the tokens, which count in the lowest bin.
    """
    lowest = min(min(one.mean) for one in columns)
    lowest = min(lowest, *(float(np.quantile(np.concatenate(one.closest), _LEFT_OUT)) for one in columns))
    tenths = max(1, 10 - math.floor(10 * lowest))
    fewest = min(len(values) for one in columns for values in one.closest)
    return np.linspace(1 - tenths / 10, 1, tenths * (_FINE_BINS if fewest >= _ENOUGH else _BINS) + 1)


def shares(column: Column, bins: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Share of a layer's tokens in each bin of cosines, in percent, (bins, layers)."""
    # A cosine of equal tokens may come out a rounding above 1, too.
    counts = [np.histogram(np.clip(values, bins[0], bins[-1]), bins)[0] / len(values) for values in column.closest]
    return 100 * np.stack(counts, axis=1)


def draw_similarity(columns: Sequence[Column], images: int) -> Figure:
    """Draw a heat map for each way of fusing side by side, colours alike, and below it where tokens are removed."""
    bins = edges(columns)
    found = [shares(column, bins) for column in columns]
    brightest = max(float(one.max()) for one in found)
    most = max(1, *(max(column.removed) for column in columns))
    depth = len(columns[0].closest)
    lines = -(-len(columns) // _SIDE_BY_SIDE)
    across = -(-len(columns) // lines)
    width = min(5.5, max(2.6, 0.16 * depth + 1.2))
    figure = Figure(figsize=(1.4 + width * across, 0.7 + 3.7 * lines), layout="constrained")
    grid = figure.add_gridspec(2 * lines, across, height_ratios=[3.4, 1] * lines)
    maps: list[Axes] = []
    for number, (column, values) in enumerate(zip(columns, found, strict=True)):
        line, place = divmod(number, across)
        axes = figure.add_subplot(grid[2 * line, place])
        mesh = axes.pcolormesh(np.arange(depth + 1) - 0.5, bins, values, cmap=_MAP, vmin=0, vmax=brightest)
        _line(axes, [float(np.median(one)) for one in column.closest], _MEDIAN, "-", "median")
        _line(axes, column.mean, _MEAN, "--", "mean over all pairs of tokens")
        axes.set_title(column.label, fontsize=10, color=INK)
        axes.set_ylim(bins[0], bins[-1])
        axes.tick_params(labelbottom=False, labelleft=place == 0)
        below = _removed(figure.add_subplot(grid[2 * line + 1, place], sharex=axes), column, most)
        below.tick_params(labelleft=place == 0)
        if place == 0:
            axes.set_ylabel("cosine of a token with the\nclosest that it could join")
            below.set_ylabel("tokens\nremoved")
        maps.append(axes)
    bar = figure.colorbar(mesh, ax=maps, pad=0.015, fraction=0.04, aspect=20 * lines)
    bar.set_label("share of the layer's tokens, %")
    handles, names = maps[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, handlelength=4)
    of = f"{images} image{'s' if images > 1 else ''}"
    figure.suptitle(f"How similar tokens are in each layer, {of}", fontsize=10, color=INK)
    return figure


def _removed(axes: Axes, column: Column, most: int) -> Axes:
    """Bars of the tokens that each layer removes, on a scale up to `most`."""
    depth = len(column.removed)
    axes.bar(range(depth), column.removed, width=0.8, color=_BARS)
    axes.set_ylim(0, most * 1.08)
    axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_xlim(-0.5, depth - 0.5)
    axes.set_xlabel("layer")
    return axes


def _line(axes: Axes, values: Sequence[float], colour: str, style: str, label: str) -> None:
    casing = [withStroke(linewidth=3.2, foreground="black")]
    axes.plot(range(len(values)), values, style, color=colour, linewidth=1.6, label=label, path_effects=casing)
