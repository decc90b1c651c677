"""Draw the pictures of a report: accuracy against cost, curves over training, tokens per layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from famba.analysis.figures import Look, drawing, looks, rendered

_UNITS = ((5400.0, 3600.0, "h"), (90.0, 60.0, "min"), (0.0, 1.0, "s"))
_FRONT = "#8a8a8a"
_SMOOTH = 12  # the loss is a running mean over a twelfth of its points


class Plot(NamedTuple):
    """Hold a picture; svg and png are empty where there is nothing to show, and caption says why."""

    name: str
    title: str
    caption: str
    svg: bytes
    png: bytes


def time_unit(rows: pd.DataFrame) -> tuple[float, str]:
    """Return the seconds of the unit for a table's training times, and its name."""
    longest = rows["train_time_s_mean"].max()
    return next((seconds, name) for least, seconds, name in _UNITS if longest >= least or least == 0)


def draw(
    rows: pd.DataFrame, runs: pd.DataFrame, fronts: dict[str, list[str]], metrics: dict[str, pd.DataFrame], stem: str
) -> list[Plot]:
    """Draw all pictures of a table; their names begin with the stem.

    rows: of report.csv by label. runs: one row each, with label, seed, tokens, and those left after each layer. fronts:
    labels of the Pareto front by cost. metrics: what each run logged, by its name.
    """
    factor, unit = time_unit(rows)
    logged = pd.concat(metrics.values())
    top1 = max(("test_top1", "validation_top1"), key=lambda name: logged[name].count())

    def accuracy(run: Any) -> pd.Series:
        found = metrics[run.run].dropna(subset=top1)
        return found[top1].set_axis(found["epoch"] + 1)

    def loss(run: Any) -> pd.Series:
        losses = metrics[run.run].query("kind == 'train'").set_index("step")["loss"]
        return losses.rolling(2 * (len(losses) // _SMOOTH // 2) + 1, center=True, min_periods=1).mean()

    def tokens(run: Any) -> pd.Series:
        return pd.Series([run.tokens, *run.left])

    band = "Lines are means over seeds, bands reach from the lowest seed to the highest"
    augmented = f"{band}, of the loss with the recipe's augmentation, smoothed by a running mean."
    plots = {
        ("accuracy_time", "Accuracy against training time"):
            _cost(rows, fronts, "train_time_s", f"training time, {unit}", 1 / factor),
        ("accuracy_memory", "Accuracy against peak memory"):
            _cost(rows, fronts, "peak_memory_mib", "peak memory, MiB", 1.0),
        ("accuracy_saved", "Accuracy against memory saved for the backward"):
            _cost(rows, fronts, "saved_bytes_per_image", "saved for the backward, kB per image", 1e-3),
        ("curves_top1", f"Top-1 on {top1.removesuffix('_top1')} images over epochs"):
            (f"{band}.", _lines(runs, accuracy, "epoch", "Top-1, %")),
        ("curves_loss", "Training loss over steps"):
            (augmented, _lines(runs, loss, "step", "training loss", is_marked=False)),
        ("tokens", "Tokens per layer"):
            (f"{band}; 0 is what enters the first layer.", _lines(runs, tokens, "layers done", "tokens")),
    }  # fmt: skip
    return [_plot(f"{stem}-{name}", title, *drawn) for (name, title), drawn in plots.items()]


def _plot(name: str, title: str, caption: str, draw_on: Callable[[Axes], bool]) -> Plot:
    with drawing():
        figure = Figure(layout="constrained")
        axes = figure.add_subplot()
        axes.grid(visible=True)
        if not draw_on(axes):
            return Plot(name, title, "Left out: the runs do not hold what it would show.", b"", b"")
        handles, names = axes.get_legend_handles_labels()
        columns = min(len(names), 3 if max(map(len, names)) <= 16 else 2)
        figure.set_size_inches(5.2, 3.3 + 0.2 * -(-len(names) // columns))
        figure.legend(handles, names, loc="outside lower center", ncols=columns, handlelength=3.2, columnspacing=1.4)
        return Plot(name, title, caption, rendered(figure, "svg"), rendered(figure, "png"))


def _cost(
    rows: pd.DataFrame, fronts: dict[str, list[str]], cost: str, name: str, factor: float
) -> tuple[str, Callable[[Axes], bool]]:
    """Return the caption of a plot of Top-1 against a cost, and what draws it for settings on the table's machine."""
    is_here = (rows["device"] != "") | (rows["device"] == "").all()
    columns = [f"{cost}_mean", "top1_percent_mean", f"{cost}_sd", "top1_percent_sd"]
    placed = rows.loc[is_here & rows[f"{cost}_mean"].notna(), columns] * [factor, 1.0, factor, 1.0]
    front = fronts[cost] if len(fronts[cost]) < len(placed) else []

    def draw_on(axes: Axes) -> bool:
        axes.set(xlabel=name, ylabel="Top-1, %")
        for label, own in _looks(rows):
            if label in placed.index:
                x, y, x_sd, y_sd = placed.loc[label]
                axes.errorbar(x, y, y_sd, x_sd, "none", ecolor=own.color, elinewidth=1.0, capsize=2.0, zorder=3)
                axes.plot(x, y, **own.marked(6.5), linestyle="none", zorder=4, label=label)
        if front:
            x, y = placed.loc[front, columns[0]], placed.loc[front, columns[1]]
            best = y > y.cummax().shift(fill_value=float("-inf"))
            axes.plot(x[best], y[best], drawstyle="steps-post", color=_FRONT, linewidth=1.2, zorder=2)
            axes.plot(x, y, "o", ms=13, mfc="none", mew=1.2, color=_FRONT, zorder=2, label="Pareto front")
        axes.margins(0.09)
        return len(placed) > 0

    ringed = "Ringed: the Pareto front, settings that no other beats; the grey line joins the best by the means."
    unringed = "No Pareto front is marked, since no setting is shown to beat another."
    return f"{ringed if front else unringed} Bars are standard deviations over seeds.", draw_on


def _lines(
    runs: pd.DataFrame, curve: Callable[[Any], pd.Series], x: str, y: str, is_marked: bool = True
) -> Callable[[Axes], bool]:
    """Return what draws a line for each setting: mean and range over seeds, at the places that all of them have."""

    def draw_on(axes: Axes) -> bool:
        axes.set(xlabel=x, ylabel=y)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        drawn = False
        for place, (label, own) in enumerate(_looks(runs.drop_duplicates("label").set_index("label"))):
            curves = {run.seed: curve(run) for run in runs[runs["label"] == label].itertuples()}
            known = {seed: found.groupby(level=0).last() for seed, found in curves.items() if len(found)}
            values = pd.DataFrame(known).dropna()
            if values.empty:
                continue
            drawn, every, at = True, max(1, len(values) // 8), values.index
            # A line without markers through a single point would not be seen.
            look: dict[str, Any] = {"color": own.color}
            if is_marked or len(at) == 1:
                look = {**own.marked(5.0), "markevery": (place % every, every)}
            axes.fill_between(at, values.min(axis=1), values.max(axis=1), color=own.color, alpha=0.14, linewidth=0)
            axes.plot(at, values.mean(axis=1), **look, linestyle=own.line, label=label)
        if y == "tokens":
            axes.set_ylim(bottom=0)
        return drawn

    return draw_on


def _looks(rows: pd.DataFrame) -> Iterator[tuple[str, Look]]:
    return zip(rows.index, looks(list(rows["strategy"])), strict=True)
