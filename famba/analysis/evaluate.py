"""Define the options of `famba evaluate`, and show what was measured: a table, files, and curves over the budget."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tabulate import tabulate

from famba.analysis.evaluation import Evaluation, check, evaluate
from famba.analysis.figures import FAINT, INK, drawing, looks, rendered
from famba.analysis.options import CHECKPOINT, add_fusion_options, chosen_backend, prepare_folder, write_files
from famba.fusion import Fusion, labels
from famba.fusion.schedules import NONE
from famba.training.logging import signed
from famba.training.provenance import provenance

_Row = dict[str, Any]
_PANELS = {"top1": "Top-1, %", "images_per_s": "images per second", "memory_mib": "memory of a batch, MiB"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `famba evaluate`."""
    parser.description = (
        "Evaluate a trained model on test images: Top-1, Top-5 and loss, throughput, memory and multiply-adds, with "
        "the schedule that it was trained with and with others. All of them see the same images, taking each batch in "
        "turn. Top-1 has 95 % intervals over test images: its own, and that of the paired difference to the model as "
        "it was trained."
    )
    parser.epilog = "example: famba evaluate runs/mine --fusion all,upper --budget 0.2,0.4,0.6,0.8 --out curves"
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help=CHECKPOINT)
    add("--data", metavar="NAME", help="a choice or a name as in training (default: the run's own)")
    add("--data-root", metavar="DIR", help="folder that holds the data (default: the run's own)")
    add("--subset", type=int, metavar="N", help="N test images, spread evenly over all")
    add_fusion_options(
        parser,
        "the schedule that the model was trained with is always evaluated, and beside any other the model without "
        "fusion, from which curves over budgets begin",
    )
    add("--batch-size", type=int, metavar="N", help="images at once (default: as the run's)")
    add("--backend", metavar="NAME", help="what computes the ops (default: as the run's)")
    add("--precision", metavar="NAME", help="auto, fp32, bf16 or fp16 (default: as the run's)")
    add("--device", default="auto", metavar="NAME", help="auto (default), cpu, cuda or mps")
    add("--out", metavar="FOLDER", help="write evaluate.csv, evaluate.json and plots there")
    add("--json", action="store_true", help="print evaluate.json instead of a table")


def run(options: argparse.Namespace) -> int:
    """Evaluate, and return the exit status."""
    request = check(options)
    folder = None if options.out is None else prepare_folder(options.out)
    found = evaluate(request)
    print(as_json(found) if options.json else table(found))
    if folder is not None:
        with drawing():
            figure = plot(found)
            files = {f"evaluate.{kind}": rendered(figure, kind) for kind in ("svg", "png")}
        files |= {"evaluate.csv": as_csv(found).encode(), "evaluate.json": f"{as_json(found)}\n".encode()}
        print(f"in {folder}: {', '.join(file.name for file in write_files(folder, files))}", file=sys.stderr)
    return 130 if found.interrupted else 0


def table(evaluation: Evaluation) -> str:
    """Return a line for each way of fusing, and what it was evaluated on, as text."""
    patches = evaluation.request.trained.model.num_patches
    rows = [
        {
            "fusion": f"{row['label']} *" if row["own"] else row["label"],
            "removed": f"{row['removed']} of {patches}",
            "Top-1 %": f"{row['top1']:.2f}",
            "95 % interval": f"{row['top1_low95']:.2f} to {row['top1_high95']:.2f}",
            "difference to *": _difference(row),
            "Top-5 %": f"{row['top5']:.2f}",
            "loss": f"{row['loss']:.4f}",
            "images/s": f"{row['images_per_s']:.1f}",
            "memory MiB": None if row["memory_mib"] is None else f"{row['memory_mib']:.1f}",
            "multiply-adds M": f"{row['macs_per_image'] / 1e6:.1f}",
        }
        for row in evaluation.rows
    ]
    if len(rows) == 1:
        del rows[0]["difference to *"]
    sides = ["left", *["right"] * (len(rows[0]) - 1)]
    shown = tabulate(rows, headers="keys", missingval="-", disable_numparse=True, colalign=sides)
    return "\n".join([shown, "", *_notes(evaluation)])


def _difference(row: _Row) -> str | None:
    if row["difference"] is None:
        return None
    return "{} ({} to {})".format(*(signed(row[f"difference{end}"]) for end in ("", "_low95", "_high95")))


def _notes(evaluation: Evaluation) -> list[str]:
    request, trained = evaluation.request, evaluation.request.trained
    several = len(evaluation.rows) > 1
    measured = "torch's allocator" if request.device.type == "cuda" else "a process's resident memory"
    notes = {
        f"* as trained, by {trained.source}.": True,
        "Difference: Top-1 minus that of *, in points, on the same images, with its 95 % interval (paired; Agresti and "
        "Min 2005). The interval of Top-1 alone is Wilson's. Both are over test images: another training would differ "
        "too.": several,
        f"On {evaluation.images:,} test images of {request.images.name} at {trained.image_size} x "
        f"{trained.image_size}, {request.batch_size} at once on {request.device.type}. images/s is the median over "
        "batches, each taken by all in turn.": True,
        f"Memory is what the inference of a batch adds to the weights and images, by {measured}.":
            any(row["memory_mib"] is not None for row in evaluation.rows),
        f"{request.images.name} is not named by the run: its labels have to mean what the run's meant.":
            not request.images.own,
        "Interrupted: these are the first images of those asked for.": evaluation.interrupted,
    }  # fmt: skip
    return [note for note, holds in notes.items() if holds]


