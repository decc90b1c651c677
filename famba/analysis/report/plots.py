"""The report's pictures, as SVG and PNG: equal runs give equal bytes."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from famba.analysis.palette import Look, look
from famba.analysis.report import cells, curves
from famba.analysis.report.rows import Row, Table, pareto
from famba.analysis.report.settings import STRATEGIES
from famba.analysis.report.statistics import Sample

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
_SVG_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


_VARIANT_LINES = (":", "-", "--", "-.")


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
    front = "The grey line is the Pareto front, its settings are ringed. Bars are standard deviations over seeds."
    band = "Lines are means over seeds, bands reach from the lowest seed to the highest"
    drawings = [
        _Drawing("accuracy_time", "Accuracy against training time", front, _accuracy_time),
        _Drawing("accuracy_memory", "Accuracy against peak memory", front, _accuracy_memory),
        _Drawing("accuracy_saved", "Accuracy against memory saved for the backward", front, _accuracy_saved),
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


def looks(rows: Sequence[Row]) -> dict[str, tuple[Look, Any, bool]]:
    """Return for each row by its label its look, its line, and whether its markers are filled.

    A strategy has the same colour and marker in every picture; its second setting and those after it have another line
    and hollow markers.
    """
    strategies = sorted({row.fusion.strategy for row in rows} - set(STRATEGIES))
    found: dict[str, tuple[Look, Any, bool]] = {}
    seen: Counter[str] = Counter()
    for row in rows:
        strategy = row.fusion.strategy
        own = look(strategy, strategies.index(strategy) + 1 if strategy in strategies else 0)
        variant = seen[strategy]
        lines = [own.line, *(line for line in _VARIANT_LINES if line != own.line)]
        line = lines[variant % len(lines)]
        found[row.label] = own, line, variant == 0
        seen[strategy] += 1
    return found


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
    return _scatter(axes, table, lambda row: row.time_s, 1 / factor)


def _accuracy_memory(axes: Axes, table: Table) -> bool:
    axes.set_xlabel("peak memory, MiB")
    return _scatter(axes, table, lambda row: row.memory_mib, 1.0)


def _accuracy_saved(axes: Axes, table: Table) -> bool:
    axes.set_xlabel("saved for the backward, kB per image")
    return _scatter(axes, table, lambda row: row.saved_bytes, 1e-3)


def _scatter(axes: Axes, table: Table, cost: Callable[[Row], Sample | None], factor: float) -> bool:
    axes.set_ylabel("Top-1, %")
    for row, own, _, is_filled in _looked(table):
        found = None if row.is_elsewhere else cost(row)
        if found is None:
            continue
        x, y = factor * found.mean, row.top1.mean
        x_error, y_error = factor * (found.sd or 0.0), row.top1.sd or 0.0
        axes.errorbar(x, y, y_error, x_error, "none", ecolor=own.color, elinewidth=1.0, capsize=2.0, zorder=3)
        axes.plot(x, y, **_marker(own, is_filled, 6.5), color=own.color, linestyle="none", zorder=4, label=row.label)
    front = [(factor * found.mean, row.top1.mean) for row in pareto(table.rows, cost) if (found := cost(row))]
    if not front:
        return False
    axes.plot(*zip(*front, strict=True), drawstyle="steps-post", color="#8a8a8a", linewidth=1.2, marker="o",
              markersize=13, markerfacecolor="none", markeredgewidth=1.2, zorder=2, label="Pareto front")  # fmt: skip
    axes.margins(0.09)
    return True


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
    for index, (row, own, line, is_filled) in enumerate(_looked(table)):
        found = curve(row)
        if found is None:
            continue
        drawn = True
        every = max(1, len(found.x) // 8)
        # A line without markers through a single point would not be seen.
        marker = _marker(own, is_filled, 5.0) if marked or len(found.x) == 1 else {}
        axes.fill_between(found.x, found.low, found.high, color=own.color, alpha=0.14, linewidth=0)
        axes.plot(found.x, found.mean, **marker, color=own.color, linestyle=line, markevery=(index % every, every),
                  label=row.label)  # fmt: skip
    return drawn


def _marker(own: Look, is_filled: bool, size: float) -> dict[str, Any]:
    larger = 1.4 if own.marker == "*" else 1.0
    color = own.color if is_filled else "white"
    return {"marker": own.marker, "markersize": larger * size, "markerfacecolor": color}


def _looked(table: Table) -> Iterator[tuple[Row, Look, Any, bool]]:
    found = looks(table.rows)
    for row in table.rows:
        yield row, *found[row.label]
