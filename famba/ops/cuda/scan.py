"""Launch the kernels of `src/scan_*.cu`, which say how the selective scan is done."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from famba.errors import ConfigError
from famba.ops.cuda.launch import TYPES, Constants, Launch
from famba.ops.directional import Gradients, Scans

MAX_STATES = 256
# Steps of a tile; the backward's are 16 since the lanes of a warp hold a sum each, of two for a step.
_FORWARD_TILE, _BACKWARD_TILE = 4, 16
# Threads of a multiprocessor in the forward, which says how many registers there are for each. With 768 all blocks of a
# Vim-Ti's batch of 128 images run at once on an H100; for float32, and in the backward, 80 registers are too few.
_THREADS, _MORE_THREADS = 512, 768
# States in registers at once are 16; 8 where these are enough, or where more than this leave little shared memory.
_MANY_STATES = 240


def scan(scans: Scans, y: Tensor, sums: Tensor | None) -> None:
    """Write results, and sums for measures, in one launch."""
    _check(scans)
    constants = _constants(scans, None) | {"REPLAY": False, "OUTPUT": True, "MEASURE": sums is not None}
    if sums is not None:  # which takes more registers
        constants["FORWARD_THREADS"] = _THREADS
    _launch("scan_forward", scans, constants, y=y, partials=sums)


def scan_backward(scans: Scans, dy: Tensor, dB: Tensor, dC: Tensor, grads: Gradients) -> None:
    """Write gradients, in four launches."""
    _check(scans, dy)
    directions, batch, length, channels = scans.u.shape
    states, blocks, constants = scans.B.shape[3], -(-channels // _block(channels)), _constants(scans, dy)
    entering = scans.floats(directions, batch, -(-length // _BACKWARD_TILE), states, channels)
    replay = constants | {"REPLAY": True, "OUTPUT": grads.y is not None, "MEASURE": False}
    _launch("scan_forward", scans, replay, dy=dy, y=grads.y, dz=grads.z, entering=entering)
    partials = scans.floats(directions, batch, states + 2, channels)
    dBC = scans.floats(blocks, directions, batch, length, 2 * states)
    written = {"du": grads.u, "ddelta": grads.delta, "dBC": dBC, "partials": partials}
    _launch("scan_backward", scans, constants, dy=dy, entering=entering, **written)
    rows = directions * batch * length
    grid, sums = (-(-rows * 2 * states // 256), 1), (dBC, dB, dC, blocks, rows, dB.stride(2), dC.stride(2))
    Launch("sums.cu", "row_sums", {"T": TYPES[scans.u.dtype], "STATES": states}, grid, 256, sums).run()
    column_sums(partials.flatten(0, 1), grads.A, grads.D, grads.delta_bias)


def column_sums(partials: Tensor, first: Sequence[Tensor], *others: Sequence[Tensor | None]) -> None:
    """Add up partials (k rows, slots, d) over the rows of each direction k, in one launch.

    The first slots go to first[k] (d, taps), float32 as all, the next to others[0][k] (d,), the last to others[1][k].
    """
    directions, (channels, taps) = len(first), first[0].shape
    rows, slots = partials.shape[0] // directions, partials.shape[1]
    outputs = [x for each in (first, *others, [None])[:3] for x in (each[0], each[-1])]
    arguments = (partials, *outputs, rows, slots, channels, taps)
    grid = (-(-slots * channels // 32), directions)
    Launch("sums.cu", "column_sums", {"T": "float", "STATES": 1}, grid, 256, arguments).run()


def _block(channels: int) -> int:
    """Count the threads of a block, each with a channel: as many as leave few without one."""
    fitting = [block for block in (128, 96, 64) if channels % block == 0]
    return fitting[0] if fitting else min(128, -(-channels // 32) * 32)


def _constants(scans: Scans, dy: Tensor | None) -> dict[str, int | float | str]:
    """Return what the kernels have compiled in."""
    states, channels = scans.B.shape[3], scans.u.shape[3]
    chunk, few = 16 if 8 < states <= _MANY_STATES else 8, states <= 16
    threads = _MORE_THREADS if few and dy is None and scans.u.dtype != torch.float32 else _THREADS
    rows = {"BC_ROW": scans.B.stride(2), "Z_ROW": 0 if scans.z is None else scans.z.stride(1)}
    rows |= {"DY_ROW": 0 if dy is None else dy.stride(1)}
    how = {"REVERSE": scans.reverses[0], "REVERSE2": scans.reverses[-1], "SKIP": scans.skip}
    how |= {"SOFTPLUS": scans.softplus, "GATE": scans.z is not None}
    blocks = {"BLOCK": _block(channels), "CHUNK": chunk, "ROOM": -(-states // chunk) * chunk}
    tiles = {"FORWARD_TILE": _FORWARD_TILE, "BACKWARD_TILE": _BACKWARD_TILE, "FORWARD_THREADS": threads}
    sizes = {"STATES": states, "CHANNELS": channels}
    return {"T": TYPES[scans.u.dtype], **sizes, **rows, **how, "SCALE": f"{scans.scale}f", **blocks, **tiles}


def _launch(kernel: str, scans: Scans, constants: Constants, **written: Tensor | None) -> None:
    """Launch a kernel that takes the structure `Scan`; written: tensors by the names of its fields, and dy."""
    directions, batch, length, channels = scans.u.shape
    fields = ("y", "dz", "entering", "du", "ddelta", "dBC", "partials")
    read = (scans.u, scans.delta, scans.B, scans.C, scans.z, written.get("dy"), scans.parameters)
    arguments = (*read, *(written.get(field) for field in fields), batch, length)
    block = _block(channels)
    Launch(f"{kernel}.cu", kernel, constants, (batch * -(-channels // block), directions), block, arguments).run()


def _check(scans: Scans, *rows: Tensor | None) -> None:
    states, length = scans.B.shape[3], scans.u.shape[2]
    if not 1 <= states <= MAX_STATES:
        limits = f"{states} states, backend 'cuda' takes 1 to {MAX_STATES}"
        raise ConfigError(f"selective_scan: {limits}; use backend 'triton' or 'reference'")
    longest = max(x.stride(-2) for x in (scans.u, scans.B, scans.z, *rows) if x is not None)
    if length * max(longest, states * scans.u.shape[3]) >= 2**31:
        raise ConfigError(
            f"selective_scan: {length} steps of {longest} numbers are too many for backend 'cuda', which takes less "
            "than 2^31 numbers of a sequence; use backend 'reference', or shorter sequences"
        )
