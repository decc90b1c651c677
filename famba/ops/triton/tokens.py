"""Match and fuse tokens.

Matching takes two launches: who is closest to whom, then who fuses, and where everyone goes. The second kernel finds
everything by counting: a token's rank is the number of tokens that are closer, its place the number of tokens that stay
before it. So no program waits for what another, or another of its own threads, has written. Triton compiles the second
kernel once for each power of two of half the tokens, the first for each number of channels.

Fusing: a program gathers what belongs to a block of places, so that nothing is added by atomics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from famba.errors import BackendError
from famba.ops.inputs import even_rows
from famba.ops.triton.launch import Configuration, Grid, kernel

# Half of them lie in the registers of one program.
_MOST_TOKENS = 4096
# Pairs that a program of the second kernel compares at once.
_PAIRS = 4096


def match_tokens(
    metric: Tensor, leading: int, protected: Tensor | None, sizes: Tensor | None, r: int, order: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return places, shares and sums of sizes; of at most 4096 tokens."""
    batch, length, channels = metric.shape
    if length > _MOST_TOKENS:
        limits = f"{length} tokens; backend 'triton' takes at most {_MOST_TOKENS}"
        raise BackendError(f"match_tokens: {limits}; use_backend('reference') takes any")
    places = metric.new_empty(batch, length, dtype=torch.int64)
    shares, totals = (metric.new_empty(batch, count, dtype=torch.float32) for count in (length, length - r))
    if batch == 0:
        return places, shares, totals
    metric = even_rows(metric)
    guards = leading if protected is None else protected.shape[1]
    in_a = (length - guards + 1 - guards % 2) // 2
    closest, partner = (metric.new_empty(batch, in_a, dtype=dtype) for dtype in (torch.float32, torch.int32))
    apart = 0 if protected is None or protected.shape[0] == 1 else guards
    listed = {"protected": None if protected is None else protected.contiguous(), "LISTED": protected is not None}
    given = {"guards": guards, "guards_apart": apart, "length": length, **listed}
    given |= {"closest": closest, "partner": partner}
    grid = lambda constants: (batch * triton.cdiv(in_a, constants["BLOCK_A"]),)  # noqa: E731 - as Triton writes grids
    _closest_partners.launch(grid, metric=metric, CHANNELS=channels, ROW=metric.stride(1), **given)
    block = max(16, triton.next_power_of_2(in_a))
    blocks = {"BLOCK_A": block, "BLOCK": max(2, _PAIRS // block)}
    sized = {"sizes": None if sizes is None else sizes.contiguous(), "SIZED": sizes is not None}
    results = {"places": places, "shares": shares, "totals": totals, "r": r, "TOME": order == "tome"}
    _places.launch(lambda constants: (batch,), **results, **sized, **blocks, **given)
    return places, shares, totals


@triton.jit
def _free_before(place, protected, guards, LISTED: tl.constexpr):
    """Count the tokens before a place that may fuse."""
    before = tl.maximum(place - guards, 0)
    if LISTED:
        before = place
        for i in range(guards):
            before -= (tl.load(protected + i) < place).to(tl.int32)
    return before


@triton.jit
def _is_free(place, protected, guards, LISTED: tl.constexpr):
    """Return whether the token at a place may fuse."""
    free = place >= guards
    if LISTED:
        free = place >= 0
        for i in range(guards):
            free &= tl.load(protected + i) != place
    return free


@triton.jit
def _free_place(index, protected, guards, LISTED: tl.constexpr):
    """Return the places of the tokens that have an index among those that may fuse."""
    place = index + guards
    if LISTED:
        # The guards that a place passes move it on, past others: as many times as there are guards at most.
        place = index
        for _ in range(guards):
            passed = index * 0
            for i in range(guards):
                passed += (tl.load(protected + i) <= place).to(tl.int32)
            place = index + passed
    return place


@triton.jit
def _tile(metric, row, channel, CHANNELS: tl.constexpr):
    """Return some channels, in float32, of tokens whose numbers begin at `row`; 0 beyond the last channel."""
    inside = (channel < CHANNELS)[None, :]
    return tl.load(metric + (row[:, None] + channel[None, :]), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _inverse_norm(metric, row, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """One over the lengths of tokens, as torch.nn.functional.normalize limits them."""
    squares = tl.zeros([row.shape[0], BLOCK], tl.float32)
    for first in range(0, CHANNELS, BLOCK):
        x = _tile(metric, row, first + tl.arange(0, BLOCK), CHANNELS)
        squares += x * x
    return 1.0 / tl.maximum(tl.sqrt(tl.sum(squares, 1)), 1e-12, propagate_nan=tl.PropagateNan.ALL)


@kernel(
    [
        Configuration({"BLOCK_A": 32, "BLOCK_B": 32, "BLOCK": 16}, warps=4, registers=128),
        # The same BLOCK: in another order of addition another of two near-ties might win.
        Configuration({"BLOCK_A": 16, "BLOCK_B": 32, "BLOCK": 16}, warps=4, registers=128),
    ],
    key=["CHANNELS"],
)
def _closest_partners(
    metric, protected, closest, partner, length, guards, guards_apart,
    CHANNELS: tl.constexpr, ROW: tl.constexpr, LISTED: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # Free tokens are dealt out in turn; with an odd number of guards before them, to B first.
    odd = guards % 2
    in_a = (length - guards + 1 - odd) // 2
    in_b = (length - guards + odd) // 2
    blocks = tl.cdiv(in_a, BLOCK_A)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    if LISTED:
        protected += image * guards_apart
    metric += image * length * ROW
    a = tl.program_id(0) % blocks * BLOCK_A + tl.arange(0, BLOCK_A)
    # Beyond the last token the last is read again, and what comes of it is not looked at.
    row_a = _free_place(2 * tl.minimum(a, in_a - 1) + odd, protected, guards, LISTED) * ROW
    inverse_a = _inverse_norm(metric, row_a, CHANNELS, BLOCK)
    best = tl.full([BLOCK_A], -4.0, tl.float32)
    best_b = tl.zeros([BLOCK_A], tl.int32)
    for first in range(0, in_b, BLOCK_B):
        b = first + tl.arange(0, BLOCK_B)
        row_b = _free_place(2 * tl.minimum(b, in_b - 1) + 1 - odd, protected, guards, LISTED) * ROW
        inverse_b = _inverse_norm(metric, row_b, CHANNELS, BLOCK)
        similarity = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
        for start in range(0, CHANNELS, BLOCK):
            channel = start + tl.arange(0, BLOCK)
            unit_a = _tile(metric, row_a, channel, CHANNELS) * inverse_a[:, None]
            unit_b = _tile(metric, row_b, channel, CHANNELS) * inverse_b[:, None]
            # TF32 would leave it to the device which tokens fuse.
            similarity = tl.dot(unit_a, tl.trans(unit_b), similarity, input_precision="ieee")
        # NaN counts as the largest, as in torch; a cosine is at most 1 but for rounding.
        similarity = tl.where(similarity != similarity, 3.0, similarity)
        similarity = tl.where((b < in_b)[None, :], similarity, -4.0)
        nearest = tl.max(similarity, 1)
        nearest_b = tl.min(tl.where(similarity == nearest[:, None], b[None, :], in_b), 1)
        closer = nearest > best
        best_b = tl.where(closer, nearest_b, best_b)
        best = tl.where(closer, nearest, best)
    tl.store(closest + image * in_a + a, best, mask=a < in_a)
    place = _free_place(2 * best_b + 1 - odd, protected, guards, LISTED)
    tl.store(partner + image * in_a + a, place, mask=a < in_a)


@kernel([Configuration(warps=4, registers=168)])
def _places(
    closest, partner, protected, sizes, places, shares, totals, length, guards, guards_apart, r,
    LISTED: tl.constexpr, SIZED: tl.constexpr, TOME: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    odd = guards % 2
    in_a = (length - guards + 1 - odd) // 2
    in_b = (length - guards + odd) // 2
    image = tl.program_id(0).to(tl.int64)
    if LISTED:
        protected += image * guards_apart
    closest += image * in_a
    partner += image * in_a
    # All of A at once. Which of them fuse: those that fewer than r others precede.
    a = tl.arange(0, BLOCK_A)
    mine = tl.load(closest + a, mask=a < in_a, other=-4.0)
    # Counts are in float32, exact up to 2^24: those of whole numbers LLVM packs into bytes, through local memory.
    rank = tl.zeros([BLOCK_A], tl.float32)
    for first in range(0, in_a, BLOCK):
        other = first + tl.arange(0, BLOCK)
        theirs = tl.load(closest + other, mask=other < in_a, other=-5.0)
        equal = (theirs[:, None] == mine[None, :]) & (other[:, None] < a[None, :])
        rank += tl.sum(((theirs[:, None] > mine[None, :]) | equal).to(tl.float32), 0)
    fuses = (rank < r) & (a < in_a)
    source = tl.where(fuses, _free_place(2 * a + odd, protected, guards, LISTED), length)
    target = tl.where(fuses, tl.load(partner + a, mask=a < in_a, other=0), length)
    if SIZED:
        sizes += image * length
        size_a = tl.load(sizes + source, mask=fuses, other=0.0).to(tl.float32)
    else:
        size_a = fuses.to(tl.float32)

    # All tokens, some at a time: where each goes, and with whom.
    for first in range(0, length, BLOCK):
        token = first + tl.arange(0, BLOCK)
        moves = source[None, :] == token[:, None]
        goes_to = tl.max(tl.where(moves, target[None, :], -1), 1)
        stays = goes_to < 0
        stand = tl.where(stays, token, goes_to)
        gone = tl.sum((source[None, :] < stand[:, None]).to(tl.float32), 1).to(tl.int32)
        joined = tl.sum(tl.where(target[None, :] == stand[:, None], size_a[None, :], 0.0), 1)
        place = stand - gone
        if TOME:
            free = _free_before(stand, protected, guards, LISTED)
            in_b_before = (free + odd) // 2
            is_b = _is_free(stand, protected, guards, LISTED) & (free % 2 != odd)
            place = tl.where(is_b, length - in_b - r + in_b_before, place - in_b_before)
        if SIZED:
            size = tl.load(sizes + token, mask=token < length, other=1.0).to(tl.float32)
            base = tl.load(sizes + stand, mask=token < length, other=1.0).to(tl.float32)
        else:
            size = tl.full([BLOCK], 1.0, tl.float32)
            base = size
        total = base + joined
        tl.store(places + image * length + token, place.to(tl.int64), mask=token < length)
        # Rounded as division is defined, so that the share of a token alone is 1 exactly.
        tl.store(shares + image * length + token, tl.div_rn(size, total), mask=token < length)
        tl.store(totals + image * (length - r) + place, total, mask=stays & (token < length))


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
def _places_of(places, token, tokens, length):
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
        place = _places_of(places + image * tokens, token, tokens, length)
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
    place = _places_of(places + image * tokens, token, tokens, length)
    weight = tl.load(weights + image * tokens + token, mask=token < tokens, other=0.0).to(tl.float32)
    start = dy + image * length * DY_ROW
    inside = (place >= 0)[:, None] & (channel < CHANNELS)[None, :]
    grad = tl.load(start + place[:, None] * DY_ROW + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    out = dx + image * tokens * CHANNELS
    inside = (token < tokens)[:, None] & (channel < CHANNELS)[None, :]
    grad *= weight[:, None]
    tl.store(out + token[:, None] * CHANNELS + channel[None, :], grad.to(dx.dtype.element_ty), mask=inside)
