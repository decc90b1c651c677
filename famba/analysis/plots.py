"""Draw the pictures of a report: accuracy against cost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from famba.analysis.figures import drawing, files, looks

_UNITS = ((5400.0, 3600.0, "h"), (90.0, 60.0, "min"), (0.0, 1.0, "s"))


class Plot(NamedTuple):
    """Hold a picture as SVG and PNG."""

    name: str
    title: str
    caption: str
    svg: bytes
    png: bytes

    def files(self) -> Iterator[tuple[str, bytes]]:
        """Yield names and contents of the picture's files."""
        yield from ((f"{self.name}.svg", self.svg), (f"{self.name}.png", self.png))


def time_unit(rows: pd.DataFrame) -> tuple[float, str]:
    """Return the seconds of the unit for a table's training times, and its name."""
    longest = rows["train_time_s_mean"].max()
    return next((seconds, name) for least, seconds, name in _UNITS if longest >= least or least == 0)


def draw(rows: pd.DataFrame, stem: str) -> list[Plot]:
    """Draw all pictures that rows of report.csv have numbers for; their names begin with the stem."""
    seconds, unit = time_unit(rows)
    rows = rows.assign(look=looks(list(rows["strategy"])))
    with drawing():
        plots = [
            _accuracy(rows, f"{stem}-accuracy_time", "train_time_s", f"training time, {unit}", 1 / seconds),
            _accuracy(rows, f"{stem}-accuracy_memory", "peak_memory_mib", "peak memory, MiB", 1.0),
            _accuracy(
                rows, f"{stem}-accuracy_saved", "saved_bytes_per_image", "memory saved for the backward, kB/image", 1e-3
            ),
        ]
    return [plot for plot in plots if plot]


def _accuracy(rows: pd.DataFrame, name: str, cost: str, label: str, factor: float) -> Plot | None:
    """Draw Top-1 against a cost, None where it is not known."""
    known = rows[rows[f"{cost}_mean"].notna()]
    figure = Figure(layout="constrained")
    axes = figure.add_subplot(xlabel=label, ylabel="Top-1, %")
    columns = [f"{cost}_mean", "top1_percent_mean", f"{cost}_sd", "top1_percent_sd"]
    for (setting, row), look in zip((known[columns] * [factor, 1, factor, 1]).iterrows(), known["look"], strict=True):
        x, y, x_sd, y_sd = row
        axes.errorbar(x, y, y_sd, x_sd, "none", ecolor=look.color, elinewidth=1.0, capsize=2.0)
        axes.plot(x, y, **look.marked(6.5), linestyle="none", label=setting)
    axes.margins(0.09)
    title = f"Accuracy against {label.partition(',')[0]}"
    return _plot(name, title, "Bars are standard deviations over seeds.", figure) if len(known) else None


def _plot(name: str, title: str, caption: str, figure: Figure) -> Plot:
    (axes,) = figure.axes
    axes.grid(visible=True)
    handles, names = axes.get_legend_handles_labels()
    columns = min(len(names), 3 if max(map(len, names)) <= 16 else 2)
    figure.set_size_inches(5.2, 3.3 + 0.2 * -(-len(names) // columns))
    figure.legend(handles, names, loc="outside lower center", ncols=columns, handlelength=3.2, columnspacing=1.4)
    return Plot(name, title, caption, *files(name, figure).values())
