"""What `famba evaluate` shows: a table, files, and curves of accuracy, throughput and memory over the budget."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tabulate import tabulate

from famba.analysis.evaluation.evaluate import Evaluation, Result
from famba.analysis.figures import INK, drawing, save
from famba.analysis.palette import look
from famba.analysis.variants import labels
from famba.files import write_whole
from famba.training.provenance import provenance

_STEM = "evaluate"


def table(evaluation: Evaluation) -> str:
    """Return a line for each way of fusing, and what it was evaluated on, as text."""
    request = evaluation.request
    patches = request.trained.model.num_patches
    names = labels(request.variants)
    rows = [
        {
            "fusion": f"{name} *" if result.variant.own else name,
            "removed": f"{result.variant.removed} of {patches}",
            "tokens left": result.tokens_per_layer[-1],
            "Top-1 %": f"{result.top1:.2f}",
            "Top-5 %": f"{result.top5:.2f}",
            "loss": f"{result.loss:.4f}",
            "images/s": None if result.images_per_s is None else f"{result.images_per_s:.1f}",
            "memory MiB": None if result.memory_mib is None else f"{result.memory_mib:.1f}",
            "multiply-adds M": f"{result.macs_per_image / 1e6:.1f}",
        }
        for name, result in zip(names, evaluation.results, strict=True)
    ]
    return "\n".join(
        [
            tabulate(rows, headers="keys", missingval="-", disable_numparse=True, colalign=["left", *["right"] * 8]),
            "",
            *_notes(evaluation),
        ]
    )


def values(evaluation: Evaluation) -> dict[str, Any]:
    """Return everything as plain values; Top-1 and Top-5 are percent, removed counts tokens."""
    request = evaluation.request
    trained = request.trained
    return {
        "checkpoint": request.path,
        "source": trained.source,
        "model": None if trained.config is None else trained.config.model.name,
        "data": request.images.name,
        "own_data": request.images.own,
        "images": evaluation.images,
        "interrupted": evaluation.interrupted,
        "image_size": trained.image_size,
        "patches": trained.model.num_patches,
        "batch_size": request.batch_size,
        "precision": "fp32" if request.autocast is None else str(request.autocast).removeprefix("torch."),
        "results": [
            {
                "label": name,
                **asdict(result.variant),
                "removed": result.variant.removed,
                **{key: value for key, value in asdict(result).items() if key != "variant"},
            }
            for name, result in zip(labels(request.variants), evaluation.results, strict=True)
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
    """Draw Top-1, throughput and memory over tokens removed, a curve for each way of fusing."""
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
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 2 * len(known)), handlelength=3)
    figure.suptitle(_title(evaluation), fontsize=9, color=INK)
    return figure


def _curves(axes: Axes, evaluation: Evaluation, value: Callable[[Result], float | None]) -> None:
    """A line for each strategy and way, from the unfused network where that was evaluated too."""
    seen: set[str] = set()
    unfused = [result for result in evaluation.results if not result.variant.removed][:1]
    for index, (name, results) in enumerate(_lines(evaluation.results)):
        style = look(results[0].variant.strategy, index)
        points = sorted([*unfused, *results], key=lambda result: result.variant.removed)
        known = [(result.variant.removed, found) for result in points if (found := value(result)) is not None]
        if known:
            x, y = zip(*known, strict=True)
            # A strategy's second way of fusing has its colour and marker, hollow.
            again = results[0].variant.strategy in seen
            mark: dict[str, Any] = {"markersize": 6, "markeredgewidth": 1.4 if again else 0.6}
            mark |= {
                "markerfacecolor": "white" if again else style.color,
                "markeredgecolor": style.color if again else "white",
            }
            axes.plot(x, y, linestyle=style.line, color=style.color, marker=style.marker, label=name, **mark)
        seen.add(results[0].variant.strategy)
    for result in evaluation.results:
        found = value(result)
        if result.variant.own and found is not None:
            ring: dict[str, Any] = {"marker": "o", "markersize": 13, "markerfacecolor": "none", "markeredgecolor": INK}
            axes.plot(result.variant.removed, found, linestyle="none", label="as trained", zorder=5, **ring)
    axes.margins(y=0.12)


def _lines(results: Sequence[Result]) -> list[tuple[str, list[Result]]]:
    """Results that differ in their budget alone belong to one line."""
    found: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        variant = result.variant
        found.setdefault((variant.strategy, variant.order, variant.weighting, variant.place), []).append(result)
    firsts = labels([line[0].variant for line in found.values()])
    return list(zip(firsts, found.values(), strict=True))


def _title(evaluation: Evaluation) -> str:
    request = evaluation.request
    return f"{request.images.name}, {evaluation.images:,} test images, {request.batch_size} at once"


def _notes(evaluation: Evaluation) -> list[str]:
    request = evaluation.request
    trained = request.trained
    notes = [
        f"* as trained, by {trained.source}.",
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


def _provenance(evaluation: Evaluation) -> dict[str, Any]:
    request = evaluation.request
    config = request.trained.config
    with request.chosen_backend():
        seed = -1 if config is None else config.seed
        found = provenance(request.device, seed, 1, *([] if request.autocast is None else [request.autocast]))
    if config is None:
        found["seed"] = None
    return found
