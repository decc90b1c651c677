"""Time each op by every backend; a backend that differs from the reference is not timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from famba import ops
from famba.analysis.benchmark import floors
from famba.analysis.benchmark.report import Report, Row
from famba.analysis.benchmark.timing import Call, Race
from famba.errors import BackendError
from famba.ops.availability import interpreted
from famba.ops.registry import resolve

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NOTE = (
    "forward is without autograd; whatever was timed agrees with the reference in result and gradients; on CUDA, "
    "inputs rotate among so many copies as exceed twice the second-level cache, up to 256, so that they come from "
    "memory; where 256 copies are smaller than that, they may be found in the cache"
)
# Relative errors, in the norm, up to which contestants agree; near ties match one way or another.
_TOLERANCE, _MATCH_TOLERANCE, _MOST_COPIES = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 5e-3}, 2e-2, 256
_Run = Callable[..., Any]


class Built(NamedTuple):
    """Hold an op and its inputs, those that have gradients and the others, and the least work that it has to do."""

    run: _Run
    learned: list[Tensor]
    fixed: list[Tensor]
    passes: list[floors.Work]


class Case(NamedTuple):
    """Name an op and the size of its input; states: of each channel of the scan. The mixer has half the channels."""

    op: str
    batch: int
    length: int
    channels: int
    states: int
    precision: str

    def built(self) -> Built:
        """Return what the op computes, on seeded inputs as a model has them under autocast."""
        torch.manual_seed(0)
        return OPS[self.op](*self[1:5], DTYPES[self.precision])


def removed(length: int) -> int:
    """Return how many tokens fuse with another: 14 of 197, the most that a strategy of the paper removes in a layer."""
    return max(1, length // 14)


def _scan(b: int, l: int, d: int, n: int, dtype: torch.dtype) -> Built:  # noqa: E741
    u, delta = torch.randn(b, l, d).to(dtype), (0.1 * torch.rand(b, l, d)).to(dtype)
    B, C = torch.randn(2, b, l, n).to(dtype).unbind()
    given = [u, delta, -16 * torch.rand(d, n), B, C, torch.ones(d)]
    return Built(ops.selective_scan, given, [], floors.scan(b, l, d, n, dtype.itemsize))


def _convolution(b: int, l: int, d: int, n: int, dtype: torch.dtype) -> Built:  # noqa: E741
    given = [torch.randn(b, l, d).to(dtype), torch.randn(d, 4), torch.randn(d)]
    return Built(partial(ops.causal_conv1d, activation="silu"), given, [], floors.convolution(b, l, d, dtype.itemsize))


def _norm(b: int, l: int, d: int, n: int, dtype: torch.dtype) -> Built:  # noqa: E741
    given = [torch.randn(b, l, d).to(dtype), torch.randn(b, l, d), torch.rand(d) + 0.5]
    return Built(partial(ops.add_rms_norm, eps=1e-5), given, [], floors.norm(b, l, d, dtype.itemsize))


def _mixer(b: int, l: int, d: int, n: int, dtype: torch.dtype) -> Built:  # noqa: E741
    d_model, rank = max(1, d // 2), math.ceil(max(1, d // 2) / 16)

    def weight(outputs: int, inputs: int) -> Tensor:
        return torch.randn(outputs, inputs) / math.sqrt(inputs)

    def mix(x: Tensor, into: Tensor, out: Tensor, *weights: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=dtype, enabled=dtype != torch.float32):
            return ops.bidirectional_mixer(x, into, ops.Direction(*weights[:7]), ops.Direction(*weights[7:]), out)

    given = [torch.randn(b, l, d_model).to(dtype), weight(2 * d, d_model), weight(d_model, d)]
    for _ in range(2):
        # Step sizes of about 0.001 to 0.1 and decays of 1 to n, as Vim begins.
        given += [weight(d, 4), torch.randn(d), weight(rank + 2 * n, d), weight(d, rank), 5 * torch.rand(d) - 7]
        given += [-torch.arange(1.0, n + 1).repeat(d, 1), torch.ones(d)]
    multiplied = floors.multiplying(floors.mixer_linears(b * l, d_model, d, n, rank), dtype.itemsize)
    return Built(mix, given, [], multiplied + floors.mixing(b, l, d, n, dtype.itemsize))


def _matching(b: int, l: int, d: int, n: int, dtype: torch.dtype) -> Built:  # noqa: E741
    passes = floors.matching(b, l, d, removed(l), dtype.itemsize)
    return Built(_match, [], [torch.randn(b, l, d).to(dtype)], passes)


def _fusing(b: int, l: int, d: int, n: int, dtype: torch.dtype) -> Built:  # noqa: E741
    with ops.use_backend("reference"):
        fixed = list(_match(torch.randn(b, l, d))[:2])
    run, passes = partial(ops.fuse_tokens, length=l - removed(l)), floors.fusing(b, l, d, removed(l), dtype.itemsize)
    return Built(run, [torch.randn(b, l, d).to(dtype)], fixed, passes)


def _match(x: Tensor) -> tuple[Tensor, ...]:
    return ops.match_tokens(x, 1, None, None, removed(x.shape[1]), "sequence")


OPS: dict[str, Callable[[int, int, int, int, torch.dtype], Built]] = {
    "selective_scan": _scan,
    "causal_conv1d": _convolution,
    "add_rms_norm": _norm,
    "bidirectional_mixer": _mixer,
    "match_tokens": _matching,
    "fuse_tokens": _fusing,
}


def obstacle(backend: str, device: torch.device, precision: str) -> str | None:
    """Return why a backend is not timed, None where it is."""
    if backend == "triton" and interpreted():
        return "TRITON_INTERPRET=1 has it run in Triton's interpreter, whose times say nothing; unset it"
    try:
        with ops.use_backend(backend):
            resolve(device.type, DTYPES[precision])
    except BackendError as error:
        return str(error)
    return None


def measure(case: Case, device: torch.device, rounds: int, report: Report, reference: bool = True) -> None:
    """Time a case, forward and with its backward, and add its rows to the table of ops.

    reference: whether plain torch is timed too, and not just compared with.
    """
    race, built = Race(" ".join(map(str, case)), device), case.built()
    tensors = [x.to(device).requires_grad_() for x in built.learned] + [x.to(device) for x in built.fixed]
    expected = _results(partial(_by, "reference", built.run), tensors)
    try:
        for name in ops.backends():
            run = partial(_by, name, built.run)
            if (
                reason := obstacle(name, device, case.precision) or _difference(case, run, tensors, expected)
            ) is not None:
                report.left_out[name] = reason
            elif name != "reference" or reference:
                copies = _copies(tensors, device)
                race.enter(f"{name}, forward", [partial(_forward, run, own) for own in copies])
                if built.learned:
                    race.enter(f"{name}, both", [_both(run, own) for own in copies])
        race.run(rounds)
    finally:
        rows: list[Row] = []
        for key in race.samples:
            name, _, mode = key.partition(", ")
            row = {"op": case.op, "mode": mode, **case._asdict(), "contestant": name, **race.entries(key)}
            passes = [work for work in built.passes if mode == "both" or not work.backward]
            floor = row["floor_ms"] = floors.floor_here(passes, device, case.precision)
            rows.append(row | {"floor_share": floor and floor / row["ms"]})
        for row in rows:
            row["of_fastest"] = row["ms"] / min(other["ms"] for other in rows if other["mode"] == row["mode"])
        report.tables.setdefault("Ops", []).extend(rows)


def _by(name: str, run: _Run, *given: Tensor) -> tuple[Tensor, ...]:
    with ops.use_backend(name):
        outputs = run(*given)
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _difference(case: Case, run: _Run, tensors: Sequence[Tensor], expected: Sequence[Tensor]) -> str | None:
    """Return how far results and gradients are from the reference's where that is too far, else None."""
    error = max(map(_error, _results(run, tensors), expected))
    allowed = _MATCH_TOLERANCE if case.op == "match_tokens" else _TOLERANCE[case.precision]
    return None if error <= allowed else f"not timed on {case}: its relative error is {error:.1e}"


