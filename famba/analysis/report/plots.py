"""The report's pictures, as SVG and PNG: equal runs give equal bytes."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from famba.analysis.palette import Look, looks
from famba.analysis.report import cells, curves
from famba.analysis.report.rows import MEMORY, SAVED, TIME, Cost, Row, Table, pareto

_WIDTH, _HEIGHT, _LEGEND_ROW = 5.2, 3.3, 0.2  # inches
_PNG_DPI = 200
_LONG = 16  # characters of a label that leave no room for three beside one another
_STYLE: Any = {
    "axes.edgecolor": "#555555",
    "axes.grid": True,
    "axes.labelsize": 9.5,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "grid.color": "#e4e4e4",
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "svg.fonttype": "path",
    "text.parse_math": False,
    "xtick.color": "#333333",
    "ytick.color": "#333333",
}
_FRONT = "#8a8a8a"
_SVG_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


class Plot(NamedTuple):
    """A picture under a file's stem. svg is None where there is nothing to show, and caption says why."""

    name: str
    title: str
    caption: str
    svg: str | None
    png: bytes | None


class _Drawing(NamedTuple):
    name: str
    title: str
    caption: str
    draw: Callable[[Axes, Table], bool]


def plots(table: Table, stem: str) -> list[Plot]:
    """Draw all pictures of a table; their names begin with the stem."""
    images = curves.evaluated_on(table)
    smooth = curves.smoothing(table)
    band = "Lines are means over seeds, bands reach from the lowest seed to the highest"
    drawings = [
        _Drawing("accuracy_time", "Accuracy against training time", _front(table, TIME), _accuracy_time),
        _Drawing("accuracy_memory", "Accuracy against peak memory", _front(table, MEMORY), _accuracy_memory),
        _Drawing(
            "accuracy_saved",
            "Accuracy against memory saved for the backward",
            _front(table, SAVED),
            _accuracy_saved,
        ),
        _Drawing("curves_top1", f"Top-1 on {images} images over epochs", f"{band}.", _curves_top1),
        _Drawing(
            "curves_loss",
            "Training loss over steps",
            f"{band}, of the loss with the recipe's augmentation, "
            + (f"each seed smoothed by a running mean over {smooth} logged steps." if smooth > 1 else "not smoothed."),
            _curves_loss,
        ),
        _Drawing("tokens", "Tokens per layer", f"{band}; 0 is what enters the first layer.", _tokens),
    ]
    return [_plot(drawing, table, f"{stem}-{drawing.name}") for drawing in drawings]


def inline(plot: Plot) -> str:
    """Return the SVG as it stands in an HTML page: no prologue, names of its own, sized by the page."""
    assert plot.svg is not None
    svg = plot.svg[plot.svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1
    )
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r'\bid="', f'id="{plot.name}-', svg)
    return re.sub(r'(url\(|xlink:href=")#', rf"\1#{plot.name}-", svg)


def _plot(drawing: _Drawing, table: Table, name: str) -> Plot:
    with _style(name):
        figure = Figure(layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06))
        axes = figure.add_subplot()
        if not drawing.draw(axes, table):
            return Plot(name, drawing.title, "Left out: the runs' folders do not hold what it would show.", None, None)
        _legend(figure, axes)
        svg, png = io.BytesIO(), io.BytesIO()
        FigureCanvasSVG(figure).print_svg(svg, metadata=_SVG_METADATA)
        figure.set_dpi(_PNG_DPI)
        FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})
    return Plot(name, drawing.title, drawing.caption, svg.getvalue().decode(), png.getvalue())


