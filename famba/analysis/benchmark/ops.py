"""Time each op by every backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from famba import ops
from famba.analysis.benchmark.timing import Call, Race, Report, Row
from famba.errors import BackendError
from famba.ops.availability import interpreted
from famba.ops.registry import resolve

OPS = ("selective_scan", "causal_conv1d", "add_rms_norm", "bidirectional_mixer", "match_tokens", "fuse_tokens")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NOTE = (
    "forward is without autograd; on CUDA, inputs rotate among so many copies as exceed twice the second-level cache, "
    "up to 256"
)
_MOST_COPIES = 256
_SHARE = 14  # of 197 tokens 14 fuse: the most that a strategy of the paper removes in a layer
_Run = Callable[..., Any]


class Built(NamedTuple):
    """Hold an op and its inputs, those that have gradients and the others."""

    run: _Run
    learned: list[Tensor]
    fixed: list[Tensor]


class Case(NamedTuple):
    """Name an op and the size of its input; states: of each channel of the scan. The mixer has half the channels."""

    op: str
    batch: int
    length: int
    channels: int = 384
    states: int = 16
    precision: str = "fp32"

    def built(self) -> Built:
        """Return what the op computes, on seeded inputs as a model has them under autocast."""
        torch.manual_seed(0)
        _, b, l, d, n, _ = self  # noqa: E741
        dtype, fused = DTYPES[self.precision], max(1, self.length // _SHARE)
        x = torch.randn(b, l, d).to(dtype)
        match = partial(ops.match_tokens, leading=1, protected=None, sizes=None, r=fused, order="sequence")
        if self.op == "selective_scan":
            delta, (B, C) = (0.1 * torch.rand(b, l, d)).to(dtype), torch.randn(2, b, l, n).to(dtype)
            return Built(ops.selective_scan, [x, delta, -16 * torch.rand(d, n), B, C, torch.ones(d)], [])
        if self.op == "causal_conv1d":
            return Built(partial(ops.causal_conv1d, activation="silu"), [x, torch.randn(d, 4), torch.randn(d)], [])
        if self.op == "add_rms_norm":
            return Built(partial(ops.add_rms_norm, eps=1e-5), [x, torch.randn(b, l, d), torch.rand(d) + 0.5], [])
        if self.op == "bidirectional_mixer":
            return _mixer(b, l, d, n, dtype)
        if self.op == "match_tokens":
            return Built(match, [], [x])
        with ops.use_backend("reference"):
            fixed = list(match(torch.randn(b, l, d))[:2])
        return Built(partial(ops.fuse_tokens, length=l - fused), [x], fixed)


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
    return Built(mix, given, [])


def obstacle(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why a backend is neither timed nor checked, None where it is."""
    if backend == "triton" and interpreted():
        return "TRITON_INTERPRET=1 has it run in Triton's interpreter, whose times say nothing; unset it"
    try:
        with ops.use_backend(backend):
            resolve(device.type, dtype)
    except BackendError as error:
        return str(error)
    return None


def measure(case: Case, device: torch.device, rounds: int, report: Report) -> None:
    """Add the times of a case, forward and with its backward; on a GPU without plain torch, which is far slower."""
    race, built = Race(" ".join(map(str, case)), device), case.built()
    tensors = [x.to(device).requires_grad_() for x in built.learned] + [x.to(device) for x in built.fixed]
    try:
        for name in (name for name in ops.backends() if name != "reference" or device.type != "cuda"):
            if (reason := obstacle(name, device, DTYPES[case.precision])) is not None:
                report.left_out[name] = reason
                continue
            run, copies = partial(_by, name, built.run), _copies(tensors, device)
            race.enter(f"{name}, forward", [partial(torch.no_grad()(run), *own) for own in copies])
            if built.learned:
                race.enter(f"{name}, both", [_both(run, own) for own in copies])
        race.run(rounds)
    finally:
        rows: list[Row] = []
        for key in race.samples:
            name, _, mode = key.partition(", ")
            rows.append({"op": case.op, "mode": mode, **case._asdict(), "contestant": name, **race.entries(key)})
        for row in rows:
            row["of_fastest"] = row["ms"] / min(other["ms"] for other in rows if other["mode"] == row["mode"])
        report.tables.setdefault("Ops", []).extend(rows)


def _by(name: str, run: _Run, *given: Tensor) -> tuple[Tensor, ...]:
    with ops.use_backend(name):
        outputs = run(*given)
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _copies(tensors: Sequence[Tensor], device: torch.device) -> list[list[Tensor]]:
    """Return the inputs so often that together they exceed twice a GPU's second-level cache; once on other devices."""
    count = 1
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        count = min(_MOST_COPIES, 1 + 2 * cache // sum(x.nbytes for x in tensors))
    return [[x.detach().clone().requires_grad_(x.requires_grad) for x in tensors] for _ in range(count)]


def _both(run: _Run, tensors: Sequence[Tensor]) -> Call:
    with torch.no_grad():
        grads = [torch.randn_like(y) for y in run(*tensors)]
    learned = [x for x in tensors if x.requires_grad]
    return lambda: torch.autograd.grad(run(*tensors), learned, grads)