def _copies(tensors: Sequence[Tensor], device: torch.device) -> list[list[Tensor]]:
    """Return the inputs so often that together they exceed twice a GPU's second-level cache; once on other devices."""
    count = 1
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        count = min(_MOST_COPIES, 1 + 2 * cache // sum(x.nbytes for x in tensors))
    return [[x.detach().clone().requires_grad_(x.requires_grad) for x in tensors] for _ in range(count)]


def _forward(run: _Run, tensors: Sequence[Tensor]) -> None:
    with torch.no_grad():
        run(*tensors)


def _both(run: _Run, tensors: Sequence[Tensor]) -> Call:
    with torch.no_grad():
        grads = [torch.randn_like(y) for y in run(*tensors)]
    learned = [x for x in tensors if x.requires_grad]
    return lambda: torch.autograd.grad(run(*tensors), learned, grads)


def _results(run: _Run, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return outputs, and gradients for the same gradients of the outputs whoever computes them."""
    outputs, learned = run(*tensors), [x for x in tensors if x.requires_grad]
    torch.manual_seed(1)
    grads = torch.autograd.grad(outputs, learned, [torch.randn_like(y) for y in outputs]) if learned else ()
    return [*(y.detach() for y in outputs), *grads]


def _error(x: Tensor, expected: Tensor) -> float:
    """Return the relative error in the norm; of whole numbers the share that differs."""
    if not x.is_floating_point():
        return float((x != expected).double().mean())
    return float((x.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))
