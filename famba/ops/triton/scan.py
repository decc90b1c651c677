"""The selective scan: one direction, or the two of a mixer in one launch.

A thread owns a channel, with its states in registers, and walks over the length: the exponentials, 16 a clock and
multiprocessor on an A100 or H100, then set the pace, where a scan in parallel over the length would compute and shuffle
several times as much; a batch of images times channels keeps a device busy without that.
The forward keeps nothing. The backward walks forward once more, noting the states that enter each tile of steps, then
goes through the tiles from the last to the first; in a tile it takes one state at a time, for all steps at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from famba.ops.triton.launch import Configuration, activation, kernel

# Steps of a tile in the backward: its rows are registers, its states memory that is in use for one layer at a time.
_TILE = 8
# Channels of a program in the backward, which decide how many partial sums there are. A thread for each: a row then
# lies in one thread's registers, and walking over a tile costs no exchange between threads.
_BLOCK = 128


def scan_state_shape(batch: int, length: int, channels: int, states: int) -> tuple[int, ...]:
    """Shape of what the forward scan keeps for its backward: nothing."""
    return (0,)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Return y, and an empty tensor."""
    scans = _single(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)
    return scan(scans).squeeze(0), u.new_empty(0, dtype=torch.float32)


def selective_scan_backward(
    dy: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    state: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the inputs, each in its input's dtype."""
    grads = scan_backward(_single(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse), dy)
    dA, dD, dbias = grads.parameters(0)
    dB, dC = (x.squeeze(0).transpose(1, 2) for x in grads.BC)
    return (
        grads.u.squeeze(0),
        grads.delta.squeeze(0),
        dA.to(A.dtype),
        dB.to(B.dtype, memory_format=torch.contiguous_format, copy=True),
        dC.to(C.dtype, memory_format=torch.contiguous_format, copy=True),
        None if D is None else dD.to(D.dtype),
        None if grads.z is None else grads.z.squeeze(0),
        None if delta_bias is None else dbias.to(delta_bias.dtype),
    )


@dataclass(frozen=True)
class Scans:
    """Scans over the same tokens, k of them, one or two, as the kernels read them.

    u, delta: (k, b, l, d), contiguous. B, C: (k, b, l, n), rows at equal distances over directions and images too.
    z: (b, l, d), the gate of all, rows at equal distances; or None. parameters: (k, n + 2, d), of `stack_parameters`.
    scale: what every result is multiplied by.
    """

    u: Tensor
    delta: Tensor
    B: Tensor
    C: Tensor
    z: Tensor | None
    parameters: Tensor
    reverses: tuple[bool, ...]
    skip: bool = True
    softplus: bool = True
    scale: float = 1.0

    def arguments(self) -> dict[str, object]:
        """What both kernels take."""
        _, batch, length, channels = self.u.shape
        return {
            "u": self.u,
            "delta": self.delta,
            "B": self.B,
            "C": self.C,
            "z": self.z,
            "parameters": self.parameters,
            "batch": batch,
            "length": length,
            # No constants: knowing them the compiler would read several channels at once, which takes the channels of
            # a thread from it.
            "channels": channels,
            "z_row": 0 if self.z is None else self.z.stride(1),
            "scale": self.scale,
            "STATES": self.B.shape[3],
            "B_ROW": self.B.stride(2),
            "C_ROW": self.C.stride(2),
            "REVERSE": self.reverses[0],
            "REVERSE2": self.reverses[-1],
            "SKIP": self.skip,
            "SOFTPLUS": self.softplus,
            "GATE": self.z is not None,
        }


@dataclass(frozen=True)
class Gradients:
    """Gradients of k scans.

    u and delta (k, b, l, d), z (k, b, l, d) or None: in their inputs' dtypes. BC: of B and C (2, k, b, n, l), partials:
    image by image of the parameters (k, b, n + 2, d), both float32. y: the scans' result again, where it was asked for.
    """

    u: Tensor
    delta: Tensor
    z: Tensor | None
    BC: Tensor
    partials: Tensor
    y: Tensor | None

    def parameters(self, direction: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of A (d, n), D (d,) and delta_bias (d,), float32, each in memory of its own."""
        partials = self.partials[direction]
        dA = partials[:, :-2].sum(0).t().contiguous()
        return dA, partials[:, -2].sum(0), partials[:, -1].sum(0)


def stack_parameters(As: Sequence[Tensor], Ds: Sequence[Tensor | None], biases: Sequence[Tensor | None]) -> Tensor:
    """A, D and delta_bias of k scans in float32, (k, n + 2, d); zeros where there is no D or bias."""
    channels, states = As[0].shape
    nothing = torch.zeros(channels, device=As[0].device) if None in (Ds[0], biases[0]) else None
    rows: list[Tensor] = []
    for A, D, bias in zip(As, Ds, biases, strict=True):
        given = [nothing if x is None else x for x in (D, bias)]
        rows += [A.t(), *(x.unsqueeze(0) for x in given if x is not None)]
    return torch.cat([row.to(torch.float32) for row in rows]).view(len(As), states + 2, channels)


def scan(scans: Scans) -> Tensor:
    """The results (k, b, l, d) in u's dtype, in one launch."""
    y = torch.empty_like(scans.u)
    if y.numel():
        _walk(scans, y=y)
    return y


def scan_backward(scans: Scans, dy: Tensor, with_y: bool = False) -> Gradients:
    """Gradients for dy (b, l, d), which all results share, in two launches and a sum."""
    directions, batch, length, channels = scans.u.shape
    states = scans.B.shape[3]
    dy = activation(dy, dy.dtype)

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=scans.u.device)

    du, ddelta = torch.empty_like(scans.u), torch.empty_like(scans.delta)
    y = torch.empty_like(scans.u) if with_y else None
    dz = None
    if scans.z is not None:
        dz = torch.empty(scans.u.shape, dtype=scans.z.dtype, device=scans.u.device)
    partials = floats(directions, batch, states + 2, channels)
    if scans.u.numel() == 0:
        return Gradients(du, ddelta, dz, floats(2, directions, batch, states, length).zero_(), partials.zero_(), y)

    blocks = triton.cdiv(channels, _BLOCK)
    entering = floats(directions, batch, triton.cdiv(length, _TILE), states, channels)
    carried, dBC = floats(directions, batch, states, channels), floats(blocks, 2, directions, batch, states, length)
    _walk(scans, y=y, dy=dy, dz=dz, entering=entering)
    _scan_backward.launch(
        lambda constants: (batch * blocks, directions),
        dy=dy,
        dy_row=dy.stride(1),
        entering=entering,
        carried=carried,
        du=du,
        ddelta=ddelta,
        dBC=dBC,
        partials=partials,
        TILE=_TILE,
        BLOCK=_BLOCK,
        **scans.arguments(),
    )
    return Gradients(du, ddelta, dz, dBC.sum(0), partials, y)


def _walk(
    scans: Scans,
    y: Tensor | None = None,
    dy: Tensor | None = None,
    dz: Tensor | None = None,
    entering: Tensor | None = None,
) -> None:
    """Walk over the length and write what is there to write to."""
    directions, batch, _, channels = scans.u.shape
    _scan_forward.launch(
        lambda constants: (batch * triton.cdiv(channels, constants["BLOCK"]), directions),
        y=y,
        dy=dy,
        dy_row=0 if dy is None else dy.stride(1),
        dz=dz,
        entering=entering,
        OUTPUT=y is not None,
        GATE_GRADIENT=dz is not None,
        ENTERING=entering is not None,
        BLOCK_STATES=triton.next_power_of_2(max(1, scans.B.shape[3])),
        TILE=_TILE,
        **scans.arguments(),
    )


def _single(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
) -> Scans:
    return Scans(
        u=u.contiguous().unsqueeze(0),
        delta=delta.contiguous().unsqueeze(0),
        B=activation(B, B.dtype).unsqueeze(0),
        C=activation(C, C.dtype).unsqueeze(0),
        z=None if z is None else activation(z, z.dtype),
        parameters=stack_parameters([A], [D], [delta_bias]),
        reverses=(reverse,),
        skip=D is not None,
        softplus=delta_softplus,
    )


_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _softplus(x):
    """log(1 + e^x), exact to float32 where it is small too: log(1 + e) is 2 artanh(s), s = e / (2 + e), a series."""
    e = tl.exp(-tl.abs(x))
    s = e / (2 + e)
    q = s * s
    tail = 1 / 9 + q * (1 / 11 + q * (1 / 13 + q * (1 / 15)))
    return tl.maximum(x, 0.0) + 2 * s * (1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * tail))))