def as_json(evaluation: Evaluation) -> str:
    """Return everything as JSON: Top-1 and Top-5 in percent, differences in points, removed in tokens."""
    request, trained = evaluation.request, evaluation.request.trained
    config, dtypes = trained.config, [] if request.autocast is None else [request.autocast]
    with chosen_backend(request.backend):
        origin = provenance(request.device, -1 if config is None else config.seed, 1, *dtypes)
    values = {
        "checkpoint": request.path,
        "source": trained.source,
        "model": None if config is None else config.model.name,
        "data": request.images.name,
        "own_data": request.images.own,
        "images": evaluation.images,
        "classes": trained.class_names,
        "interrupted": evaluation.interrupted,
        "image_size": trained.image_size,
        "patches": trained.model.num_patches,
        "batch_size": request.batch_size,
        "precision": str(dtypes[0]).removeprefix("torch.") if dtypes else "fp32",
        "results": evaluation.rows,
        "provenance": origin | ({"seed": None} if config is None else {}),
    }
    return json.dumps(values, indent=2)


def as_csv(evaluation: Evaluation) -> str:
    """Return the rows as CSV, lists with spaces between their items."""
    rows = pd.DataFrame(evaluation.rows, dtype=object)
    rows = rows.map(lambda cell: " ".join(map(str, cell)) if isinstance(cell, list | tuple) else cell)
    return rows.to_csv(index=False, lineterminator="\n")


def plot(evaluation: Evaluation) -> Figure:
    """Draw Top-1 with its intervals, throughput and memory over tokens removed, a curve for each way of fusing."""
    request, rows = evaluation.request, evaluation.rows
    patches, lines = request.trained.model.num_patches, _lines(evaluation)
    panels = [key for key in _PANELS if any(row[key] is not None for row in rows)]
    figure = Figure(figsize=(0.6 + 3.2 * len(panels), 3.5), layout="constrained")
    for place, key in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), place + 1)
        _curves(axes, rows, lines, key)
        axes.set(xlabel=f"tokens removed, of {patches} patches", ylabel=_PANELS[key], xlim=(-0.05 * patches, patches))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(visible=True)
        if place:
            # Only from zero on does height say how much is saved.
            axes.set_ylim(0, 1.12 * max((row[key] for row in rows if row[key]), default=1.0))
            continue
        removed, low, high = ([row[name] for row in rows] for name in ("removed", "top1_low95", "top1_high95"))
        axes.vlines(removed, low, high, colors=FAINT, linewidth=0.8, zorder=1, label="95 % interval over images")
    handles, names = figure.axes[0].get_legend_handles_labels()
    # A line's sample and its name, in inches.
    entry = 0.7 + 0.085 * max(map(len, names))
    columns = max(1, min(len(names), int(figure.get_figwidth() / entry)))
    figure.legend(handles, names, loc="outside lower center", ncols=columns, handlelength=3)
    title = f"{request.images.name}, {evaluation.images:,} test images, {request.batch_size} at once"
    figure.suptitle(title, fontsize=9, color=INK)
    return figure


def _lines(evaluation: Evaluation) -> dict[str, list[_Row]]:
    """Return the rows of each line by its name: those that differ in their budget alone."""
    found: dict[Fusion, list[_Row]] = {}
    for variant, row in zip(evaluation.request.variants, evaluation.rows, strict=True):
        found.setdefault(replace(variant.fusion, budget=0), []).append(row)
    return dict(zip(labels(list(found), ignore=["budget"]), found.values(), strict=True))


def _curves(axes: Axes, rows: list[_Row], lines: dict[str, list[_Row]], key: str) -> None:
    """Draw a line for each strategy and way, from the network without fusion on."""
    unfused = [row for row in rows if not row["removed"]][:1]
    strategies = [own[0]["strategy"] for own in lines.values()]
    if len({*strategies} - {NONE}) == 1:  # then the ways of this strategy are told apart by their looks
        strategies = [
            strategy if strategies.index(strategy) == place else name
            for place, (name, strategy) in enumerate(zip(lines, strategies, strict=True))
        ]
    for (name, own), style in zip(lines.items(), looks(strategies), strict=True):
        points = {row["removed"]: row[key] for row in [*unfused, *own] if row[key] is not None}
        if not points:
            continue
        x = sorted(points)
        # Where lines begin together, the mark is that of the network without fusion.
        marked = [place for place, removed in enumerate(x) if removed or own == unfused]
        is_full = style.face == style.color
        edge: dict[str, Any] = {
            "markeredgecolor": "white" if is_full else style.color,
            "markeredgewidth": 0.6 if is_full else 1.4,
        }
        line = style.line if len(x) > 1 else "none"
        axes.plot(x, [points[at] for at in x], **style.marked(6), **edge, markevery=marked, linestyle=line, label=name)
    for row in rows:
        if row["own"] and row[key] is not None:
            ring: dict[str, Any] = {"marker": "o", "markersize": 13, "markerfacecolor": "none", "markeredgecolor": INK}
            axes.plot(row["removed"], row[key], linestyle="none", label="as trained", zorder=5, **ring)
    axes.margins(y=0.12)
