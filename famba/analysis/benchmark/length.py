"""`famba benchmark length`: how time and memory of a step grow with the tokens of an image."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from famba.analysis.benchmark.machine import PRECISIONS
from famba.analysis.benchmark.memory import Peak, step_peak
from famba.analysis.benchmark.model import TRANSFORMERS
from famba.analysis.benchmark.report import Report, Table
from famba.analysis.benchmark.steps import Step, Subject
from famba.analysis.benchmark.timing import Race, Times, ratio
from famba.training.measure import saved_bytes_per_image

PATCH = 16
_BASE = 197
_COLUMNS = {
    "model": "model",
    "precision": "precision",
    "tokens": "tokens",
    "batch": "batch",
    "step ms": "step_ms",
    "per token us": "step_us",
    "of base": "step_growth",
    "saved per token, bytes": "saved_bytes",
    "of base ": "saved_growth",
    "peak MiB": "peak_mib",
    "the step's MiB per 1000 tokens": "step_memory",
    "of base  ": "memory_growth",
}


@dataclass(frozen=True)
class Plan:
    """What to measure: a Vim without fusion and its transformer at each image size, in pixels a side.

    tokens: about how many tokens a step holds, whatever the image size. threads: of the processes that measure memory.
    """

    model: str
    image_sizes: tuple[int, ...]
    tokens: int
    precisions: tuple[str, ...]
    rounds: int
    threads: int
    device: torch.device

    def subjects(self, precision: str) -> dict[tuple[str, int], Subject]:
        """Each model at each length; keys are (model, tokens of an image)."""
        found = {}
        for size in self.image_sizes:
            length = tokens_of(size)
            batch = max(1, round(self.tokens / length))
            for model in (self.model, TRANSFORMERS[self.model]):
                found[model, length] = Subject(model, "none", batch, size, precision, str(self.device))
        return found

    @property
    def base(self) -> int:
        """The length that growth is told by: 197 tokens, or the shortest where that is not among them."""
        lengths = [tokens_of(size) for size in self.image_sizes]
        return _BASE if _BASE in lengths else min(lengths)


@dataclass
class _Found:
    """What is known so far in one precision, by (model, tokens of an image)."""

    precision: str
    subjects: dict[tuple[str, int], Subject]
    step: dict[tuple[str, int], Times] = field(default_factory=dict)
    saved: dict[tuple[str, int], int] = field(default_factory=dict)
    peaks: dict[tuple[str, int], Peak | None] = field(default_factory=dict)


def tokens_of(image_size: int) -> int:
    """Tokens of an image: its patches and a class token."""
    return (image_size // PATCH) ** 2 + 1


def benchmark_length(plan: Plan, report: Report) -> None:
    """Measure all lengths, each against the others in turn."""
    title = f"Training steps of about {plan.tokens} tokens, told by the token; base is an image of {plan.base} tokens"
    report.tables["length"] = table = Table(f"{title} (1.00 is linear growth)", _COLUMNS)
    for precision in plan.precisions:
        found = _Found(precision, plan.subjects(precision))
        try:
            _measure_times(found, plan)
            _measure_memory(found, plan)
        finally:
            table.rows += _rows(found, plan.base)
        lost = [key for key, peak in found.peaks.items() if peak is None]
        report.leave_out({f"peak memory of {model} at {length} tokens": "ran out of memory" for model, length in lost})


def _measure_times(found: _Found, plan: Plan) -> None:
    steps = {key: Step(subject) for key, subject in found.subjects.items()}
    for step in steps.values():
        step.model.train()
    race = Race(f"lengths {found.precision}", {key: step.train for key, step in steps.items()}, plan.device)
    try:
        race.run(plan.rounds)
    finally:
        found.step = race.times


def _measure_memory(found: _Found, plan: Plan) -> None:
    autocast = PRECISIONS[found.precision]
    for key, subject in found.subjects.items():
        found.saved[key] = saved_bytes_per_image(subject.build(), subject.image_size, autocast)
    for key, subject in found.subjects.items():
        found.peaks[key] = step_peak(subject, plan.threads)


def _rows(found: _Found, base: int) -> list[dict[str, Any]]:
    rows = [_row(found, model, length) for model, length in sorted(found.step, key=lambda key: key[0], reverse=True)]
    bases = {row["model"]: row for row in rows if row["tokens"] == base}
    growths = {"step_growth": "step_us", "saved_growth": "saved_bytes", "memory_growth": "step_memory"}
    for row in rows:
        of = bases.get(row["model"], {})
        row |= {growth: ratio(row.get(key), of.get(key)) for growth, key in growths.items()}
    return rows


def _row(found: _Found, model: str, length: int) -> dict[str, Any]:
    key = (model, length)
    batch, step = found.subjects[key].batch, found.step[key]
    row: dict[str, Any] = {"model": model, "precision": found.precision, "tokens": length, "batch": batch}
    row |= step.entries("step_ms")
    row["step_us"] = 1000 * step.median_ms / (batch * length)
    if key in found.saved:
        row["saved_bytes"] = found.saved[key] / length
    peak = found.peaks.get(key)
    if peak is not None:
        row |= peak._asdict()
        row["step_memory"] = 1000 * peak.step_mib / (batch * length)
    return row
