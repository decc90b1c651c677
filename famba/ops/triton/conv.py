"""Run the causal depthwise convolution: both directions of a mixer at once, or one.

A program works on a tile of steps and channels of one image, and for all directions. The backward keeps nothing of the
forward: it works out again what entered silu, at each step as often as the kernel has taps, since that moves no memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from famba.ops.directional import Convolution
from famba.ops.inputs import optional_parameter, parameter
from famba.ops.triton.launch import Configuration, Grid, kernel
from famba.ops.triton.scan import column_sums


def tile_steps(width: int) -> int:
    """Return the steps of a tile, on which the number of partial sums depends: fewer where taps fill the registers."""
    return 64 if width <= 4 else 16


def convolve(convolution: Convolution, y: Tensor) -> None:
    """Write results, in one launch."""
    _conv_forward.launch(_grid(convolution), y=y, **_arguments(convolution))


def convolve_backward(
    dys: Tensor, convolution: Convolution, dx: Tensor, dweights: Sequence[Tensor], dbiases: Sequence[Tensor | None]
) -> None:
    """Write gradients, in one launch, and one that adds up the tiles' sums."""
    given = _arguments(convolution)
    tiles, slots = given["batch"] * triton.cdiv(given["length"], given["STEPS"]), given["WIDTH"] + 1
    partials = dx.new_empty(len(dweights) * tiles, slots, given["CHANNELS"], dtype=torch.float32)
    taps = triton.next_power_of_2(len(dweights) * slots)
    written = {"dx": dx, "DX_ROW": dx.stride(1), "partials": partials}
    _conv_backward.launch(_grid(convolution), dy=dys, **written, TAPS=taps, **given)
    column_sums(partials, dweights, dbiases)


def _grid(convolution: Convolution) -> Grid:
    batch, length, channels = convolution.x.shape
    tiles = batch * triton.cdiv(length, tile_steps(convolution.weights[0].shape[1]))
    return lambda constants: (tiles, triton.cdiv(channels, constants["BLOCK"]))


def _arguments(convolution: Convolution) -> dict[str, Any]:
    """Return what both kernels take. Of one direction alone the second is the first again, and not looked at."""
    x, weights, biases, silu, reverses = convolution
    readable = [parameter(weight) for weight in weights]
    shifts = [optional_parameter(bias) for bias in biases]
    (batch, length, channels), width = x.shape, weights[0].shape[1]
    tensors = {"x": x, "weight": readable[0], "bias": shifts[0], "weight2": readable[-1], "bias2": shifts[-1]}
    sizes = {"batch": batch, "length": length, "CHANNELS": channels, "X_ROW": x.stride(1), "WIDTH": width}
    how = {"DIRECTIONS": len(weights), "REVERSE": reverses[0], "REVERSE2": reverses[-1], "SILU": silu}
    return {**tensors, **sizes, **how, "BIASED": biases[0] is not None, "STEPS": tile_steps(width)}


