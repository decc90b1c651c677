"""Measure accuracy, throughput and multiply-adds of a trained network that fuses in several ways: `famba evaluate`.

The schedule that it was trained with and others take the same test images in turn. Top-1 and its paired difference to
the network as it was trained have 95 % intervals over test images.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import binomtest, norm
from torch import Tensor
from tqdm import tqdm

from famba import data
from famba.analysis import options as shared
from famba.analysis.figures import confusion_matrix
from famba.analysis.options import Variant, label_variants, own, unfused, variants
from famba.analysis.report import difference as written
from famba.analysis.report import tabulated
from famba.analysis.trained import Trained, load_trained
from famba.data.augment import evaluation_scaling
from famba.errors import ConfigError, FambaError, TrainingError, check_choice, named, some
from famba.fusion import Fusion, tokens_per_layer
from famba.models import Backbone
from famba.training.config import RunConfig
from famba.training.devices import choose_precision, loading_workers, out_of_memory, synchronize
from famba.training.interrupts import StopRequest
from famba.training.measure import Tally, macs_per_image, provenance


@dataclass(frozen=True)
class Request:
    """Hold an evaluation that can begin, of a network and others beside it on the same images.

    variants: first the one that it was trained with, to which others are compared. rule: the first of several that were
    asked for, to which others are compared too. source: the test images, with the class numbers of the training.
    """

    trained: Trained
    beside: tuple[Trained, ...]
    variants: tuple[Variant, ...]
    rule: str | None
    config: RunConfig
    source: data.Source
    batch_size: int
    device: torch.device
    autocast: torch.dtype | None

    @torch.no_grad()
    def infer(self, model: Backbone, variant: Variant, images: Tensor) -> Tensor:
        """Return the logits (b, classes) of images (b, 3, s, s) on the device, in the precision that was asked for."""
        variant.put_into(model)
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            logits: Tensor = model(images)
        return logits


@dataclass(frozen=True)
class Evaluation:
    """Hold a row for each variant, as evaluate.json has them, of so many images; of fewer than asked if interrupted.

    Top-1, Top-5 in percent, differences in points: difference of Top-1 to the first row, difference_to_first to the row
    with the first rule and all else equal; None without one. images_per_s: median over batches. ranked: of the first
    row, for each image its class and the one that it was taken for (2, n).
    """

    request: Request
    rows: list[dict[str, Any]]
    images: int
    interrupted: bool
    ranked: Tensor


def check(options: argparse.Namespace) -> Request:
    """Load the network, open the images, and check all that is asked. Raises FambaError for what cannot work."""
    asked = shared.read_fusion(options)
    device = shared.device(options.device)
    if options.precision is not None:
        check_choice("--precision", options.precision, ("auto", "fp32", "bf16", "fp16"))
    trained = load_trained(options.checkpoint)
    if (config := trained.config) is None:
        raise ConfigError(f"{trained.source} has no data set to evaluate on; give a run or a checkpoint of one")
    first, found = own(trained), variants(trained, asked)
    if any(one != first for one in found):
        found = [unfused(trained), *found]
    try:
        autocast = choose_precision(options.precision or config.trainer.precision, device)
    except FambaError as error:
        raise ConfigError(str(error).replace("trainer.precision=", "--precision ")) from error
    compared, rules = tuple(dict.fromkeys([first, *found])), asked.get("rule", [])
    size = options.batch_size or config.trainer.batch_size // config.trainer.accumulation
    # Commas also stand in the names of a sweep's folders.
    parts = (path for given in options.beside for path in ([given] if Path(given).exists() else given.split(",")))
    beside = tuple(_beside(trained, path.strip()) for path in parts)
    rule = rules[0] if len(rules) > 1 else None
    source = _source(trained, config, options.data_root, options.subset)
    return Request(trained, beside, compared, rule, config, source, size, device, autocast)


def _source(trained: Trained, config: RunConfig, other_root: str | None, subset: int | None) -> data.Source:
    """Return the test images, with the class numbers of the network's training; other_root: None for the run's own."""
    name, root, reading = config.data.name, other_root or config.data.root, trained.reading
    whole: dict[str, Any] = {"subset": None, "val_fraction": 0.0, "num_classes": config.data.num_classes}
    with named({"root": "--data-root" if other_root else "the run's data.root (--data-root names another)"}):
        data.check_folder(name, root, reading.version)
        splits = data.load_splits(name, root, **whole, **asdict(reading))
    test = _numbered_as_trained(trained, splits)
    if subset is None:
        return test
    if subset > len(test):
        raise ConfigError(f"--subset is {subset}; allowed: 1 to {len(test)}, the test images of {name}")
    return data.sample(test, subset, reading.version)


def _beside(trained: Trained, path: str) -> Trained:
    """Load a network to evaluate beside another. Raises ConfigError where it reads images or classes otherwise."""
    other = load_trained(path)
    names = ("image_size", "mean", "std", "classes", "class_names", "reading")
    differing = [name for name in names if getattr(other, name) != getattr(trained, name)]
    ours, theirs = (evaluation_scaling(one.scaling, one.image_size) for one in (trained, other))
    differing += ["recipe.eval_crop or recipe.interpolation"] if ours != theirs else []
    if differing:
        told = f"it differs in {', '.join(differing)}; give networks that were trained for the same images"
        raise ConfigError(f"--beside {path} cannot be compared with {trained.source}: {told}")
    return other


@dataclass
class _Contestant:
    """Collect the results of one variant. pairs: for each batch the labels and the classes ranked first (2, b)."""

    label: str
    model: Backbone
    variant: Variant
    tally: Tally
    times: list[tuple[int, float]] = field(default_factory=list)
    pairs: list[Tensor] = field(default_factory=list)

    def add(self, logits: Tensor, labels: Tensor, seconds: float) -> None:
        """Count a batch: logits (b, classes), labels (b,)."""
        self.tally.add(logits, labels)
        self.times.append((len(labels), seconds))
        # Ranked as Tally does.
        best = logits.float().topk(min(5, logits.shape[1]), dim=1).indices[:, 0]
        self.pairs.append(torch.stack([labels, best]).cpu())

    @property
    def right(self) -> Tensor:
        """Return which images have their label ranked first (n,)."""
        return torch.eq(*torch.cat(self.pairs, dim=1))

    @property
    def way(self) -> tuple[Any, ...]:
        """Return all that says how it fuses but the rule, so that those with equal ways differ in their rules alone."""
        fusion = self.variant.fusion
        return self.model, self.variant.removed, replace(fusion, rule=Fusion.rule, guard=0, budget=0, layers=None)

    def row(self, trained: Tensor, same_way: Tensor | None) -> dict[str, Any]:
        """Return a row, with differences to what the trained variant and another rule get right (n,)."""
        variant, right, known = self.variant, self.right, self.tally.results()
        variant.put_into(self.model)
        low, high = binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
        full = max(images for images, _ in self.times)  # the last batch may be smaller, and less of a load
        return {
            "label": self.label,
            **asdict(replace(variant.fusion, budget=variant.removed)),
            "schedule": variant.schedule,
            "own": variant.own,
            "removed": variant.removed,
            "patches": self.model.num_patches,
            "tokens_per_layer": tokens_per_layer(variant.schedule, self.model.num_tokens),
            "top1": known["top1"],
            "top1_low95": 100 * low,
            "top1_high95": 100 * high,
            **difference("difference", right, None if variant.own else trained),
            **difference("difference_to_first", right, same_way),
            "top5": known["top5"],
            "loss": known["loss"],
            "images_per_s": statistics.median(n / seconds for n, seconds in self.times if n == full),
            "macs_per_image": macs_per_image(self.model, self.model.image_size[0]),
        }


def evaluate(request: Request) -> Evaluation:
    """Evaluate as asked; a Ctrl-C ends it after the batch that has begun, and keeps what is known by then.

    Raises ConfigError or DataError for images that do not fit or are damaged, TrainingError for too little memory.
    """
    labels = label_variants(request.variants) + [f"{one.fusion.strategy}, {one.source}" for one in request.beside]
    asked = [(request.trained, variant) for variant in request.variants]
    asked += [(other, replace(own(other), own=False)) for other in request.beside]
    contestants = [
        _Contestant(label, trained.model.to(request.device), variant, Tally(request.device))
        for label, (trained, variant) in zip(labels, asked, strict=True)
    ]
    try:
        interrupted = _race(request, contestants)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise TrainingError(f"out of memory with {request.batch_size} images at once; less: --batch-size") from error
    first = contestants[0]
    others = {one.way: one for one in contestants if one.variant.fusion.rule == request.rule}
    pairs = [(one, others.get(one.way, one)) for one in contestants]
    rows = [one.row(first.right, None if other is one else other.right) for one, other in pairs]
    return Evaluation(request, rows, len(first.right), interrupted, torch.cat(first.pairs, dim=1))


def difference(name: str, right: Tensor, base: Tensor | None) -> dict[str, float | None]:
    """Return the difference in Top-1, in points, and the ends of its interval, of which images are right (n,)."""
    found: tuple[float | None, ...] = (None,) * 3
    if base is not None:
        gained, lost = int((right & ~base).sum()), int((base & ~right).sum())
        found = 100 * (gained - lost) / len(right), *of_difference(gained, lost, len(right))
    return dict(zip((name, f"{name}_low95", f"{name}_high95"), found, strict=True))


def of_difference(gained: int, lost: int, images: int) -> tuple[float, float]:
    """Return the 95 % interval of a paired difference in Top-1, in points, over test images of the same kind.

    By Agresti and Min (Statistics in Medicine 24, 2005): Wald's interval after half an image more in each of the four
    cells, so that two networks that never differ are not said to be equal beyond doubt. gained: images that this
    network alone gets right; lost: those that the other alone does.
    """
    gained_more, lost_more, total = gained + 0.5, lost + 0.5, images + 2
    middle = (gained_more - lost_more) / total
    half = norm.ppf(0.975) * (gained_more + lost_more - (gained_more - lost_more) ** 2 / total) ** 0.5 / total
    return 100 * max(-1.0, middle - half), 100 * min(1.0, middle + half)


def _race(request: Request, contestants: list[_Contestant]) -> bool:
    """Let contestants take each batch in turn; return whether it was cut short."""
    done, device, trained, source = 0, request.device, request.trained, request.source
    workers = loading_workers(request.config.data.workers)
    loading = data.Loading(trained.image_size, trained.mean, trained.std, workers=workers)
    batches = data.eval_batches(source, trained.scaling, loading, request.batch_size)
    with StopRequest() as stop, tqdm(total=len(source), unit="image", file=sys.stderr, leave=False) as bar:
        for batch in batches:
            images, classes = (part.to(device) for part in batch)
            for one in contestants if not done else ():  # what is compiled, tuned or allocated once
                request.infer(one.model, one.variant, images)
            for one in contestants:
                synchronize(device)
                began = time.perf_counter()
                logits = request.infer(one.model, one.variant, images)
                synchronize(device)
                one.add(logits, classes, time.perf_counter() - began)
            done += len(classes)
            bar.update(len(classes))
            if stop.number:
                break
    return done < len(source)


def _numbered_as_trained(trained: Trained, splits: data.Splits) -> data.Source:
    """Return the test images with the class numbers of the network's training; by name where names are known.

    Raises ConfigError where they have a class that the network was not trained on.
    """
    test, known, found = splits.test, trained.class_names, splits.classes
    if known is None or found is None:
        if test.num_classes > trained.classes:
            raise ConfigError(f"the images have {test.num_classes} classes, but the network knows {trained.classes}")
        return test
    if strange := [name for name in found if name not in set(known)]:
        raise ConfigError(
            f"the images have classes that the network was not trained on: {some(strange)}; it knows {some(known)}. "
            "Give images of its own classes, or train from its weights: python train.py init_from=WEIGHTS"
        )
    numbers = tuple(map(known.index, found))
    return test if numbers == tuple(range(len(found))) else data.renumber(test, numbers, trained.classes)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `famba evaluate`."""
    parser.description = __doc__
    parser.epilog = "example: famba evaluate runs/mine --fusion all,upper --budget 0.2,0.4,0.6,0.8 --out curves"
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help=shared.CHECKPOINT)
    add("--data-root", metavar="DIR", help="folder that holds the data (default: the run's own)")
    add("--subset", type=shared.count, metavar="N", help="N test images, spread evenly over all")
    shared.add_fusion_options(
        parser,
        "the schedule of the training is always evaluated; with any other, the model without fusion is too",
    )
    text = "other runs or weights, as they were trained, on the same images: such as a smaller network of the same cost"
    add("--beside", action="append", default=[], metavar="CHECKPOINT[,...]", help=text)
    add("--batch-size", type=shared.count, metavar="N", help="images at once (default: as the run's)")
    add("--precision", metavar="NAME", help="auto, fp32, bf16 or fp16 (default: as the run's)")
    add("--device", default="auto", metavar="NAME", help="auto (default), cpu, cuda or mps")
    add("--out", metavar="FOLDER", help="write evaluate.csv and evaluate.json there")
    text = "with --out: write the accuracy of each class and the confusion matrix too, of the schedule as trained"
    add("--per-class", action="store_true", help=text)


