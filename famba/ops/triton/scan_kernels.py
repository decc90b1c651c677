"""Run the selective scan on a GPU, for the directions of a mixer side by side.

A thread owns a channel, with its states in registers, and walks over the length: the exponentials, 16 a clock and
multiprocessor on an A100 or H100, then set the pace, where a scan in parallel over the length would compute and shuffle
several times as much; a batch of images times channels keeps a device busy without that.
The forward keeps nothing. The backward walks forward once more, noting the states that enter each tile of steps, then
goes through the tiles from the last to the first; in a tile it takes one state at a time, for all steps at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from famba.ops.triton.launch import Configuration, kernel

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _softplus(x):
    """Return log(1 + e^x), exact where it is small too: log(1 + e) is 2 artanh(s), s = e / (2 + e), a series."""
    e = tl.exp(-tl.abs(x))
    s = e / (2 + e)
    q = s * s
    tail = 1 / 9 + q * (1 / 11 + q * (1 / 13 + q * (1 / 15)))
    return tl.maximum(x, 0.0) + 2 * s * (1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * tail))))


@triton.jit
def _softplus_slope(size):
    """Return the slope of softplus where its result is `size`, 1 - e^-size, exact to float32 where it is small too."""
    s = size
    series = s * (1 - s / 2 * (1 - s / 3 * (1 - s / 4 * (1 - s / 5 * (1 - s / 6)))))
    return tl.where(s < 0.25, series, 1 - tl.exp(-s))


@triton.jit
def _step_sizes(raw, bias, SOFTPLUS: tl.constexpr):
    shifted = raw.to(tl.float32) + bias
    return _softplus(shifted) if SOFTPLUS else shifted


@triton.jit
def _row(x, index):
    """Return the row of x (rows, columns) where index (rows, 1) is true."""
    # Added as bits: a row that is known when the kernel is compiled then costs nothing, since a compiler leaves out
    # adding the integer 0, but not adding 0.0.
    bits = tl.where(index, x.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, 0).to(tl.float32, bitcast=True)


@triton.jit
def _store_measures(
    sums, size, out, step, steps, channels, blocks, MEASURE: tl.constexpr, MEASURED: tl.constexpr
):  # fmt: skip
    """Write the sums of step sizes and of positive results (channels,) of a step, over so many channels each."""
    if MEASURE:
        block = tl.program_id(0) % blocks
        held = block * size.shape[0] + tl.arange(0, size.shape[0]) < channels
        group = block * (size.shape[0] // MEASURED) + tl.arange(0, size.shape[0] // MEASURED)
        groups = tl.cdiv(channels, MEASURED)
        rows = tl.reshape(tl.where(held, size, 0.0), [size.shape[0] // MEASURED, MEASURED])
        tl.store(sums + step * groups + group, tl.sum(rows, 1), mask=group < groups)
        # NaN stays NaN.
        rows = tl.reshape(tl.where(held & ~(out < 0.0), out, 0.0), [size.shape[0] // MEASURED, MEASURED])
        step += (step * 0 + tl.num_programs(1)) * steps
        tl.store(sums + step * groups + group, tl.sum(rows, 1), mask=group < groups)


@kernel(
    [
        Configuration({"BLOCK": 128}, warps=4, stages=1),
        Configuration({"BLOCK": 32}, warps=1, stages=1),
        # States over warps, each channel's over four threads: for small batches.
        Configuration({"BLOCK": 32}, warps=4, stages=1),
    ],
    key=["channels", "STATES", "ENTERING"],
)
def scan_forward(
    u, delta, B, C, z, parameters, y, dy, dz, entering, sums, batch, length, channels, z_row, dy_row, scale,
    STATES: tl.constexpr, B_ROW: tl.constexpr, C_ROW: tl.constexpr, REVERSE: tl.constexpr, REVERSE2: tl.constexpr,
    SKIP: tl.constexpr, SOFTPLUS: tl.constexpr, GATE: tl.constexpr, OUTPUT: tl.constexpr, MEASURE: tl.constexpr,
    MEASURED: tl.constexpr, GATE_GRADIENT: tl.constexpr, ENTERING: tl.constexpr, BLOCK_STATES: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Walk over the length; write results, or what the backward needs, whichever is asked for."""
    blocks = tl.cdiv(channels, BLOCK)
    channel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    direction = tl.program_id(1)
    sequence = direction * batch + image
    held = channel < channels
    state = tl.arange(0, BLOCK_STATES)
    real = state < STATES
    matrix = state[:, None] * channels + channel[None, :]
    inside = real[:, None] & held[None, :]

    parameters += direction * (STATES + 2) * channels
    decay = tl.load(parameters + matrix, mask=inside, other=0.0) * _LOG2_E
    skip = tl.load(parameters + STATES * channels + channel, mask=held, other=0.0)
    bias = tl.load(parameters + (STATES + 1) * channels + channel, mask=held, other=0.0)

    ahead = tl.where(direction == 0, 1 - 2 * REVERSE, 1 - 2 * REVERSE2)
    t = image * 0 + tl.where(ahead < 0, length - 1, 0)
    own = sequence * length * channels + channel
    B += sequence * length * B_ROW + state
    C += sequence * length * C_ROW + state
    h = tl.zeros([BLOCK_STATES, BLOCK], tl.float32)
    # What a step reads is asked for a step before, so that it arrives while the states are worked out.
    next_u = tl.load(u + own + t * channels, mask=held, other=0.0)
    next_delta = tl.load(delta + own + t * channels, mask=held, other=0.0)
    next_B = tl.load(B + t * B_ROW, mask=real, other=0.0)
    next_C = tl.load(C + t * C_ROW, mask=real, other=0.0)
    if GATE:
        z += image * length * z_row + channel
        next_z = tl.load(z + t * z_row, mask=held, other=0.0)
    for i in range(length):
        now_u, now_B, now_C = next_u.to(tl.float32), next_B.to(tl.float32), next_C.to(tl.float32)
        size = _step_sizes(next_delta, bias, SOFTPLUS)
        then = t + ahead
        more = (then >= 0) & (then < length)
        wanted = channel < tl.where(more, channels, 0)
        wanted_states = state < tl.where(more, STATES, 0)
        next_u = tl.load(u + own + then * channels, mask=wanted, other=0.0)
        next_delta = tl.load(delta + own + then * channels, mask=wanted, other=0.0)
        next_B = tl.load(B + then * B_ROW, mask=wanted_states, other=0.0)
        next_C = tl.load(C + then * C_ROW, mask=wanted_states, other=0.0)
        if ENTERING:  # noqa: SIM102 - this is known when the kernel is compiled, the next is not
            if i % TILE == 0:
                tile = sequence * tl.cdiv(length, TILE) + i // TILE
                tl.store(entering + tile * STATES * channels + matrix, h, mask=inside)
        h = tl.exp2(size[None, :] * decay) * h + now_B[:, None] * (size * now_u)[None, :]
        if STATES < BLOCK_STATES:
            h = tl.where(real[:, None], h, 0.0)
        out = tl.sum(now_C[:, None] * h, 0)
        if SKIP:
            out += skip * now_u
        _store_measures(sums, size, out, sequence * length + t, batch * length, channels, blocks, MEASURE, MEASURED)
        out *= scale
        if GATE:
            now_z = next_z.to(tl.float32)
            next_z = tl.load(z + then * z_row, mask=wanted, other=0.0)
            gate = tl.sigmoid(now_z)
            if GATE_GRADIENT:
                grad = tl.load(dy + (image * length + t) * dy_row + channel, mask=held, other=0.0).to(tl.float32)
                grad *= out * gate * (1 + now_z * (1 - gate))
                tl.store(dz + own + t * channels, grad.to(dz.dtype.element_ty), mask=held)
            out *= now_z * gate
        if OUTPUT:
            tl.store(y + own + t * channels, out.to(y.dtype.element_ty), mask=held)
        t = then


