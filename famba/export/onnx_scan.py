"""What ONNX has other operators for than torch: the scan's states, and a stable sort.

Imported only where an ONNX file is written, since it needs the package onnxscript.
"""

# Annotations are evaluated here, not postponed: onnxscript and torch read types from them.
from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnxscript import FLOAT, graph, script
from onnxscript import opset18 as op
from torch import Tensor

from famba.export.recurrence import chunked

_FIRST_TO_LAST, _LAST_TO_FIRST = 0, 1  # as ONNX numbers a Scan's directions


@torch.library.custom_op("famba_export::recurrence", mutates_args=())
def recurrence(delta: Tensor, gain: Tensor, A: Tensor, B: Tensor, C: Tensor, reverse: bool) -> Tensor:
    """What `famba.export.recurrence.chunked` computes, in one op that stays one while a model is traced."""
    return chunked(delta, gain, A, B, C, reverse)


@recurrence.register_fake
def _shape(delta: Tensor, gain: Tensor, A: Tensor, B: Tensor, C: Tensor, reverse: bool) -> Tensor:
    return delta.new_empty(delta.shape)


@script(default_opset=op)
def _scan(
    delta: FLOAT,
    gain: FLOAT,
    rates: FLOAT,
    B: FLOAT,
    C: FLOAT,
    inward: Sequence[int],
    outward: Sequence[int],
) -> FLOAT:
    @graph()
    def step(h: FLOAT[...], delta_t: FLOAT[...], gain_t: FLOAT[...], B_t: FLOAT[...], C_t: FLOAT[...]):  # type: ignore[no-untyped-def]
        # States are (b, n, d), rates (n, d): with the channels innermost.
        decay = op.Exp(op.Mul(op.Unsqueeze(delta_t, op.Constant(value_ints=[1])), rates))
        gain_row = op.Unsqueeze(gain_t, op.Constant(value_ints=[1]))
        B_column = op.Unsqueeze(B_t, op.Constant(value_ints=[2]))
        after = op.Add(op.Mul(decay, h), op.Mul(gain_row, B_column))
        read = op.MatMul(op.Unsqueeze(C_t, op.Constant(value_ints=[1])), after)
        return after, op.Squeeze(read, op.Constant(value_ints=[1]))

    batch = op.Shape(delta, start=0, end=1)
    start = op.Expand(op.Constant(value_float=0.0), op.Concat(batch, op.Shape(rates), axis=0))
    _, y = op.Scan(
        start,
        delta,
        gain,
        B,
        C,
        body=step,
        num_scan_inputs=4,
        scan_input_axes=[1, 1, 1, 1],
        scan_output_axes=[1],
        scan_input_directions=inward,
        scan_output_directions=outward,
    )
    return y


def _recurrence(delta: FLOAT, gain: FLOAT, A: FLOAT, B: FLOAT, C: FLOAT, reverse: bool) -> FLOAT:
    way = _LAST_TO_FIRST if reverse else _FIRST_TO_LAST
    return _scan(delta, gain, op.Transpose(A, perm=[1, 0]), B, C, inward=[way] * 4, outward=[way])


def _sort(values: FLOAT, *, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    # Of equal values, TopK has the one of lower index first: it sorts stably, in both directions.
    sizes = op.Shape(values)
    count = op.Gather(sizes, op.Constant(value_ints=[dim]), axis=0)
    return op.TopK(values, count, axis=dim, largest=int(descending), sorted=1)


def _argsort(values: FLOAT, *, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    return _sort(values, stable=stable, dim=dim, descending=descending)[1]


TRANSLATIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.famba_export.recurrence.default: _recurrence,
    torch.ops.aten.sort.stable: _sort,
    torch.ops.aten.argsort.stable: _argsort,
}
"""From an operation of a traced program to what writes it in ONNX; as torch.onnx's custom_translation_table."""
