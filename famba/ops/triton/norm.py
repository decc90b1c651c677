"""Add to the residual stream and RMS-normalise, a block of whole rows to a program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from famba.errors import BackendError
from famba.ops.layout import even_rows, parameter
from famba.ops.triton.launch import Configuration, kernel
from famba.ops.triton.sums import column_sums

# A row lies in the registers of one program.
_MOST_CHANNELS = 8192
# Numbers that a program has in hand at once, in rows of which the channels are rounded up to a power of two.
_TILE = 4096
# Programs of the backward, each with a partial sum of the weight's gradient.
_PROGRAMS = 512


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the normed sum in x's dtype and the sum in float32; at most 8192 channels."""
    _check_channels(x)
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
    """Return the gradients of the sum, float32, and of weight; one launch, and one that adds up the programs' sums."""
    _check_channels(total)
    grad = torch.empty(total.shape, dtype=torch.float32, device=total.device)
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    channels = total.shape[2]
    if channels == 0:
        return grad, dweight
    rows, block, count = _blocks(total)
    programs = min(count, _PROGRAMS)
    partials = torch.empty(programs, channels, dtype=torch.float32, device=total.device)
    if programs:
        dnormed, dtotal = even_rows(dnormed), even_rows(dtotal)
        tensors = {"dnormed": dnormed, "dtotal": dtotal, "total": parameter(total), "weight": parameter(weight)}
        sizes = {
            "rows": total.shape[0] * total.shape[1],
            "eps": eps,
            "CHANNELS": channels,
            "ROWS": rows,
            "BLOCK": block,
        }
        strides = {"DNORMED_ROW": dnormed.stride(1), "DTOTAL_ROW": dtotal.stride(1)}
        written = {"grad": grad, "partials": partials, "programs": programs}
        _norm_backward.launch(lambda constants: (programs,), **tensors, **sizes, **strides, **written)
    grid = lambda constants: (triton.cdiv(channels, constants["BLOCK"]),)  # noqa: E731 - as Triton writes grids
    _norm_sums.launch(grid, partials=partials, programs=programs, dweight=dweight, CHANNELS=channels)
    return grad, dweight


def _check_channels(x: Tensor) -> None:
    if x.shape[2] > _MOST_CHANNELS:
        raise BackendError(
            f"add_rms_norm: {x.shape[2]} channels; backend 'triton' takes at most {_MOST_CHANNELS}; "
            "use_backend('reference') takes any"
        )


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


@kernel([Configuration({"BLOCK": 32, "BLOCK_ROWS": 32}, warps=4)])
def _norm_sums(
    partials, programs, dweight,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < CHANNELS
    total = column_sums(partials, programs, channel, inside, CHANNELS, BLOCK_ROWS, BLOCK)
    tl.store(dweight + channel, total.to(dweight.dtype.element_ty), mask=inside)