# One configuration: the backward's block and warps belong together, see _BLOCK of `scan`.
@kernel([Configuration({}, warps=4, stages=1)])
def scan_backward(
    u, delta, B, C, z, parameters, dy, entering, carried, du, ddelta, dBC, partials, batch, length, channels, z_row,
    dy_row, scale,
    STATES: tl.constexpr, B_ROW: tl.constexpr, C_ROW: tl.constexpr, REVERSE: tl.constexpr, REVERSE2: tl.constexpr,
    SKIP: tl.constexpr, SOFTPLUS: tl.constexpr, GATE: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Go through the tiles from the last to the first; write gradients and partial sums."""
    blocks = tl.cdiv(channels, BLOCK)
    block = tl.program_id(0) % blocks
    lane = tl.arange(0, BLOCK)
    held = block * BLOCK + lane < channels
    image = (tl.program_id(0) // blocks).to(tl.int64)
    direction = tl.program_id(1)
    sequence = direction * batch + image
    tiles = tl.cdiv(length, TILE)
    ahead = tl.where(direction == 0, 1 - 2 * REVERSE, 1 - 2 * REVERSE2)

    # Of this program's sequence and channels; within a sequence offsets fit 32 bits, and registers are few.
    own = sequence * length * channels + block * BLOCK
    u += own
    delta += own
    du += own
    ddelta += own
    dy += image * length * dy_row + block * BLOCK
    B += sequence * length * B_ROW
    C += sequence * length * C_ROW
    parameters += direction * (STATES + 2) * channels + block * BLOCK + lane
    partials += sequence * (STATES + 2) * channels + block * BLOCK + lane
    carried += sequence * STATES * channels + block * BLOCK + lane
    entering += sequence * tiles * STATES * channels + block * BLOCK + lane
    dB = dBC + (((image * 0 + block) * 2 * tl.num_programs(1) + direction) * batch + image) * STATES * length
    dC = dB + (image * 0 + tl.num_programs(1)) * batch * STATES * length
    skip = tl.load(parameters + STATES * channels, mask=held, other=0.0)
    bias = tl.load(parameters + (STATES + 1) * channels, mask=held, other=0.0)

    for n in range(STATES):
        tl.store(carried + n * channels, tl.zeros([BLOCK], tl.float32), mask=held)
        tl.store(partials + n * channels, tl.zeros([BLOCK], tl.float32), mask=held)
    tl.debug_barrier()

    step = tl.arange(0, TILE)
    total_skip = tl.zeros([BLOCK], tl.float32)
    total_bias = tl.zeros([BLOCK], tl.float32)
    for done in range(tiles):
        tile = tiles - 1 - done
        t = tile * TILE + step
        within = t < length
        t = tl.where(ahead < 0, length - 1 - t, t)
        inside = within[:, None] & held[None, :]
        here = t[:, None] * channels + lane[None, :]
        now_u = tl.load(u + here, mask=inside, other=0.0).to(tl.float32)
        raw = tl.load(delta + here, mask=inside, other=0.0)
        # Outside nothing decays and nothing enters: 0 times infinity must not come in.
        size = tl.where(inside, _step_sizes(raw, bias[None, :], SOFTPLUS), 0.0)
        grad = tl.load(dy + (t[:, None] * dy_row + lane[None, :]), mask=inside, other=0.0).to(tl.float32) * scale
        if GATE:
            gates = z + image * length * z_row + block * BLOCK
            now_z = tl.load(gates + (t[:, None] * z_row + lane[None, :]), mask=inside, other=0.0).to(tl.float32)
            grad *= now_z * tl.sigmoid(now_z)
        taken = size * now_u
        # Gradients of what enters the states, and of the exponents to base 2.
        d_taken = tl.zeros([TILE, BLOCK], tl.float32)
        d_power = tl.zeros([TILE, BLOCK], tl.float32)
        total_skip += tl.sum(grad * now_u, 0)
        for n in range(STATES):
            rate = tl.load(parameters + n * channels, mask=held, other=0.0) * _LOG2_E
            now_B = tl.load(B + (t * B_ROW + n), mask=within, other=0.0).to(tl.float32)[:, None]
            now_C = tl.load(C + (t * C_ROW + n), mask=within, other=0.0).to(tl.float32)[:, None]
            decay = tl.exp2(size * rate[None, :])
            enters = taken * now_B
            carry = tl.load(entering + (tile * STATES + n) * channels, mask=held, other=0.0)
            h = tl.zeros([TILE, BLOCK], tl.float32)
            kept = tl.zeros([TILE, BLOCK], tl.float32)
            for k in tl.static_range(TILE):
                row = (step == k)[:, None]
                stays = _row(decay, row) * carry
                carry = stays + _row(enters, row)
                kept = tl.where(row, stays[None, :], kept)
                h = tl.where(row, carry[None, :], h)
            carry = tl.load(carried + n * channels, mask=held, other=0.0)
            direct = grad * now_C
            dh = tl.zeros([TILE, BLOCK], tl.float32)
            for k in tl.static_range(TILE):
                row = (step == TILE - 1 - k)[:, None]
                here_dh = _row(direct, row) + carry
                carry = _row(decay, row) * here_dh
                dh = tl.where(row, here_dh[None, :], dh)
            tl.store(carried + n * channels, carry, mask=held)
            d_decay = dh * kept
            total = tl.load(partials + n * channels, mask=held, other=0.0)
            tl.store(partials + n * channels, total + tl.sum(d_decay * size, 0), mask=held)
            d_power += d_decay * rate[None, :]
            d_taken += dh * now_B
            place = n * length + t
            tl.store(dB + place, tl.sum(dh * taken, 1), mask=within)
            tl.store(dC + place, tl.sum(h * grad, 1), mask=within)
        out = d_taken * size
        if SKIP:
            out += grad * skip[None, :]
        tl.store(du + here, out.to(du.dtype.element_ty), mask=inside)
        out = d_taken * now_u + d_power * _LN_2
        if SOFTPLUS:
            out *= _softplus_slope(size)
        tl.store(ddelta + here, out.to(ddelta.dtype.element_ty), mask=inside)
        total_bias += tl.sum(out, 0)
        # Before the next tile reads what this one has written into `carried` and `partials`.
        tl.debug_barrier()
    tl.store(partials + STATES * channels, total_skip, mask=held)
    tl.store(partials + (STATES + 1) * channels, total_bias, mask=held)


@kernel([Configuration({"BLOCK": 64}, warps=4)])
def state_sums(
    dBC, dB, dC, blocks, sequences, length,
    STATES: tl.constexpr, B_ROW: tl.constexpr, C_ROW: tl.constexpr, BLOCK_STATES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up the gradients of B and C over the blocks of channels, and turn them from (n, l) to (l, n)."""
    tiles = tl.cdiv(length, BLOCK)
    sequence = (tl.program_id(0) // tiles).to(tl.int64)
    step = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    state = tl.arange(0, BLOCK_STATES)
    inside = (step < length)[:, None] & (state < STATES)[None, :]
    place = state[None, :] * length + step[:, None]
    total = tl.zeros([BLOCK, BLOCK_STATES], tl.float32)
    for block in range(blocks):
        part = (sequence * 0 + block * 2 + tl.program_id(1)) * sequences + sequence
        total += tl.load(dBC + part * STATES * length + place, mask=inside, other=0.0)
    row = sequence * length + step[:, None]
    if tl.program_id(1) == 0:
        tl.store(dB + row * B_ROW + state[None, :], total.to(dB.dtype.element_ty), mask=inside)
    else:
        tl.store(dC + row * C_ROW + state[None, :], total.to(dC.dtype.element_ty), mask=inside)


@kernel([Configuration({"BLOCK": 32, "BLOCK_ROWS": 32}, warps=4)])
def column_sums(
    partials, first, second, third, first2, second2, third2, rows,
    CHANNELS: tl.constexpr, SLOTS: tl.constexpr, TAPS: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Add up the rows of partials (directions, rows, SLOTS, CHANNELS), a slot and a block of channels to a program.

    The first TAPS slots go to `first` (CHANNELS, TAPS), the next two to `second` and `third` (CHANNELS,), where there
    are so many OUTPUTS.
    """
    blocks: tl.constexpr = (CHANNELS + BLOCK - 1) // BLOCK
    slot = tl.program_id(0) // blocks
    channel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    held = channel < CHANNELS
    partials += tl.program_id(1).to(tl.int64) * rows * SLOTS * CHANNELS + slot * CHANNELS + channel[None, :]
    sums = tl.zeros([BLOCK_ROWS, BLOCK], tl.float32)
    for start in range(0, rows, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)[:, None]
        inside = (row < rows) & held[None, :]
        sums += tl.load(partials + row.to(tl.int64) * (SLOTS * CHANNELS), mask=inside, other=0.0)
    total = tl.sum(sums, 0)
    if tl.program_id(1) == 1:
        first, second, third = first2, second2, third2
    tl.store(first + channel * TAPS + slot, total, mask=held & (slot < TAPS))
    if OUTPUTS > 1:
        tl.store(second + channel, total, mask=held & (slot == TAPS))
    if OUTPUTS > 2:
        tl.store(third + channel, total, mask=held & (slot == TAPS + 1))