@contextmanager
def _style(salt: str) -> Iterator[None]:
    """Draw as this project does, whatever the user's matplotlib is set to."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE | {"svg.hashsalt": salt})
        yield


def _legend(figure: Figure, axes: Axes) -> None:
    handles, names = axes.get_legend_handles_labels()
    longest = max(map(len, names))
    columns = min(len(names), 3 if longest <= _LONG else 2 if longest <= 2 * _LONG else 1)
    figure.set_size_inches(_WIDTH, _HEIGHT + _LEGEND_ROW * -(-len(names) // columns))
    figure.legend(handles, names, loc="outside lower center", ncols=columns, handlelength=3.2, columnspacing=1.4)


def _accuracy_time(axes: Axes, table: Table) -> bool:
    factor, unit = cells.time_unit(table)
    axes.set_xlabel(f"training time, {unit}")
    return _scatter(axes, table, TIME, 1 / factor)


def _accuracy_memory(axes: Axes, table: Table) -> bool:
    axes.set_xlabel("peak memory, MiB")
    return _scatter(axes, table, MEMORY, 1.0)


def _accuracy_saved(axes: Axes, table: Table) -> bool:
    axes.set_xlabel("saved for the backward, kB per image")
    return _scatter(axes, table, SAVED, 1e-3)


def _front(table: Table, cost: Cost) -> str:
    """Say what the rings and the line of a plot mean, or why there are none."""
    bars = "Bars are standard deviations over seeds."
    if _marked(table, cost):
        return (
            f"Ringed: the Pareto front, settings that no other beats; the grey line joins the best by the means. {bars}"
        )
    return f"No Pareto front is marked, since no setting beats another by more than chance. {bars}"


def _marked(table: Table, cost: Cost) -> list[Row]:
    """The front, where it leaves any setting out."""
    front = pareto(table.rows, cost)
    return front if len(front) < len(_placed(table, cost)) else []


def _placed(table: Table, cost: Cost) -> list[Row]:
    return [row for row in table.rows if not row.is_elsewhere and row.cost(cost)]


def _scatter(axes: Axes, table: Table, cost: Cost, factor: float) -> bool:
    axes.set_ylabel("Top-1, %")
    placed = _placed(table, cost)
    for row, own in _looked(table):
        found = row.cost(cost)
        if found is None or row not in placed:
            continue
        x, y = factor * found.mean, row.top1.mean
        x_error, y_error = factor * (found.sd or 0.0), row.top1.sd or 0.0
        axes.errorbar(x, y, y_error, x_error, "none", ecolor=own.color, elinewidth=1.0, capsize=2.0, zorder=3)
        axes.plot(x, y, **_marker(own, 6.5), color=own.color, linestyle="none", zorder=4, label=row.label)
    points = [(factor * found.mean, row.top1.mean) for row in _marked(table, cost) if (found := row.cost(cost))]
    if points:
        best = [place for i, place in enumerate(points) if all(place[1] > other[1] for other in points[:i])]
        ring: dict[str, Any] = {"marker": "o", "markersize": 13, "markerfacecolor": "none", "markeredgewidth": 1.2}
        axes.plot(*zip(*best, strict=True), drawstyle="steps-post", color=_FRONT, linewidth=1.2, zorder=2)
        axes.plot(*zip(*points, strict=True), **ring, color=_FRONT, linestyle="none", zorder=2, label="Pareto front")
    axes.margins(0.09)
    return bool(placed)


def _curves_top1(axes: Axes, table: Table) -> bool:
    axes.set_xlabel("epoch")
    axes.set_ylabel("Top-1, %")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    images = curves.evaluated_on(table)
    return _lines(axes, table, lambda row: curves.accuracy(row, images))


def _curves_loss(axes: Axes, table: Table) -> bool:
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    return _lines(axes, table, curves.loss, marked=False)


def _tokens(axes: Axes, table: Table) -> bool:
    axes.set_xlabel("layers done")
    axes.set_ylabel("tokens")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    drawn = _lines(axes, table, curves.tokens)
    axes.set_ylim(bottom=0)
    return drawn


def _lines(axes: Axes, table: Table, curve: Callable[[Row], curves.Curve | None], marked: bool = True) -> bool:
    drawn = False
    for index, (row, own) in enumerate(_looked(table)):
        found = curve(row)
        if found is None:
            continue
        drawn = True
        every = max(1, len(found.x) // 8)
        # A line without markers through a single point would not be seen.
        marker = _marker(own, 5.0) if marked or len(found.x) == 1 else {}
        axes.fill_between(found.x, found.low, found.high, color=own.color, alpha=0.14, linewidth=0)
        axes.plot(found.x, found.mean, **marker, color=own.color, linestyle=own.line, markevery=(index % every, every),
                  label=row.label)  # fmt: skip
    return drawn


def _marker(own: Look, size: float) -> dict[str, Any]:
    larger = 1.4 if own.marker == "*" else 1.0
    return {"marker": own.marker, "markersize": larger * size, "markerfacecolor": own.face}


def _looked(table: Table) -> Iterator[tuple[Row, Look]]:
    return zip(table.rows, looks([row.fusion.strategy for row in table.rows]), strict=True)
