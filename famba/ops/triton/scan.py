"""Launch the kernels of `scan_kernels`, for one direction, or the two of a mixer in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
from torch import Tensor

from famba.ops.directional import MEASURED, Gradients, Scans
from famba.ops.triton import scan_kernels

# Steps of a tile in the backward: its rows are registers, its states memory that is in use for one layer at a time.
_TILE = 8
# Channels of a program in the backward, which decide how many partial sums there are. A thread for each: a row then
# lies in one thread's registers, and walking over a tile costs no exchange between threads.
_BLOCK = 128


def scan(scans: Scans, y: Tensor, sums: Tensor | None) -> None:
    """Write results, and sums for measures, in one launch."""
    _walk(scans, y=y, sums=sums)


def scan_backward(scans: Scans, dy: Tensor, dB: Tensor, dC: Tensor, grads: Gradients) -> None:
    """Write gradients, in four launches."""
    directions, batch, length, channels = scans.u.shape
    states, blocks = scans.B.shape[3], triton.cdiv(channels, _BLOCK)
    entering = scans.floats(directions, batch, triton.cdiv(length, _TILE), states, channels)
    carried = scans.floats(directions, batch, states, channels)
    partials = scans.floats(directions, batch, states + 2, channels)
    dBC = scans.floats(blocks, 2, directions, batch, states, length)
    _walk(scans, y=grads.y, dy=dy, dz=grads.z, entering=entering)
    between = {"entering": entering, "carried": carried, "dBC": dBC, "partials": partials}
    given = {"dy": dy, "dy_row": dy.stride(1), "TILE": _TILE, "BLOCK": _BLOCK, **_arguments(scans)}
    scan_kernels.scan_backward.launch(
        lambda constants: (batch * blocks, directions), du=grads.u, ddelta=grads.delta, **between, **given
    )
    sizes = {"blocks": blocks, "sequences": directions * batch, "length": length, "STATES": states}
    rows = {"B_ROW": dB.stride(2), "C_ROW": dC.stride(2), "BLOCK_STATES": triton.next_power_of_2(max(1, states))}
    scan_kernels.state_sums.launch(
        lambda constants: (directions * batch * triton.cdiv(length, constants["BLOCK"]), 2),
        **{"dBC": dBC, "dB": dB, "dC": dC, **sizes, **rows},
    )
    column_sums(partials.flatten(0, 1), grads.A, grads.D, grads.delta_bias)


def column_sums(partials: Tensor, first: Sequence[Tensor], *others: Sequence[Tensor | None]) -> None:
    """Add up partials (k rows, slots, d) over the rows of each direction k, in one launch.

    The first slots go to first[k] (d, taps), float32 as all, the next to others[0][k] (d,), the last to others[1][k].
    """
    directions, (rows, slots, channels) = len(first), partials.shape
    outputs = [first, *(each for each in others if each[0] is not None)]
    named = zip(("first", "second", "third"), [*outputs, first, first], strict=False)
    given = {name + side: each[at] for name, each in named for side, at in (("", 0), ("2", -1))}
    sizes = {"rows": rows // directions, "CHANNELS": channels, "SLOTS": slots, "TAPS": first[0].shape[1]}
    scan_kernels.column_sums.launch(
        lambda constants: (slots * triton.cdiv(channels, constants["BLOCK"]), directions),
        **{"partials": partials, "OUTPUTS": len(outputs), **given, **sizes},
    )


def _arguments(scans: Scans) -> dict[str, Any]:
    """Return what both kernels take."""
    _, batch, length, channels = scans.u.shape
    tensors = {name: getattr(scans, name) for name in ("u", "delta", "B", "C", "z", "parameters")}
    # `channels` and `z_row` are no constants: knowing them the compiler would read several channels at once, which
    # takes the channels of a thread from it.
    z_row = 0 if scans.z is None else scans.z.stride(1)
    sizes = {"batch": batch, "length": length, "channels": channels, "z_row": z_row, "scale": scans.scale}
    strides = {"STATES": scans.B.shape[3], "B_ROW": scans.B.stride(2), "C_ROW": scans.C.stride(2)}
    how = {"SKIP": scans.skip, "SOFTPLUS": scans.softplus, "GATE": scans.z is not None}
    return {**tensors, **sizes, **strides, **how, "REVERSE": scans.reverses[0], "REVERSE2": scans.reverses[-1]}


def _walk(scans: Scans, **written: Tensor | None) -> None:
    """Walk over the length and write what is there to write to: y, dz (for dy), entering, sums."""
    directions, batch, _, channels = scans.u.shape
    given = {name: written.get(name) for name in ("y", "dy", "dz", "entering", "sums")}
    dy = given["dy"]
    asked = {"OUTPUT": "y", "GATE_GRADIENT": "dz", "ENTERING": "entering", "MEASURE": "sums"}
    how: dict[str, Any] = {constant: given[name] is not None for constant, name in asked.items()}
    how |= {"dy_row": 0 if dy is None else dy.stride(1), "MEASURED": MEASURED}
    states = triton.next_power_of_2(max(1, scans.B.shape[3]))
    scan_kernels.scan_forward.launch(
        lambda constants: (batch * triton.cdiv(channels, constants["BLOCK"]), directions),
        **{**given, **how, "BLOCK_STATES": states, "TILE": _TILE, **_arguments(scans)},
    )
