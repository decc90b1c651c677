"""`famba benchmark model`: steps of a Vim with each strategy against none, a transformer and its matrix products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from famba.analysis.benchmark.machine import DTYPES, PRECISIONS
from famba.analysis.benchmark.memory import Peak, step_peak
from famba.analysis.benchmark.peaks import Peaks
from famba.analysis.benchmark.products import Products, step_linears
from famba.analysis.benchmark.report import Report, Table
from famba.analysis.benchmark.steps import Step, Subject
from famba.analysis.benchmark.timing import Race, Times, ratio
from famba.analysis.benchmark.traffic import Passes, floor_ms, forward_and_step
from famba.fusion import tokens_per_layer
from famba.models import Backbone, Vim
from famba.training.measure import saved_bytes_per_image

TRANSFORMERS = {
    "vim_tiny_patch16_224": "deit_tiny_patch16_224",
    "vim_small_patch16_224": "deit_small_patch16_224",
}
"""Each Vim's counterpart, by their timm names."""
STRATEGIES = ("none", "all", "interleaved", "lower", "upper")
PRODUCTS = "matrix products of none"
_UNFUSED = "none"

_TIME_COLUMNS = {
    "model": "model",
    "precision": "precision",
    "contestant": "contestant",
    "token-layers": "token_layers",
    "step ms": "step_ms",
    "x none": "step_of_none",
    "x products": "step_of_products",
    "x DeiT": "step_of_transformer",
    "x floor": "step_of_floor",
    "of matmul peak": "step_of_peak",
    "images/s": "images_per_s",
    "inference ms": "inference_ms",
    "x none ": "inference_of_none",
    "x DeiT ": "inference_of_transformer",
    "x floor ": "inference_of_floor",
}
_MEMORY_COLUMNS = {
    "model": "model",
    "precision": "precision",
    "contestant": "contestant",
    "token-layers": "token_layers",
    "saved per image, bytes": "saved_bytes",
    "x none": "saved_of_none",
    "x reference": "saved_of_reference",
    "peak MiB": "peak_mib",
    "the step's MiB": "step_mib",
}


@dataclass(frozen=True)
class Plan:
    """What to measure: each model in each precision with each strategy.

    batch: images at once. image_size: pixels a side. threads: of the processes that measure memory. backends: each
    computes the ops of "none" once more, besides the one that is chosen for all. compiled: models by torch.compile.
    peaks: what the device can do, None where that is not known. tome: whether the transformer fuses as well.
    """

    models: tuple[str, ...]
    strategies: tuple[str, ...]
    precisions: tuple[str, ...]
    batch: int
    image_size: int
    rounds: int
    threads: int
    device: torch.device
    backends: tuple[str, ...] = ()
    compiled: bool = False
    peaks: Peaks | None = None
    tome: bool = False

    def pairs(self) -> Iterator[tuple[str, str]]:
        """All models in all precisions."""
        return ((model, precision) for model in self.models for precision in self.precisions)

    def subjects(self, model: str, precision: str) -> dict[str, Subject]:
        """Each strategy, "none" first and always, then "none" by each backend, then the transformer."""

        def subject(name: str, strategy: str, backend: str | None = None) -> Subject:
            sizes = (self.batch, self.image_size, precision, str(self.device))
            return Subject(name, strategy, *sizes, backend, self.compiled)

        found = {name: subject(model, name) for name in dict.fromkeys((_UNFUSED, *self.strategies))}
        found |= {by_backend(name): subject(model, _UNFUSED, name) for name in self.backends}
        transformer = TRANSFORMERS[model]
        found[transformer] = subject(transformer, _UNFUSED)
        fused = [name for name in self.strategies if name != _UNFUSED] if self.tome else []
        return found | {f"{transformer}, {name}": subject(transformer, name) for name in fused}


@dataclass
class _Found:
    """What is known so far of one model in one precision, each by contestant."""

    model: str
    precision: str
    transformer: str
    batch: int
    limits: Peaks | None
    flops: dict[str, int] = field(default_factory=dict)
    passes: dict[str, Passes] = field(default_factory=dict)
    token_layers: dict[str, float] = field(default_factory=dict)
    step: dict[str, Times] = field(default_factory=dict)
    inference: dict[str, Times] = field(default_factory=dict)
    saved: dict[str, int] = field(default_factory=dict)
    peaks: dict[str, Peak | None] = field(default_factory=dict)


def by_backend(name: str) -> str:
    """The contestant that is "none" with its ops computed by a backend."""
    return f"{_UNFUSED}, backend {name}"


def benchmark_model(plan: Plan, report: Report) -> None:
    """Measure all models; times first, each against the others in turn, then memory."""
    where = f"batch {plan.batch}, {plan.image_size} x {plan.image_size}"
    report.tables["times"] = times = Table(f"Training step and inference, {where}", _TIME_COLUMNS)
    report.tables["memory"] = memory = Table(f"Memory of a training step, {where}", _MEMORY_COLUMNS)
    report.notes += [
        f"'{PRODUCTS}' is what one unfused step multiplies and nothing else: every linear layer and the patch "
        "embedding, forward and backward, with operands and results allocated ahead",
        "peak MiB is the resident memory of a process that takes one step, libraries included and freed memory given "
        "back at once (on a GPU what torch allocates); the step's MiB is what it adds to model, gradients, optimizer",
    ]
    if plan.peaks is not None:
        report.notes.append(_floor_note(plan.peaks))
    for model, precision in plan.pairs():
        found = _Found(model, precision, TRANSFORMERS[model], plan.batch, plan.peaks)
        subjects = plan.subjects(model, precision)
        try:
            _measure_times(found, subjects, plan)
            _measure_memory(found, subjects, plan)
        finally:
            times.rows += _time_rows(found)
            memory.rows += _memory_rows(found)
        report.leave_out(
            {f"peak memory of {name}": "ran out of memory" for name, p in found.peaks.items() if p is None}
        )