def run(options: argparse.Namespace) -> int:
    """Evaluate, and return the exit status."""
    if options.per_class and options.out is None:
        raise ConfigError("--per-class writes files; name a folder for them by --out FOLDER")
    folder = None if options.out is None else shared.prepare_folder(options.out)
    request = check(options)
    with shared.computing(request.trained, request.device, request.autocast or torch.float32):
        found = evaluate(request)
        files = {"evaluate.csv": as_csv(found), "evaluate.json": as_json(found)}
    print(table(found))
    if folder is not None:
        written = shared.write_files(folder, {**files, **(per_class(found) if options.per_class else {})})
        print(f"in {folder}: {', '.join(file.name for file in written)}", file=sys.stderr)
    return 130 if found.interrupted else 0


def table(evaluation: Evaluation) -> str:
    """Return a line for each way of fusing, and what it was evaluated on, as text."""
    request, trained, several = evaluation.request, evaluation.request.trained, len(evaluation.rows) > 1
    rows = [
        {
            "fusion": f"{row['label']} *" if row["own"] else row["label"],
            "removed": f"{row['removed']} of {row['patches']}",
            "Top-1 %": f"{row['top1']:.2f}",
            "95 % interval": f"{row['top1_low95']:.2f} to {row['top1_high95']:.2f}",
            **({"difference to *": written(row, "difference")} if several else {}),
            "Top-5 %": f"{row['top5']:.2f}",
            "loss": f"{row['loss']:.4f}",
            "images/s": f"{row['images_per_s']:.1f}",
            "multiply-adds M": f"{row['macs_per_image'] / 1e6:.1f}",
        }
        for row in evaluation.rows
    ]
    notes = {
        f"* as trained, by {trained.source}.": True,
        "Difference: Top-1 minus that of *, in points, on the same images, with its 95 % interval (paired; Agresti and "
        "Min 2005). The interval of Top-1 alone is Wilson's. Both cover the choice of test images alone: another "
        "training run would differ too.": several,
        f"On {evaluation.images:,} test images of {request.config.data.name} at {trained.image_size} x "
        f"{trained.image_size}, {request.batch_size} at once on {request.device.type}. images/s is the median over "
        "batches; all networks take each batch in turn.": True,
        "Interrupted: these are the first images of those asked for.": evaluation.interrupted,
    }
    return "\n".join([tabulated(pd.DataFrame(rows), "simple"), "", *(note for note, holds in notes.items() if holds)])


