"""Fuse tokens: a program gathers what belongs to a block of places, so that nothing is added by atomics."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from famba.ops.layout import even_rows
from famba.ops.triton.launch import Configuration, Grid, kernel


def fuse_tokens(x: Tensor, places: Tensor, weights: Tensor, length: int) -> Tensor:
    """Return the fused tokens (b, length, c), in one launch; a token whose place is outside is left out."""
    batch, _, channels = x.shape
    y = torch.empty(batch, length, channels, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x = even_rows(x)
    given = _arguments(places, weights, length, channels)
    _fuse_forward.launch(_grid(batch, length, channels), x=x, y=y, X_ROW=x.stride(1), **given)
    return y


def fuse_tokens_backward(dy: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """Return the gradient of the tokens, in one launch; zero for a token whose place is outside."""
    batch, tokens = places.shape
    length, channels = dy.shape[1:]
    dx = torch.empty(batch, tokens, channels, dtype=dy.dtype, device=dy.device)
    if dx.numel() == 0:
        return dx
    dy = even_rows(dy)
    given = _arguments(places, weights, length, channels)
    _fuse_backward.launch(_grid(batch, tokens, channels), dy=dy, dx=dx, DY_ROW=dy.stride(1), **given)
    return dx


def _arguments(places: Tensor, weights: Tensor, length: int, channels: int) -> dict[str, Any]:
    """Return what both kernels take."""
    sizes = {"tokens": places.shape[1], "length": length, "CHANNELS": channels}
    return {"places": places.contiguous(), "weights": weights.contiguous(), **sizes}


def _grid(batch: int, rows: int, channels: int) -> Grid:
    return lambda constants: (batch * triton.cdiv(rows, constants["ROWS"]), triton.cdiv(channels, constants["BLOCK"]))


@triton.jit
def _places(places, token, tokens, length):
    """Return the places of some tokens of an image, -1 where the token or its place does not exist."""
    place = tl.load(places + token, mask=token < tokens, other=-1)
    return tl.where((place >= 0) & (place < length), place, -1).to(tl.int32)


@kernel(
    [
        Configuration({"ROWS": rows, "BLOCK": block, "LOOK": look})
        for rows, block, look in ((16, 64, 64), (32, 64, 128), (16, 256, 64))
    ],
    key=["CHANNELS"],
)
def _fuse_forward(
    x, places, weights, y, tokens, length,
    CHANNELS: tl.constexpr, X_ROW: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, LOOK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(length, ROWS)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    held = channel < CHANNELS
    start = x + image * tokens * X_ROW
    # Negative zero is what leaves every number as it is when it is added.
    total = tl.zeros([ROWS, BLOCK], tl.float32) * -1.0
    for first in range(0, tokens, LOOK):
        token = first + tl.arange(0, LOOK)
        place = _places(places + image * tokens, token, tokens, length)
        mine = place[None, :] == row[:, None]
        # The tokens of each place in turn, ascending; `tokens` where there is no other.
        turn = tl.min(tl.where(mine, token[None, :], tokens), 1)
        while tl.min(turn, 0) < tokens:
            found = turn < tokens
            weight = tl.load(weights + image * tokens + turn, mask=found, other=0.0).to(tl.float32)
            inside = found[:, None] & held[None, :]
            value = tl.load(start + turn[:, None] * X_ROW + channel[None, :], mask=inside, other=0.0).to(tl.float32)
            total = tl.where(found[:, None], total + value * weight[:, None], total)
            turn = tl.min(tl.where(mine & (token[None, :] > turn[:, None]), token[None, :], tokens), 1)
    out = y + image * length * CHANNELS
    inside = (row < length)[:, None] & held[None, :]
    tl.store(out + row[:, None] * CHANNELS + channel[None, :], total.to(y.dtype.element_ty), mask=inside)


@kernel(
    [Configuration({"ROWS": rows, "BLOCK": block}) for rows, block in ((16, 64), (16, 256), (32, 128))],
    key=["CHANNELS"],
)
def _fuse_backward(
    dy, places, weights, dx, tokens, length,
    CHANNELS: tl.constexpr, DY_ROW: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(tokens, ROWS)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    token = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = _places(places + image * tokens, token, tokens, length)
    weight = tl.load(weights + image * tokens + token, mask=token < tokens, other=0.0).to(tl.float32)
    start = dy + image * length * DY_ROW
    inside = (place >= 0)[:, None] & (channel < CHANNELS)[None, :]
    grad = tl.load(start + place[:, None] * DY_ROW + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    out = dx + image * tokens * CHANNELS
    inside = (token < tokens)[:, None] & (channel < CHANNELS)[None, :]
    grad *= weight[:, None]
    tl.store(out + token[:, None] * CHANNELS + channel[None, :], grad.to(dx.dtype.element_ty), mask=inside)
