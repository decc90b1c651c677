"""Draw the figures of a report, and a confusion matrix.

A strategy looks the same in every plot, and colour-blind readers tell strategies apart: colours are those of Okabe and
Ito (2008) and a few more, and markers all differ.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from famba.drawing import drawing, files

# Colour and marker of each strategy, and of those of other packages.
_LOOKS = {
    "none": ("#000000", "o"),
    "all": ("#E69F00", "s"),
    "interleaved": ("#009E73", "D"),
    "lower": ("#56B4E9", "v"),
    "upper": ("#0072B2", "^"),
    "decreasing": ("#8C6D00", "*"),
    "adaptive": ("#CC79A7", "P"),
    "custom": ("#D55E00", "X"),
}
_OTHER = ("#7A3FB0", "p")
_FACES = ("white", "#BDBDBD", "#666666")  # of the second point of a strategy, and of those after it
_FILLS = ("full", "left", "bottom", "right", "top")  # of a marker: the next when the faces are used up
_UNITS = ((5400.0, 3600.0, "h"), (90.0, 60.0, "min"), (0.0, 1.0, "s"))


class Plot(NamedTuple):
    """Hold a picture as files, NAME.svg and NAME.png."""

    name: str
    title: str
    files: dict[str, bytes]


def time_unit(rows: pd.DataFrame) -> tuple[float, str]:
    """Return the seconds of the unit for a table's training times, and its name."""
    longest = rows["train_time_s_mean"].max()
    return next((seconds, name) for least, seconds, name in _UNITS if longest >= least or least == 0)


def draw(rows: pd.DataFrame, stem: str) -> list[Plot]:
    """Draw Top-1 against each cost that rows of report.csv have numbers for; names of pictures begin with the stem."""
    seconds, unit = time_unit(rows)
    costs = {
        "time": ("train_time_s", f"training time, {unit}", 1 / seconds),
        "memory": ("peak_memory_mib", "peak memory, MiB", 1.0),
        "saved": ("saved_bytes_per_image", "memory saved for the backward, kB/image", 1e-3),
    }
    rows = rows.assign(turn=rows.groupby(rows["strategy"].where(rows["strategy"].isin([*_LOOKS]), "")).cumcount())
    with drawing():
        return [
            _accuracy(rows[rows[f"{cost}_mean"].notna()], f"{stem}-accuracy_{kind}", cost, label, factor)
            for kind, (cost, label, factor) in costs.items()
            if rows[f"{cost}_mean"].notna().any()
        ]


def _accuracy(rows: pd.DataFrame, name: str, cost: str, label: str, factor: float) -> Plot:
    figure = Figure(layout="constrained")
    axes = figure.add_subplot(xlabel=label, ylabel="Top-1, %")
    columns = [f"{cost}_mean", "top1_percent_mean", f"{cost}_sd", "top1_percent_sd"]
    for setting, row in rows.iterrows():
        x, y, x_sd, y_sd = row[columns] * [factor, 1, factor, 1]
        color, marker = _LOOKS.get(row["strategy"], _OTHER)
        face = _FACES[(row["turn"] - 1) % len(_FACES)] if row["turn"] else color
        axes.errorbar(x, y, y_sd, x_sd, "none", ecolor=color, elinewidth=1.0, capsize=2.0)
        fill: Any = _FILLS[(row["turn"] - 1) // len(_FACES) % len(_FILLS)] if row["turn"] else "full"
        look: Any = {"fillstyle": fill, "markerfacecolor": face, "markerfacecoloralt": color, "markersize": 6.5}
        axes.plot(x, y, marker, color=color, **look, label=setting)
    axes.margins(0.09)
    axes.grid(visible=True)
    handles, names = axes.get_legend_handles_labels()
    across = min(len(names), 3 if max(map(len, names)) <= 16 else 2)
    figure.set_size_inches(5.2, 3.3 + 0.2 * -(-len(names) // across))
    figure.legend(handles, names, loc="outside lower center", ncols=across, handlelength=3.2, columnspacing=1.4)
    return Plot(name, f"Accuracy against {label.partition(',')[0]}", files(name, figure))


_NAMED, _WRITTEN = 40, 15  # the most classes whose names, and whose shares, can be read


def confusion_matrix(counts: pd.DataFrame) -> bytes:
    """Draw what share of the images of each class (row) was taken for each class (column), as a PNG."""
    from sklearn.metrics import ConfusionMatrixDisplay  # takes a second, and only this picture needs it

    classes, shares = len(counts), counts.div(counts.sum(axis=1).clip(lower=1), axis=0)
    side = 3.5 + 0.16 * min(classes, _NAMED)
    with drawing():
        figure = Figure(figsize=(side + 1.0, side), layout="constrained")
        axes = figure.add_subplot()
        display = ConfusionMatrixDisplay(shares.to_numpy(), display_labels=[str(name)[:24] for name in counts])
        look: Any = {"include_values": classes <= _WRITTEN, "text_kw": {"fontsize": 7}, "values_format": ".2f"}
        display.plot(ax=axes, cmap="Blues", xticks_rotation="vertical", **look)
        axes.set(xlabel="taken for", ylabel="true class")
        if classes > _NAMED:
            axes.set(xticks=[], yticks=[])
        return files("confusion", figure, ["png"])["confusion.png"]
