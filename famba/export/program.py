"""Trace a model as a program of torch's own operations, for any batch size, and write it as a file of torch.export."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from famba import ops
from famba.errors import ConfigError
from famba.export.check import ExportError
from famba.ops import reference

NOTES_FILE = "famba.json"
Recurrence = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, bool], Tensor]
"""Callback (delta (b, l, d), delta u (b, l, d), A (d, n), B, C (b, l, n), runs backward) -> y (b, l, d)."""
_BATCH = 2  # a batch of 1 would be taken for a constant
# What the tracer notes of each operation besides its meaning. It names files of this machine, and is most of a program.
_NOTES = ("stack_trace", "source_fn_stack", "torch_fn", "nn_module_stack", "from_node")


def write(model: nn.Module, shape: Sequence[int], file: Path, notes: str) -> str:
    """Write a model as a .pt2 file, over what is there; return what there is to say of it.

    model, shape and errors: as of `trace_program`. notes: JSON for whoever loads it, kept in the file as
    `extra_files["famba.json"]`.
    """
    program = trace_program(model, shape)
    content = io.BytesIO()  # torch's own file ends the process where a disk is full
    torch.export.save(program, content, extra_files={NOTES_FILE: notes})
    file.write_bytes(content.getvalue())
    operations = sum(node.op == "call_function" for node in program.graph.nodes)
    return f"torch {torch.__version__}, {operations:,} operations"


def chunked(delta: Tensor, gain: Tensor, A: Tensor, B: Tensor, C: Tensor, reverse: bool) -> Tensor:
    """Return y[t] = C[t] . h[t] of h[t] = exp(delta[t] A) h[t - 1] + gain[t] B[t], from the last to the first if asked.

    A program has no loop, so its length is that of the scan. Cut into about sqrt(l) chunks, the steps of all chunks are
    taken at once, then the chunks one after the other. Nothing is divided and no logarithm taken: decays that underflow
    to 0 are right.

    delta, gain, y (b, l, d); A (d, n); B, C (b, l, n).
    """
    length = delta.shape[1]
    steps = max(1, math.isqrt(length - 1) + 1)
    chunks = -(-length // steps)

    def cut(x: Tensor) -> Tensor:  # (b, chunks, steps, channels); what fills up the last one changes nothing
        return F.pad(x.flip(1) if reverse else x, (0, 0, 0, chunks * steps - length)).unflatten(1, (chunks, steps))

    def run(gains: Sequence[Tensor], decays: Sequence[Tensor]) -> list[Tensor]:  # states after each step
        states = [gains[0]]
        for gain, decay in zip(gains[1:], decays[1:], strict=True):
            states.append(torch.addcmul(gain, decay, states[-1]))
        return states

    delta, gain, B, C = map(cut, (delta, gain, B, C))
    rates = A.t()  # (n, d): with the channels innermost every elementwise operation runs over contiguous memory
    decay = torch.exp(delta.unsqueeze(3) * rates)
    since_start = torch.exp(delta.cumsum(2).unsqueeze(3) * rates)
    alone = torch.stack(run((gain.unsqueeze(3) * B.unsqueeze(4)).unbind(2), decay.unbind(2)), dim=2)
    ends = run(alone[:, :, -1].unbind(1), since_start[:, :, -1].unbind(1))
    entering = torch.stack([torch.zeros_like(ends[0]), *ends[:-1]], dim=1)
    states = torch.addcmul(alone, since_start, entering.unsqueeze(2))
    y = torch.matmul(C.unsqueeze(3), states).squeeze(3).flatten(1, 2)[:, :length]
    return y.flip(1) if reverse else y


class PlainOps(TorchFunctionMode):
    """Compute famba's ops by torch's own within the block, so that tracing finds nothing else.

    An op's form is its reference where that is a sequence of whole-tensor operations already; recurrence computes the
    states of scans.
    """

    def __init__(self, recurrence: Recurrence) -> None:
        super().__init__()

        def selective_scan(
            u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
            delta_bias: Tensor | None, delta_softplus: bool, reverse: bool,
        ) -> tuple[Tensor, Tensor]:  # fmt: skip
            delta = delta if delta_bias is None else delta + delta_bias
            delta = F.softplus(delta) if delta_softplus else delta
            y = recurrence(delta, delta * u, A, B, C, reverse)
            y = y if D is None else y + D * u
            return y if z is None else y * F.silu(z), u.new_empty((0,))

        known = torch.ops.famba
        self.forms: dict[Any, Callable[..., Any]] = {
            known.add_rms_norm.default: reference.add_rms_norm,
            known.causal_conv1d.default: _causal_conv1d,
            known.selective_scan.default: selective_scan,
            known.match_tokens.default: reference.match_tokens,
            known.fuse_tokens.default: reference.fuse_tokens,
        }

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        form = self.forms.get(func)
        # The last argument of an op names a backend.
        return func(*args, **(kwargs or {})) if form is None else form(*args[:-1])


def _causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    before = weight.shape[1] - 1
    padded = F.pad(x.transpose(1, 2), (0, before) if reverse else (before, 0))
    taps = (weight.flip(1) if reverse else weight).unsqueeze(1)
    y = F.conv1d(padded, taps, bias, groups=weight.shape[0]).transpose(1, 2)
    return F.silu(y) if silu else y


def trace_program(model: nn.Module, shape: Sequence[int], recurrence: Recurrence = chunked) -> ExportedProgram:
    """Trace a model in eval mode, whatever its ops, as a program for any batch size from 1.

    Args:
        model: maps (b, *shape) to logits; its weights float32, on the CPU.
        shape: of one input without the batch, such as (3, 224, 224).
        recurrence: computes the states of its scans.

    Raises:
        ConfigError: weights that are not float32 on the CPU, or a model in training mode.
        ExportError: torch cannot trace the model, or an op of it has no form in torch's own.
    """
    if model.training:
        raise ConfigError("the model is in training mode; call eval() first")
    if wrong := {f"{w.dtype} on {w.device}" for w in model.parameters()} - {"torch.float32 on cpu"}:
        raise ConfigError(f"weights are {', '.join(sorted(wrong))}; expected float32: call float() and cpu() first")
    example = torch.zeros(_BATCH, *shape)
    # torch 2.6 trips over a size without a largest one.
    batch = Dim("batch", max=2**31 - 1)
    try:
        with torch.no_grad(), ops.use_backend("reference"), PlainOps(recurrence):
            program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},), strict=False)
    except Exception as error:  # torch raises what it comes across
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ExportError(f"torch {torch.__version__} cannot trace the model: {reason}") from error
    _tidy(program)
    foreign = sorted({str(node.target) for node in program.graph.nodes if str(node.target).startswith("famba.")})
    if foreign:
        raise ExportError(f"{', '.join(foreign)}: no form in torch's own operations is known (famba/export/program.py)")
    return program


def _tidy(program: ExportedProgram) -> None:
    """Remove what states the obvious of this machine: where code lies, and that tensors are on the CPU."""
    # Some releases write down questions about dtypes, which they cannot read again.
    program.graph.eliminate_dead_code()
    for node in list(program.graph.nodes):
        for note in _NOTES:
            node.meta.pop(note, None)
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            program.graph.erase_node(node)
    program.graph_module.recompile()
