"""`famba benchmark ops`: each op by every backend, and the scan by the libraries that others use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from famba.analysis.benchmark.cases import OPS, Case, inputs, passes
from famba.analysis.benchmark.contestants import Contestant, contestants
from famba.analysis.benchmark.machine import DTYPES
from famba.analysis.benchmark.peaks import Peaks
from famba.analysis.benchmark.report import Report, Table
from famba.analysis.benchmark.timing import Clock, Race, Times, ratio
from famba.analysis.benchmark.traffic import floor_ms, total_bytes
from famba.errors import BackendError

# Relative errors, in the norm, up to which contestants agree.
_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 5e-3}
_COLUMNS = {
    "op": "op",
    "precision": "precision",
    "batch": "batch",
    "length": "length",
    "by": "contestant",
    "forward ms": "forward_ms",
    "x native": "forward_of_native",
    "x fastest": "forward_of_fastest",
    "x floor": "forward_of_floor",
    "of bandwidth": "forward_of_bandwidth",
    "forward + backward ms": "both_ms",
    "x native ": "both_of_native",
    "x fastest ": "both_of_fastest",
    "x floor ": "both_of_floor",
    "of bandwidth ": "both_of_bandwidth",
}
_MODES = ("forward", "both")


@dataclass(frozen=True)
class Plan:
    """What to time: every combination, in `rounds` rounds. channels and states are those of the scan, per direction.

    clock: that of the device where None. peaks: what the device can do, None where that is not known.
    """

    ops: tuple[str, ...]
    batches: tuple[int, ...]
    lengths: tuple[int, ...]
    channels: int
    states: int
    precisions: tuple[str, ...]
    rounds: int
    device: torch.device
    clock: Clock | None = None
    peaks: Peaks | None = None

    def cases(self) -> Iterator[Case]:
        """All cases."""
        for op, precision, batch, length in product(self.ops, self.precisions, self.batches, self.lengths):
            yield Case(op, batch, length, self.channels, self.states, precision)


def benchmark_ops(plan: Plan, report: Report) -> None:
    """Time all cases. Raises BackendError where contestants do not agree."""
    title = f"Ops on {plan.channels} channels, the scan with {plan.states} states; forward without autograd"
    report.tables["ops"] = table = Table(title, _COLUMNS)
    report.notes.append(
        "x native and x fastest say how many times as long a contestant takes; "
        "all of a case agreed in result and gradients before they were timed"
    )
    if plan.peaks is not None:
        report.notes.append(_floor_note(plan.peaks))
    for case in plan.cases():
        dtype = DTYPES[case.precision]
        tensors = inputs(case, dtype, plan.device)
        entered, missing = contestants(case, dtype, plan.device)
        report.leave_out(missing)
        _check_agreement(case, entered, tensors)
        race = Race(case.title, _timed(entered, tensors), plan.device, plan.clock)
        try:
            race.run(plan.rounds)
        finally:
            table.rows += _rows(case, race.times, plan.peaks)


def _timed(entered: dict[str, Contestant], tensors: list[Tensor]) -> dict[tuple[str, str], Callable[[], object]]:
    """For each contestant its forward, and its forward and backward if it has one; keys are (contestant, mode)."""
    timed: dict[tuple[str, str], Callable[[], object]] = {}
    for name, contestant in entered.items():
        own = _arranged(contestant, tensors)
        timed[name, "forward"] = _forward(contestant, own)
        if learned := _learned(own):
            with torch.no_grad():
                outputs = _tuple(contestant.run(*own))
            grads = [_gradient_like(y) for y in outputs]
            timed[name, "both"] = _both(contestant, own, learned, grads)
    return timed


def _forward(contestant: Contestant, tensors: list[Tensor]) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return contestant.run(*tensors)

    return run


def _both(
    contestant: Contestant, tensors: list[Tensor], learned: list[Tensor], grads: list[Tensor]
) -> Callable[[], object]:
    def run() -> object:
        return torch.autograd.grad(_tuple(contestant.run(*tensors)), learned, grads)

    return run


def _check_agreement(case: Case, entered: dict[str, Contestant], tensors: list[Tensor]) -> None:
    allowed = OPS[case.op].tolerance or _TOLERANCE[case.precision]
    expected = _results(entered["reference"], tensors)
    for name, contestant in entered.items():
        worst = max(_error(x, y) for x, y in zip(_results(contestant, tensors), expected, strict=True))
        if not worst <= allowed:
            raise BackendError(
                f"{name} and reference do not agree on {case.title}: relative error {worst:.1e}, allowed "
                f"{allowed:.0e}; nothing is timed before that is mended"
            )


def _results(contestant: Contestant, tensors: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients, in the common layout."""
    own = _arranged(contestant, tensors)
    outputs = _tuple(contestant.run(*own))
    gradients: tuple[Tensor, ...] = ()
    if learned := _learned(own):
        # The same gradient for all contestants, whatever their layout.
        grads = [contestant.arrange(_gradient_like(contestant.restore(y))) for y in outputs]
        gradients = torch.autograd.grad(outputs, learned, grads)
    return [contestant.restore(x.detach()) for x in (*outputs, *gradients)]


def _arranged(contestant: Contestant, tensors: list[Tensor]) -> list[Tensor]:
    return [contestant.arrange(x.detach()).requires_grad_(x.requires_grad) for x in tensors]


def _learned(tensors: list[Tensor]) -> list[Tensor]:
    return [x for x in tensors if x.requires_grad]


def _gradient_like(y: Tensor) -> Tensor:
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)


def _tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def _error(x: Tensor, expected: Tensor) -> float:
    """Relative error in the norm; of whole numbers the share that differs."""
    if not x.is_floating_point():
        return float((x != expected).double().mean())
    difference = (x.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp(min=1e-30))


def _rows(case: Case, times: dict[tuple[str, str], Times], peaks: Peaks | None) -> list[dict[str, Any]]:
    fastest = {mode: min((t.median_ms for (_, m), t in times.items() if m == mode), default=None) for mode in _MODES}
    rows = []
    for name in dict.fromkeys(name for name, _ in times):
        row: dict[str, Any] = {
            "op": case.op,
            "precision": case.precision,
            "batch": case.batch,
            "length": case.length,
            "channels": case.channels,
            "states": case.states,
            "contestant": name,
        }
        for mode in _MODES:
            own, native = times.get((name, mode)), times.get(("native", mode))
            if own is not None:
                row |= own.entries(f"{mode}_ms")
                row[f"{mode}_of_native"] = ratio(own.median_ms, native.median_ms if native else None)
                row[f"{mode}_of_fastest"] = ratio(own.median_ms, fastest[mode])
                if peaks is not None:
                    row |= _against_floor(case, mode, own.median_ms, peaks)
        rows.append(row)
    return rows


def _against_floor(case: Case, mode: str, milliseconds: float, peaks: Peaks) -> dict[str, Any]:
    work = passes(case).forward if mode == "forward" else passes(case).both
    moved, floor = total_bytes(work), floor_ms(work, peaks, case.precision)
    return {
        f"{mode}_bytes": moved,
        f"{mode}_floor_ms": floor,
        f"{mode}_of_floor": milliseconds / floor,
        f"{mode}_of_bandwidth": moved / (milliseconds / 1000) / peaks.bandwidth,
    }


def _floor_note(peaks: Peaks) -> str:
    return (
        f"x floor says how many times as long as {peaks.name} needs at its best, see docs/performance.md; of bandwidth "
        f"is the share of {peaks.bandwidth / 1e9:.0f} GB/s at which the op's inputs and outputs moved, each once"
    )