@triton.jit
def _tile(start, step, channel, length, CHANNELS: tl.constexpr, ROW: tl.constexpr):
    """Return steps of one image, whose rows begin at `start`, in float32; 0 outside."""
    inside = ((step >= 0) & (step < length))[:, None] & (channel < CHANNELS)[None, :]
    return tl.load(start + step[:, None] * ROW + channel[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _tap(weight, channel, k: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """Return one tap of the kernel for each channel, as a row."""
    return tl.load(weight + channel * WIDTH + k, mask=channel < CHANNELS, other=0.0)[None, :]


@triton.jit
def _convolved(
    start, step, channel, length, weight, bias,
    CHANNELS: tl.constexpr, X_ROW: tl.constexpr, WIDTH: tl.constexpr, REVERSE: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Return the convolution before silu at some steps of an image, (steps, channels)."""
    total = tl.zeros([step.shape[0], channel.shape[0]], tl.float32)
    if BIASED:
        total += tl.load(bias + channel, mask=channel < CHANNELS, other=0.0)[None, :]
    for k in tl.static_range(WIDTH):
        there = step + ((WIDTH - 1 - k) if REVERSE else (k - WIDTH + 1))
        seen = _tile(start, there, channel, length, CHANNELS, X_ROW)
        total += seen * _tap(weight, channel, k, CHANNELS, WIDTH)
    return total


@kernel(
    [Configuration({"BLOCK": block}, warps) for block, warps in ((32, 4), (32, 8), (64, 8))],
    key=["CHANNELS", "WIDTH", "DIRECTIONS"],
)
def _conv_forward(
    x, weight, bias, weight2, bias2, y, batch, length,
    CHANNELS: tl.constexpr, X_ROW: tl.constexpr, WIDTH: tl.constexpr, DIRECTIONS: tl.constexpr,
    REVERSE: tl.constexpr, REVERSE2: tl.constexpr, BIASED: tl.constexpr, SILU: tl.constexpr, STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(length, STEPS)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    step = tl.program_id(0) % tiles * STEPS + tl.arange(0, STEPS)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (step < length)[:, None] & (channel < CHANNELS)[None, :]
    start = x + image * length * X_ROW
    for direction in tl.static_range(DIRECTIONS):
        taps, shift = weight if direction == 0 else weight2, bias if direction == 0 else bias2
        turned = REVERSE if direction == 0 else REVERSE2
        total = _convolved(start, step, channel, length, taps, shift, CHANNELS, X_ROW, WIDTH, turned, BIASED)
        if SILU:
            total *= tl.sigmoid(total)
        out = y + (direction * batch + image) * length * CHANNELS
        tl.store(out + step[:, None] * CHANNELS + channel[None, :], total.to(y.dtype.element_ty), mask=inside)


@kernel(
    [Configuration({"BLOCK": block}, warps) for block, warps in ((16, 4), (16, 8), (32, 8))],
    key=["CHANNELS", "WIDTH", "DIRECTIONS"],
)
def _conv_backward(
    dy, x, weight, bias, weight2, bias2, dx, partials, batch, length,
    CHANNELS: tl.constexpr, X_ROW: tl.constexpr, WIDTH: tl.constexpr, DIRECTIONS: tl.constexpr,
    REVERSE: tl.constexpr, REVERSE2: tl.constexpr, BIASED: tl.constexpr, SILU: tl.constexpr, DX_ROW: tl.constexpr,
    TAPS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(length, STEPS)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    step = tl.program_id(0) % tiles * STEPS + tl.arange(0, STEPS)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start = x + image * length * X_ROW
    seen = _tile(start, step, channel, length, CHANNELS, X_ROW)
    total = tl.zeros([STEPS, BLOCK], tl.float32)
    # Row by row the sums for each direction's taps, then for its bias.
    slot = tl.arange(0, TAPS)[:, None]
    sums = tl.zeros([TAPS, BLOCK], tl.float32)
    for direction in tl.static_range(DIRECTIONS):
        begin = dy + (direction * batch + image) * length * CHANNELS
        taps, shift = weight if direction == 0 else weight2, bias if direction == 0 else bias2
        turned = REVERSE if direction == 0 else REVERSE2
        for k in tl.static_range(WIDTH):
            # Where the step of this program's tile is seen through tap k.
            there = step + ((k - WIDTH + 1) if turned else (WIDTH - 1 - k))
            grad = _tile(begin, there, channel, length, CHANNELS, CHANNELS)
            if SILU:
                before = _convolved(start, there, channel, length, taps, shift, CHANNELS, X_ROW, WIDTH, turned, BIASED)
                gate = tl.sigmoid(before)
                grad *= gate * (1 + before * (1 - gate))
            total += grad * _tap(taps, channel, k, CHANNELS, WIDTH)
            sums = tl.where(slot == direction * (WIDTH + 1) + k, tl.sum(grad * seen, 0)[None, :], sums)
            if k == WIDTH - 1:
                sums = tl.where(slot == direction * (WIDTH + 1) + WIDTH, tl.sum(grad, 0)[None, :], sums)
    inside = (step < length)[:, None] & (channel < CHANNELS)[None, :]
    out = dx + image * length * DX_ROW
    tl.store(out + step[:, None] * DX_ROW + channel[None, :], total.to(dx.dtype.element_ty), mask=inside)
    held = (slot < DIRECTIONS * (WIDTH + 1)) & (channel < CHANNELS)[None, :]
    row = (slot // (WIDTH + 1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * (WIDTH + 1) + slot % (WIDTH + 1)
    tl.store(partials + row * CHANNELS + channel[None, :], sums, mask=held)
