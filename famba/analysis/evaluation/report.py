"""What `famba evaluate` shows: a table, files, and curves of accuracy, throughput and memory over the budget."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tabulate import tabulate

from famba.analysis.evaluation.evaluate import Evaluation, Result
from famba.analysis.figures import FAINT, INK, drawing, save
from famba.analysis.palette import looks
from famba.analysis.variants import label_variants
from famba.files import write_whole
from famba.fusion import Fusion, labels
from famba.training.logging import signed
from famba.training.provenance import provenance

_STEM = "evaluate"


def table(evaluation: Evaluation) -> str:
    """Return a line for each way of fusing, and what it was evaluated on, as text."""
    request = evaluation.request
    patches = request.trained.model.num_patches
    names = label_variants(request.variants)
    rows = [
        {
            "fusion": f"{name} *" if result.variant.own else name,
            "removed": f"{result.variant.removed} of {patches}",
            "Top-1 %": f"{result.top1:.2f}",
            "95 % interval": "{:.2f} to {:.2f}".format(*result.top1_interval),
            "difference to *": _difference(result),
            "Top-5 %": f"{result.top5:.2f}",
            "loss": f"{result.loss:.4f}",
            "images/s": None if result.images_per_s is None else f"{result.images_per_s:.1f}",
            "memory MiB": None if result.memory_mib is None else f"{result.memory_mib:.1f}",
            "multiply-adds M": f"{result.macs_per_image / 1e6:.1f}",
        }
        for name, result in zip(names, evaluation.results, strict=True)
    ]
    if len(rows) == 1:
        del rows[0]["difference to *"]
    sides = ["left", *["right"] * (len(rows[0]) - 1)]
    shown = tabulate(rows, headers="keys", missingval="-", disable_numparse=True, colalign=sides)
    return "\n".join([shown, "", *_notes(evaluation)])


def values(evaluation: Evaluation) -> dict[str, Any]:
    """Return everything as plain values: Top-1 and Top-5 in percent, differences in points, removed in tokens."""
    request = evaluation.request
    trained = request.trained
    return {
        "checkpoint": request.path,
        "source": trained.source,
        "model": None if trained.config is None else trained.config.model.name,
        "data": request.images.name,
        "own_data": request.images.own,
        "images": evaluation.images,
        "classes": trained.class_names,
        "interrupted": evaluation.interrupted,
        "image_size": trained.image_size,
        "patches": trained.model.num_patches,
        "batch_size": request.batch_size,
        "precision": "fp32" if request.autocast is None else str(request.autocast).removeprefix("torch."),
        "results": [
            {
                "label": name,
                **asdict(replace(result.variant.fusion, budget=result.variant.removed)),
                "schedule": result.variant.schedule,
                "own": result.variant.own,
                "removed": result.variant.removed,
                **_flat({key: value for key, value in asdict(result).items() if key != "variant"}),
            }
            for name, result in zip(label_variants(request.variants), evaluation.results, strict=True)
        ],
        "provenance": _provenance(evaluation),
    }


def as_json(evaluation: Evaluation) -> str:
    """Return `values` as JSON."""
    return json.dumps(values(evaluation), indent=2)


def write(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Write evaluate.csv, evaluate.json, evaluate.svg and evaluate.png; return the files."""
    found = values(evaluation)
    rows = [
        {key: " ".join(map(str, value)) if isinstance(value, list | tuple) else value for key, value in row.items()}
        for row in found["results"]
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files = [folder / f"{_STEM}.csv", folder / f"{_STEM}.json"]
    for file, content in zip(files, (text.getvalue(), as_json(evaluation) + "\n"), strict=True):
        write_whole(file, lambda path, content=content: Path(path).write_text(content))  # type: ignore[misc]
    with drawing():
        return files + save(plot(evaluation), folder, _STEM)


def plot(evaluation: Evaluation) -> Figure:
    """Draw Top-1 with its intervals, throughput and memory over tokens removed, a curve for each way of fusing."""
    panels: list[tuple[str, Callable[[Result], float | None]]] = [
        ("Top-1, %", lambda result: result.top1),
        ("images per second", lambda result: result.images_per_s),
        ("memory of a batch, MiB", lambda result: result.memory_mib),
    ]
    known = [panel for panel in panels if any(panel[1](result) is not None for result in evaluation.results)]
    figure = Figure(figsize=(0.6 + 3.2 * len(known), 3.5), layout="constrained")
    for place, (title, value) in enumerate(known):
        axes = figure.add_subplot(1, len(known), place + 1)
        _curves(axes, evaluation, value)
        if not place:
            _bars(axes, evaluation.results)
        axes.set_ylabel(title)
        axes.set_xlabel(f"tokens removed, of {evaluation.request.trained.model.num_patches} patches")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(visible=True)
        patches = evaluation.request.trained.model.num_patches
        axes.set_xlim(-0.05 * patches, patches)
        if place:
            # Only from zero on does height say how much is saved.
            axes.set_ylim(0, 1.12 * max(filter(None, map(value, evaluation.results)), default=1.0))
    handles, names = figure.axes[0].get_legend_handles_labels()
    # A line's sample and its name, in inches.
    entry = 0.7 + 0.085 * max(map(len, names))
    columns = max(1, min(len(names), int(figure.get_figwidth() / entry)))
    figure.legend(handles, names, loc="outside lower center", ncols=columns, handlelength=3)
    figure.suptitle(_title(evaluation), fontsize=9, color=INK)
    return figure


def _curves(axes: Axes, evaluation: Evaluation, value: Callable[[Result], float | None]) -> None:
    """A line for each strategy and way, from the network without fusion on."""
    unfused = [result for result in evaluation.results if not result.variant.removed][:1]
    lines = _lines(evaluation.results)
    for (name, results), style in zip(lines, looks(_told_apart(lines)), strict=True):
        points = sorted([*unfused, *results], key=lambda result: result.variant.removed)
        points = list({result.variant.removed: result for result in points}.values())
        known = [(result.variant.removed, found) for result in points if (found := value(result)) is not None]
        if not known:
            continue
        x, y = zip(*known, strict=True)
        # Where lines begin together, the mark is that of the network without fusion.
        marked = [place for place, removed in enumerate(x) if removed or results == unfused]
        is_full = style.face == style.color
        axes.plot(
            x,
            y,
            linestyle=style.line if len(x) > 1 else "none",
            color=style.color,
            marker=style.marker,
            markevery=marked,
            markersize=6,
            markerfacecolor=style.face,
            markeredgecolor="white" if is_full else style.color,
            markeredgewidth=0.6 if is_full else 1.4,
            label=name,
        )
    for result in evaluation.results:
        found = value(result)
        if result.variant.own and found is not None:
            ring: dict[str, Any] = {"marker": "o", "markersize": 13, "markerfacecolor": "none", "markeredgecolor": INK}
            axes.plot(result.variant.removed, found, linestyle="none", label="as trained", zorder=5, **ring)
    axes.margins(y=0.12)


def _told_apart(lines: Sequence[tuple[str, list[Result]]]) -> list[str]:
    """What lines take their looks by: their strategy; where there is but one, the ways that it is compared in."""
    strategies = [results[0].variant.fusion.strategy for _, results in lines]
    if len({name for name in strategies if name != "none"}) > 1:
        return strategies
    return [
        strategy if strategies.index(strategy) == place else name
        for place, ((name, _), strategy) in enumerate(zip(lines, strategies, strict=True))
    ]


def _bars(axes: Axes, results: Sequence[Result]) -> None:
    """The 95 % interval of each Top-1."""
    low, high = zip(*(result.top1_interval for result in results), strict=True)
    removed = [result.variant.removed for result in results]
    axes.vlines(removed, low, high, colors=FAINT, linewidth=0.8, zorder=1, label="95 % interval over images")


def _lines(results: Sequence[Result]) -> list[tuple[str, list[Result]]]:
    """Results that differ in their budget alone belong to one line."""
    found: dict[Fusion, list[Result]] = {}
    for result in results:
        found.setdefault(replace(result.variant.fusion, budget=0), []).append(result)
    firsts = labels(list(found), ignore=["budget"])
    return list(zip(firsts, found.values(), strict=True))


def _title(evaluation: Evaluation) -> str:
    request = evaluation.request
    return f"{request.images.name}, {evaluation.images:,} test images, {request.batch_size} at once"


def _notes(evaluation: Evaluation) -> list[str]:
    request = evaluation.request
    trained = request.trained
    notes = [f"* as trained, by {trained.source}."]
    if len(evaluation.results) > 1:
        notes.append(
            "Difference: Top-1 minus that of *, in points, on the same images, with its 95 % interval (paired; Agresti "
            "and Min 2005). The interval of Top-1 alone is Wilson's. Both are over test images: another training would "
            "differ too."
        )
    notes += [
        f"On {evaluation.images:,} test images of {request.images.name} at {trained.image_size} x "
        f"{trained.image_size}, {request.batch_size} at once on {request.device.type}. images/s is the median over "
        "batches, each taken by all in turn.",
    ]
    if any(result.memory_mib is not None for result in evaluation.results):
        measured = "torch's allocator" if request.device.type == "cuda" else "a process's resident memory"
        notes.append(f"Memory is what the inference of a batch adds to the weights and images, by {measured}.")
    if not request.images.own:
        notes.append(f"{request.images.name} is not named by the run: its labels have to mean what the run's meant.")
    if evaluation.interrupted:
        notes.append("Interrupted: these are the first images of those asked for.")
    return notes


def _difference(result: Result) -> str | None:
    if result.difference is None or result.difference_interval is None:
        return None
    low, high = map(signed, result.difference_interval)
    return f"{signed(result.difference)} ({low} to {high})"


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Intervals as two numbers each."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key.endswith("_interval"):
            start = key.removesuffix("_interval")
            found[f"{start}_low95"], found[f"{start}_high95"] = (None, None) if value is None else value
        else:
            found[key] = value
    return found


def _provenance(evaluation: Evaluation) -> dict[str, Any]:
    request = evaluation.request
    config = request.trained.config
    with request.chosen_backend():
        seed = -1 if config is None else config.seed
        found = provenance(request.device, seed, 1, *([] if request.autocast is None else [request.autocast]))
    if config is None:
        found["seed"] = None
    return found
