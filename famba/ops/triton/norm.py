"""Add to the residual stream and RMS-normalise, a block of whole rows to a program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from famba.errors import BackendError
from famba.ops.inputs import even_rows, parameter
from famba.ops.triton.launch import Configuration, kernel

# A row lies in the registers of one program.
_MOST_CHANNELS = 8192
# Numbers that a program has in hand at once, in rows of which the channels are rounded up to a power of two.
_TILE = 4096
# Programs of the backward, each with a partial sum of the weight's gradient.
_PROGRAMS = 512


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the normed sum in x's dtype and the sum in float32; at most 8192 channels."""
    if x.shape[2] > _MOST_CHANNELS:
        limits = f"{x.shape[2]} channels; backend 'triton' takes at most {_MOST_CHANNELS}"
        raise BackendError(f"add_rms_norm: {limits}; use_backend('reference') takes any")
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return normed, total
    x = even_rows(x)
    residual = None if residual is None else even_rows(residual)
    rows, block, count = _blocks(x)
    tensors = {"x": x, "residual": residual, "weight": parameter(weight), "normed": normed, "total": total}
    sizes = {"rows": x.shape[0] * x.shape[1], "eps": eps, "CHANNELS": x.shape[2], "ROWS": rows, "BLOCK": block}
    strides = {"X_ROW": x.stride(1), "RESIDUAL_ROW": 0 if residual is None else residual.stride(1)}
    _norm_forward.launch(lambda constants: (count,), **tensors, **sizes, **strides, ADDS=residual is not None)
    return normed, total


def add_rms_norm_backward(
    dnormed: Tensor, dtotal: Tensor, total: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the sum, float32, and of weight, whose partial sums torch adds up."""
    grad = torch.empty(total.shape, dtype=torch.float32, device=total.device)
    rows, block, count = _blocks(total)
    programs = min(count, _PROGRAMS)
    partials = grad.new_empty(programs, total.shape[2])
    if grad.numel():
        dnormed, dtotal = even_rows(dnormed), even_rows(dtotal)
        tensors = {"dnormed": dnormed, "dtotal": dtotal, "total": parameter(total), "weight": parameter(weight)}
        tokens = total.shape[0] * total.shape[1]
        sizes = {"rows": tokens, "eps": eps, "CHANNELS": total.shape[2], "ROWS": rows, "BLOCK": block}
        strides = {"DNORMED_ROW": dnormed.stride(1), "DTOTAL_ROW": dtotal.stride(1)}
        written = {"grad": grad, "partials": partials, "programs": programs}
        _norm_backward.launch(lambda constants: (programs,), **tensors, **sizes, **strides, **written)
    return grad, partials.sum(0).to(weight.dtype)


def _blocks(x: Tensor) -> tuple[int, int, int]:
    """Return the rows that a program has in hand, their channels rounded up, and how many such blocks there are."""
    block = triton.next_power_of_2(x.shape[2])
    rows = max(1, _TILE // max(block, _TILE // 64))
    return rows, block, triton.cdiv(x.shape[0] * x.shape[1], rows)


@triton.jit
def _rows_of(x, first, row, channel, inside, ROW: tl.constexpr):
    """Return the rows from `first` (int64) on, in float32; 0 outside."""
    start = x + first * ROW
    return tl.load(start + row[:, None] * ROW + channel[None, :], mask=inside, other=0.0).to(tl.float32)


@kernel([Configuration(warps=8)])
def _norm_forward(
    x, residual, weight, normed, total, rows, eps,
    CHANNELS: tl.constexpr, X_ROW: tl.constexpr, RESIDUAL_ROW: tl.constexpr, ADDS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, channel = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    inside = (first + row < rows)[:, None] & (channel < CHANNELS)[None, :]
    stream = _rows_of(x, first, row, channel, inside, X_ROW)
    if ADDS:
        stream += _rows_of(residual, first, row, channel, inside, RESIDUAL_ROW)
    scale = tl.load(weight + channel, mask=channel < CHANNELS, other=0.0)
    inverse = tl.rsqrt(tl.sum(stream * stream, 1) / CHANNELS + eps)
    start = first * CHANNELS
    place = row[:, None] * CHANNELS + channel[None, :]
    tl.store(total + start + place, stream, mask=inside)
    out = stream * inverse[:, None] * scale[None, :]
    tl.store(normed + start + place, out.to(normed.dtype.element_ty), mask=inside)


@kernel([Configuration(warps=8)])
def _norm_backward(
    dnormed, dtotal, total, weight, grad, partials, rows, programs, eps,
    CHANNELS: tl.constexpr, DNORMED_ROW: tl.constexpr, DTOTAL_ROW: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, channel = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    scale = tl.load(weight + channel, mask=channel < CHANNELS, other=0.0)
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    for turn in range(tl.cdiv(rows, programs * ROWS)):
        first = (tl.program_id(0).to(tl.int64) + turn * programs) * ROWS
        inside = (first + row < rows)[:, None] & (channel < CHANNELS)[None, :]
        stream = _rows_of(total, first, row, channel, inside, CHANNELS)
        inverse = tl.rsqrt(tl.sum(stream * stream, 1) / CHANNELS + eps)[:, None]
        normed = stream * inverse
        out = _rows_of(dnormed, first, row, channel, inside, DNORMED_ROW)
        dweight += out * normed
        out *= scale[None, :]
        out = inverse * (out - normed * (tl.sum(out * normed, 1) / CHANNELS)[:, None])
        out += _rows_of(dtotal, first, row, channel, inside, DTOTAL_ROW)
        place = row[:, None] * CHANNELS + channel[None, :]
        tl.store(grad + first * CHANNELS + place, out, mask=inside)
    tl.store(partials + tl.program_id(0) * CHANNELS + channel, tl.sum(dweight, 0), mask=channel < CHANNELS)
