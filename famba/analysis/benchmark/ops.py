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
        return OPS[self.op](*self[1:5], DTYPES[self.precision])


def _scan(b: int, l: int, d: int, n: int, dtype: torch.dtype) -> Built:  # noqa: E741
    u, delta = torch.randn(b, l, d).to(dtype), (0.1 * torch.rand(b, l, d)).to(dtype)
    B, C = torch.randn(2, b, l, n).to(dtype).unbind()
    return Built(ops.selective_scan, [u, delta, -16 * torch.rand(d, n), B, C, torch.ones(d)], [])


def _convolution(b: int, l: int, d: int, n: int, dtype: torch.dtype) -> Built:  # noqa: E741
    given = [torch.randn(b, l, d).to(dtype), torch.randn(d, 4), torch.randn(d)]
    return Built(partial(ops.causal_conv1d, activation="silu"), given, [])


def _norm(b: int, l: int, d: int, n: int, dtype: torch.dtype) -> Built:  # noqa: E741
    given = [torch.randn(b, l, d).to(dtype), torch.randn(b, l, d), torch.rand(d) + 0.5]
    return Built(partial(ops.add_rms_norm, eps=1e-5), given, [])


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


def _matching(b: int, l: int, d: int, n: int, dtype: torch.dtype) -> Built:  # noqa: E741
    return Built(_match, [], [torch.randn(b, l, d).to(dtype)])


def _fusing(b: int, l: int, d: int, n: int, dtype: torch.dtype) -> Built:  # noqa: E741
    with ops.use_backend("reference"):
        fixed = list(_match(torch.randn(b, l, d))[:2])
    return Built(partial(ops.fuse_tokens, length=l - max(1, l // _SHARE)), [torch.randn(b, l, d).to(dtype)], fixed)


def _match(x: Tensor) -> tuple[Tensor, ...]:
    return ops.match_tokens(x, 1, None, None, max(1, x.shape[1] // _SHARE), "sequence")


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


def measure(case: Case, device: torch.device, rounds: int, report: Report) -> None:
    """Time a case, forward and with its backward, and add its rows to the table of ops.

    On a GPU plain torch, which is hundreds of times slower there, is left out.
    """
    race, built = Race(" ".join(map(str, case)), device), case.built()
    tensors = [x.to(device).requires_grad_() for x in built.learned] + [x.to(device) for x in built.fixed]
    try:
        for name in (name for name in ops.backends() if name != "reference" or device.type != "cuda"):
            if (reason := obstacle(name, device, case.precision)) is not None:
                report.left_out[name] = reason
                continue
            run, copies = partial(_by, name, built.run), _copies(tensors, device)
            race.enter(f"{name}, forward", [partial(_forward, run, own) for own in copies])
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


def _forward(run: _Run, tensors: Sequence[Tensor]) -> None:
    with torch.no_grad():
        run(*tensors)


def _both(run: _Run, tensors: Sequence[Tensor]) -> Call:
    with torch.no_grad():
        grads = [torch.randn_like(y) for y in run(*tensors)]
    learned = [x for x in tensors if x.requires_grad]
    return lambda: torch.autograd.grad(run(*tensors), learned, grads)