def as_json(evaluation: Evaluation) -> str:
    """Return everything as JSON: Top-1 and Top-5 in percent, differences in points, removed in tokens."""
    request, trained = evaluation.request, evaluation.request.trained
    values = {
        "source": trained.source,
        "model": request.config.model.name,
        "data": request.config.data.name,
        "images": evaluation.images,
        "classes": trained.class_names,
        "interrupted": evaluation.interrupted,
        "batch_size": request.batch_size,
        "precision": str(request.autocast or "fp32").removeprefix("torch."),
        "results": evaluation.rows,
        "provenance": provenance(request.device, request.config.seed, 1, request.autocast or torch.float32),
    }
    return json.dumps(values, indent=2) + "\n"


def as_csv(evaluation: Evaluation) -> str:
    """Return the rows as CSV, lists with spaces between their items."""
    rows = pd.DataFrame(evaluation.rows, dtype=object)
    rows = rows.map(lambda cell: " ".join(map(str, cell)) if isinstance(cell, list | tuple) else cell)
    return rows.to_csv(index=False, lineterminator="\n")


def per_class(evaluation: Evaluation) -> dict[str, str | bytes]:
    """Return files by name: accuracy by class, worst first, and the confusion matrix as a table and as a picture.

    Classes without images are left out of the first, and are rows of zeros in the second.
    """
    trained = evaluation.request.trained
    names = list(trained.class_names or map(str, range(trained.classes)))
    every = range(len(names))
    counts = pd.crosstab(*evaluation.ranked.numpy()).reindex(index=every, columns=every, fill_value=0)
    counts = counts.set_axis(pd.Index(names, name="true class")).set_axis(names, axis=1)
    images, right = counts.sum(axis=1), np.diag(counts)
    wrong = counts - np.diag(right)
    taken_for = wrong.idxmax(axis=1).where(wrong.max(axis=1) > 0, "")
    columns = {"images": images, "right": right, "top1": 100 * right / images, "most_often_taken_for": taken_for}
    table = pd.DataFrame(columns)[images > 0].sort_values(["top1", "images"], kind="stable")
    return {
        "per_class.csv": table.to_csv(index_label="class", lineterminator="\n"),
        "confusion.csv": counts.to_csv(lineterminator="\n"),
        "confusion.png": confusion_matrix(counts),
    }