@triton.jit
def _softplus_slope(size):
    """The slope of softplus where its result is `size`, 1 - e^-size, exact to float32 where it is small too."""
    s = size
    series = s * (1 - s / 2 * (1 - s / 3 * (1 - s / 4 * (1 - s / 5 * (1 - s / 6)))))
    return tl.where(s < 0.25, series, 1 - tl.exp(-s))


@triton.jit
def _step_sizes(raw, bias, SOFTPLUS: tl.constexpr):
    shifted = raw.to(tl.float32) + bias
    return _softplus(shifted) if SOFTPLUS else shifted


@triton.jit
def _row(x, index):
    """The row of x (rows, columns) where index (rows, 1) is true."""
    # Added as bits: a row that is known when the kernel is compiled then costs nothing, since a compiler leaves out
    # adding the integer 0, but not adding 0.0.
    bits = tl.where(index, x.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, 0).to(tl.float32, bitcast=True)


@kernel(
    [
        Configuration({"BLOCK": 128}, warps=4, stages=1),
        Configuration({"BLOCK": 32}, warps=1, stages=1),
        # States over warps, each channel's over four threads: for small batches.
        Configuration({"BLOCK": 32}, warps=4, stages=1),
    ],
    key=["channels", "STATES", "ENTERING"],
)
def _scan_forward(
    u,
    delta,
    B,
    C,
    z,
    parameters,
    y,
    dy,
    dz,
    entering,
    batch,
    length,
    channels,
    z_row,
    dy_row,
    scale,
    STATES: tl.constexpr,
    B_ROW: tl.constexpr,
    C_ROW: tl.constexpr,
    REVERSE: tl.constexpr,
    REVERSE2: tl.constexpr,
    SKIP: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    GATE: tl.constexpr,
    OUTPUT: tl.constexpr,
    GATE_GRADIENT: tl.constexpr,
    ENTERING: tl.constexpr,
    BLOCK_STATES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
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


# One configuration: the backward's block and warps belong together, see _BLOCK.
@kernel([Configuration({}, warps=4, stages=1)])
def _scan_backward(
    u,
    delta,
    B,
    C,
    z,
    parameters,
    dy,
    entering,
    carried,
    du,
    ddelta,
    dBC,
    partials,
    batch,
    length,
    channels,
    z_row,
    dy_row,
    scale,
    STATES: tl.constexpr,
    B_ROW: tl.constexpr,
    C_ROW: tl.constexpr,
    REVERSE: tl.constexpr,
    REVERSE2: tl.constexpr,
    SKIP: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    GATE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
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
