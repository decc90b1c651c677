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
from famba.analysis.figures import FAINT, INK, drawing, files, looks
from famba.analysis.options import CHECKPOINT, add_fusion_options, count, prepare_folder, write_files
from famba.fusion import Fusion, labels
from famba.training.logging import signed
from famba.training.provenance import provenance

_PANELS = {"top1": "Top-1, %", "images_per_s": "images per second"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `famba evaluate`."""
    parser.description = (
        "Evaluate a trained model on test images: Top-1, Top-5 and loss, throughput and multiply-adds, with the "
        "schedule that it was trained with and with others, on the same images in turn. Top-1 and its paired "
        "difference to the model as it was trained have 95 % intervals over test images."
    )
    parser.epilog = "example: famba evaluate runs/mine --fusion all,upper --budget 0.2,0.4,0.6,0.8 --out curves"
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help=CHECKPOINT)
    add("--data-root", metavar="DIR", help="folder that holds the data (default: the run's own)")
    add("--subset", type=count, metavar="N", help="N test images, spread evenly over all")
    add_fusion_options(
        parser,
        "the schedule that the model was trained with is always evaluated, and beside any other the model without "
        "fusion, from which curves over budgets begin",
    )
    add("--batch-size", type=count, metavar="N", help="images at once (default: as the run's)")
    add("--precision", metavar="NAME", help="auto, fp32, bf16 or fp16 (default: as the run's)")
    add("--device", default="auto", metavar="NAME", help="auto (default), cpu, cuda or mps")
    add("--out", metavar="FOLDER", help="write evaluate.csv, evaluate.json and plots there")


def run(options: argparse.Namespace) -> int:
    """Evaluate, and return the exit status."""
    request = check(options)
    folder = None if options.out is None else prepare_folder(options.out)
    found = evaluate(request)
    print(table(found))
    if folder is not None:
        with drawing():
            pictures = files("evaluate", plot(found))
        written = write_files(folder, {**pictures, "evaluate.csv": as_csv(found), "evaluate.json": as_json(found)})
        print(f"in {folder}: {', '.join(file.name for file in written)}", file=sys.stderr)
    return 130 if found.interrupted else 0


def table(evaluation: Evaluation) -> str:
    """Return a line for each way of fusing, and what it was evaluated on, as text."""
    patches, several = evaluation.request.trained.model.num_patches, len(evaluation.rows) > 1
    rows = [
        {
            "fusion": f"{row['label']} *" if row["own"] else row["label"],
            "removed": f"{row['removed']} of {patches}",
            "Top-1 %": f"{row['top1']:.2f}",
            "95 % interval": f"{row['top1_low95']:.2f} to {row['top1_high95']:.2f}",
            **({"difference to *": _difference(row)} if several else {}),
            "Top-5 %": f"{row['top5']:.2f}",
            "loss": f"{row['loss']:.4f}",
            "images/s": f"{row['images_per_s']:.1f}",
            "multiply-adds M": f"{row['macs_per_image'] / 1e6:.1f}",
        }
        for row in evaluation.rows
    ]
    sides = ["left", *["right"] * (len(rows[0]) - 1)]
    shown = tabulate(rows, headers="keys", missingval="-", disable_numparse=True, colalign=sides)
    request, trained = evaluation.request, evaluation.request.trained
    notes = {
        f"* as trained, by {trained.source}.": True,
        "Difference: Top-1 minus that of *, in points, on the same images, with its 95 % interval (paired; Agresti and "
        "Min 2005). The interval of Top-1 alone is Wilson's. Both are over test images: another training would differ "
        "too.": several,
        f"On {evaluation.images:,} test images of {request.config.data.name} at {trained.image_size} x "
        f"{trained.image_size}, {request.batch_size} at once on {request.device.type}. images/s is the median over "
        "batches, each taken by all in turn.": True,
        "Interrupted: these are the first images of those asked for.": evaluation.interrupted,
    }
    return "\n".join([shown, "", *(note for note, holds in notes.items() if holds)])


def _difference(row: dict[str, Any]) -> str | None:
    if row["difference"] is None:
        return None
    return "{} ({} to {})".format(*(signed(row[f"difference{end}"]) for end in ("", "_low95", "_high95")))


def as_json(evaluation: Evaluation) -> str:
    """Return everything as JSON: Top-1 and Top-5 in percent, differences in points, removed in tokens."""
    request, trained = evaluation.request, evaluation.request.trained
    dtypes = [] if request.autocast is None else [request.autocast]
    values = {
        "source": trained.source,
        "model": request.config.model.name,
        "data": request.config.data.name,
        "images": evaluation.images,
        "classes": trained.class_names,
        "interrupted": evaluation.interrupted,
        "image_size": trained.image_size,
        "patches": trained.model.num_patches,
        "batch_size": request.batch_size,
        "precision": str(request.autocast or "fp32").removeprefix("torch."),
        "results": evaluation.rows,
        "provenance": provenance(request.device, request.config.seed, 1, *dtypes),
    }
    return json.dumps(values, indent=2) + "\n"


def as_csv(evaluation: Evaluation) -> str:
    """Return the rows as CSV, lists with spaces between their items."""
    rows = pd.DataFrame(evaluation.rows, dtype=object)
    rows = rows.map(lambda cell: " ".join(map(str, cell)) if isinstance(cell, list | tuple) else cell)
    return rows.to_csv(index=False, lineterminator="\n")


def plot(evaluation: Evaluation) -> Figure:
    """Draw Top-1 with its intervals, and throughput, over tokens removed, a curve for each way of fusing."""
    request, rows = evaluation.request, pd.DataFrame(evaluation.rows)
    patches = request.trained.model.num_patches
    figure = Figure(figsize=(7.0, 3.9), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, 2), _PANELS.items(), strict=True):
        _curves(axes, evaluation, rows, key)
        axes.set(xlabel=f"tokens removed, of {patches} patches", ylabel=title, xlim=(-0.05 * patches, patches))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(visible=True)
        if key != "top1":  # only from zero on does height say how much is saved
            axes.set_ylim(0, 1.12 * rows[key].max())
        else:
            ends: dict[str, Any] = {
                "colors": FAINT,
                "linewidth": 0.8,
                "zorder": 1,
                "label": "95 % interval over images",
            }
            axes.vlines(rows["removed"], rows["top1_low95"], rows["top1_high95"], **ends)
    handles, names = figure.axes[0].get_legend_handles_labels()
    # A line's sample and its name, in inches.
    columns = max(1, min(len(names), int(figure.get_figwidth() / (0.7 + 0.085 * max(map(len, names))))))
    figure.legend(handles, names, loc="outside lower center", ncols=columns, handlelength=3)
    title = f"{request.config.data.name}, {evaluation.images:,} test images, {request.batch_size} at once"
    figure.suptitle(title, fontsize=9, color=INK)
    return figure


def _curves(axes: Axes, evaluation: Evaluation, rows: pd.DataFrame, key: str) -> None:
    """Draw a line for the rows that differ in their budget alone, from the network without fusion on."""
    ways: dict[Fusion, list[int]] = {}
    for place, variant in enumerate(evaluation.request.variants):
        ways.setdefault(replace(variant.fusion, budget=0), []).append(place)
    names = labels(list(ways), ignore=["budget"])
    for places, name, look in zip(ways.values(), names, looks([way.strategy for way in ways]), strict=True):
        unfused = rows.index[rows["removed"] == 0][:1]
        own = rows.loc[[*unfused, *places]].drop_duplicates("removed").sort_values("removed")
        axes.plot(own["removed"], own[key], **look.marked(6), linestyle=look.line, label=name)
    ring: dict[str, Any] = {"markersize": 13, "markerfacecolor": "none", "markeredgecolor": INK, "linestyle": "none"}
    own = rows[rows["own"]]
    axes.plot(own["removed"], own[key], marker="o", label="as trained", zorder=5, **ring)
    axes.margins(y=0.12)