def _measure_times(found: _Found, subjects: dict[str, Subject], plan: Plan) -> None:
    steps = {name: Step(subject) for name, subject in subjects.items()}
    vims = {name: step.model for name, step in steps.items() if isinstance(step.model, Vim)}
    found.token_layers = {name: _token_layers(step.model) for name, step in steps.items()}
    found.passes = {name: forward_and_step(vim, plan.batch, found.precision) for name, vim in vims.items()}
    found.flops = {name: sum(one.flops for one in step_linears(vim, plan.batch)) for name, vim in vims.items()}
    found.flops[PRODUCTS] = found.flops[_UNFUSED]
    training: dict[str, Callable[[], object]] = {name: step.train for name, step in steps.items()}
    linears = step_linears(vims[_UNFUSED], plan.batch)
    training[PRODUCTS] = Products(linears, DTYPES[found.precision], plan.device)
    for step in steps.values():
        step.model.train()
    race = Race(f"{found.model} {found.precision} step", training, plan.device)
    try:
        race.run(plan.rounds)
    finally:
        found.step = race.times
    for step in steps.values():
        step.model.eval()
    race = Race(f"{found.model} {found.precision} inference", {n: s.infer for n, s in steps.items()}, plan.device)
    try:
        race.run(plan.rounds)
    finally:
        found.inference = race.times


def _measure_memory(found: _Found, subjects: dict[str, Subject], plan: Plan) -> None:
    autocast = PRECISIONS[found.precision]
    for name, subject in {
        **subjects,
        by_backend("reference"): replace(subjects[_UNFUSED], backend="reference"),
    }.items():
        with subject.chosen_backend():
            found.saved[name] = saved_bytes_per_image(subject.build(), plan.image_size, autocast)
    for name, subject in subjects.items():
        found.peaks[name] = step_peak(subject, plan.threads)


def _token_layers(model: Backbone) -> float:
    """Tokens left after each layer's fusion, summed over the layers, as a share of what they are without fusion."""
    left = tokens_per_layer(model.fusion, model.num_tokens)
    return sum(left) / (len(left) * model.num_tokens)


def _time_rows(found: _Found) -> list[dict[str, Any]]:
    def median(times: dict[str, Times], name: str) -> float | None:
        return times[name].median_ms if name in times else None

    rows = []
    for name, step in found.step.items():
        row = _row(found, name) | step.entries("step_ms")
        of = {"none": _UNFUSED, "products": PRODUCTS, "transformer": found.transformer}
        row |= {f"step_of_{key}": ratio(step.median_ms, median(found.step, other)) for key, other in of.items()}
        if name == PRODUCTS:
            row["flops"] = found.flops[PRODUCTS]
        else:
            row["images_per_s"] = 1000 * found.batch / step.median_ms
        if name in found.inference:
            row |= found.inference[name].entries("inference_ms")
            for key in ("none", "transformer"):
                own = found.inference[name].median_ms
                row[f"inference_of_{key}"] = ratio(own, median(found.inference, of[key]))
        rows.append(row | _against_peaks(found, name))
    return rows


def _against_peaks(found: _Found, name: str) -> dict[str, Any]:
    """How a contestant's times compare with what the device can do, as far as both are known."""
    limits, row = found.limits, dict[str, Any]()
    if limits is None:
        return row
    step_ms = found.step[name].median_ms
    peak = limits.products.get(found.precision)
    if name in found.flops and peak is not None:
        row["step_of_peak"] = found.flops[name] / (step_ms / 1000) / peak
    if name in found.passes:
        passes = found.passes[name]
        row["step_floor_ms"] = floor_ms(passes.both, limits, found.precision)
        row["step_of_floor"] = step_ms / row["step_floor_ms"]
        if name in found.inference:
            row["inference_floor_ms"] = floor_ms(passes.forward, limits, found.precision)
            row["inference_of_floor"] = found.inference[name].median_ms / row["inference_floor_ms"]
    return row


def _floor_note(peaks: Peaks) -> str:
    return (
        f"x floor says how many times as long as {peaks.name} needs at its best for what each pass over data has to "
        "move and compute, see docs/performance.md; of matmul peak is the share of its products' peak rate at which a "
        "step did those of its linear layers and patch embedding"
    )


def _memory_rows(found: _Found) -> list[dict[str, Any]]:
    rows = []
    for name, saved in found.saved.items():
        row = _row(found, name) | {"saved_bytes": saved}
        row["saved_of_none"] = ratio(saved, found.saved.get(_UNFUSED))
        row["saved_of_reference"] = ratio(saved, found.saved.get(by_backend("reference")))
        peak = found.peaks.get(name)
        rows.append(row | (peak._asdict() if peak else {}))
    return rows


def _row(found: _Found, name: str) -> dict[str, Any]:
    return {
        "model": found.model,
        "precision": found.precision,
        "batch": found.batch,
        "contestant": name,
        "token_layers": found.token_layers.get(name),
    }
