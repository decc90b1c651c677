"""Run the selective scan: one direction, or the two of a mixer in one launch; `scan_kernels` says how it is done.

The forward keeps nothing. The backward walks forward once more, noting the states that enter each tile of steps, then
goes through the tiles from the last to the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from famba.ops.inputs import ScanGradients, ScanInputs
from famba.ops.triton import scan_kernels
from famba.ops.triton.launch import activation

# Steps of a tile in the backward: its rows are registers, its states memory that is in use for one layer at a time.
_TILE = 8
# Channels of a program in the backward, which decide how many partial sums there are. A thread for each: a row then
# lies in one thread's registers, and walking over a tile costs no exchange between threads.
_BLOCK = 128
# Channels over which the forward adds up a token's measures; torch adds up the rest.
_MEASURED = 32


def scan_state_shape(batch: int, length: int, channels: int, states: int) -> tuple[int, ...]:
    """Return the shape of what the forward scan keeps for its backward: nothing."""
    return (0,)


def selective_scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """Return y, and an empty tensor."""
    return scan(Scans.single(inputs))[0].squeeze(0), inputs.u.new_empty(0, dtype=torch.float32)


def selective_scan_backward(dy: Tensor, inputs: ScanInputs, state: Tensor) -> ScanGradients:
    """Return the gradients of the inputs, each in its input's dtype."""
    dB, dC = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (inputs.B, inputs.C))
    dA, dD, dbias = of_parameters = Parameters(inputs.A, inputs.D, inputs.delta_bias).empty()
    grads = scan_backward(Scans.single(inputs), dy, dB.unsqueeze(0), dC.unsqueeze(0), [of_parameters])
    dz = None if grads.z is None else grads.z.squeeze(0)
    return ScanGradients(grads.u.squeeze(0), grads.delta.squeeze(0), dA, dB, dC, dD, dz, dbias)


@dataclass(frozen=True)
class Scans:
    """Hold scans over the same tokens, k of them, one or two, as the kernels read them.

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

    @classmethod
    def single(cls, inputs: ScanInputs) -> Scans:
        """Take one scan."""
        u, delta, A, B, C, D, z, delta_bias, softplus, reverse = inputs
        u, delta = (x.contiguous().unsqueeze(0) for x in (u, delta))
        B, C = (activation(x, x.dtype).unsqueeze(0) for x in (B, C))
        z = None if z is None else activation(z, z.dtype)
        parameters = stack_parameters([A], [D], [delta_bias])
        return cls(u, delta, B, C, z, parameters, (reverse,), skip=D is not None, softplus=softplus)

    def measured(self) -> Tensor:
        """Return memory for measures, summed up over 32 channels each: (2, k, b, l, blocks)."""
        *sizes, channels = self.u.shape
        return self.u.new_empty(2, *sizes, -(-channels // _MEASURED), dtype=torch.float32)

    def arguments(self) -> dict[str, object]:
        """Return what both kernels take."""
        _, batch, length, channels = self.u.shape
        tensors = {name: getattr(self, name) for name in ("u", "delta", "B", "C", "z", "parameters")}
        # `channels` and `z_row` are no constants: knowing them the compiler would read several channels at once, which
        # takes the channels of a thread from it.
        z_row = 0 if self.z is None else self.z.stride(1)
        sizes = {"batch": batch, "length": length, "channels": channels, "z_row": z_row, "scale": self.scale}
        strides = {"STATES": self.B.shape[3], "B_ROW": self.B.stride(2), "C_ROW": self.C.stride(2)}
        how = {"SKIP": self.skip, "SOFTPLUS": self.softplus, "GATE": self.z is not None}
        return {**tensors, **sizes, **strides, **how, "REVERSE": self.reverses[0], "REVERSE2": self.reverses[-1]}


class Parameters(NamedTuple):
    """Hold what a scan reads besides activations, or its gradients: A (d, n), D (d,) and delta_bias (d,)."""

    A: Tensor
    D: Tensor | None
    delta_bias: Tensor | None

    def empty(self) -> Parameters:
        """Return memory for their gradients, in their dtypes."""
        A, D, delta_bias = (
            None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in self
        )
        assert A is not None
        return Parameters(A, D, delta_bias)


@dataclass(frozen=True)
class Gradients:
    """Hold the gradients of k scans, all (k, b, l, d) and in their inputs' dtypes; z's is None without a gate.

    y: the scans' result again, where it was asked for.
    """

    u: Tensor
    delta: Tensor
    z: Tensor | None
    y: Tensor | None


def stack_parameters(As: Sequence[Tensor], Ds: Sequence[Tensor | None], biases: Sequence[Tensor | None]) -> Tensor:
    """Stack A, D and delta_bias of k scans in float32, (k, n + 2, d); zeros where there is no D or bias."""
    channels, states = As[0].shape
    nothing = torch.zeros(channels, device=As[0].device) if None in (Ds[0], biases[0]) else None
    rows: list[Tensor] = []
    for A, D, bias in zip(As, Ds, biases, strict=True):
        given = [nothing if x is None else x for x in (D, bias)]
        rows += [A.t(), *(x.unsqueeze(0) for x in given if x is not None)]
    return torch.cat([row.to(torch.float32) for row in rows]).view(len(As), states + 2, channels)


def scan(scans: Scans, measure: bool = False) -> tuple[Tensor, Tensor | None]:
    """Return the results (k, b, l, d) in u's dtype, in one launch, and the measures (2, k, b, l) where asked for."""
    y = torch.empty_like(scans.u)
    sums = scans.measured() if measure else None
    if y.numel():
        _walk(scans, y=y, sums=sums)
    return y, None if sums is None else measures_of(sums, scans.u.shape[3])


def measures_of(sums: Tensor, channels: int) -> Tensor:
    """Return the measures (2, k, b, l) whose sums over 32 channels each are (2, k, b, l, blocks)."""
    measures = sums.sum(-1)
    measures[0] /= channels
    return measures


def scan_backward(
    scans: Scans, dy: Tensor, dB: Tensor, dC: Tensor, of_parameters: Sequence[Parameters], with_y: bool = False
) -> Gradients:
    """Return the gradients for dy (b, l, d), which all results share, in four launches.

    Those of B and C are written into dB and dC, (k, b, l, n) with rows as `Scans` wants them, and those of the
    parameters into the contiguous tensors `of_parameters`, for each scan; all of any dtypes.
    """
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
    if scans.u.numel() == 0:
        for grad in (dB, dC, *(x for parameters in of_parameters for x in parameters if x is not None)):
            grad.zero_()
        return Gradients(du, ddelta, dz, y)

    blocks = triton.cdiv(channels, _BLOCK)
    entering = floats(directions, batch, triton.cdiv(length, _TILE), states, channels)
    carried, partials = floats(directions, batch, states, channels), floats(directions, batch, states + 2, channels)
    dBC = floats(blocks, 2, directions, batch, states, length)
    _walk(scans, y=y, dy=dy, dz=dz, entering=entering)
    between = {"entering": entering, "carried": carried, "dBC": dBC, "partials": partials}
    given = {"dy": dy, "dy_row": dy.stride(1), "TILE": _TILE, "BLOCK": _BLOCK, **scans.arguments()}
    scan_kernels.scan_backward.launch(
        lambda constants: (batch * blocks, directions), du=du, ddelta=ddelta, **between, **given
    )
    sizes = {"blocks": blocks, "sequences": directions * batch, "length": length, "STATES": states}
    rows = {"B_ROW": dB.stride(2), "C_ROW": dC.stride(2), "BLOCK_STATES": triton.next_power_of_2(max(1, states))}
    scan_kernels.state_sums.launch(
        lambda constants: (directions * batch * triton.cdiv(length, constants["BLOCK"]), 2),
        **{"dBC": dBC, "dB": dB, "dC": dC, **sizes, **rows},
    )
    first, last = of_parameters[0], of_parameters[-1]
    sums = {"dA": first.A, "dD": first.D, "dbias": first.delta_bias}
    sums |= {"dA2": last.A, "dD2": last.D, "dbias2": last.delta_bias}
    known = {"SKIP": first.D is not None, "BIASED": first.delta_bias is not None}
    scan_kernels.parameter_sums.launch(
        lambda constants: ((states + 2) * triton.cdiv(channels, constants["BLOCK"]), directions),
        **{"partials": partials, "batch": batch, "CHANNELS": channels, "STATES": states, **sums, **known},
    )
    return Gradients(du, ddelta, dz, y)


def _walk(
    scans: Scans,
    y: Tensor | None = None,
    dy: Tensor | None = None,
    dz: Tensor | None = None,
    entering: Tensor | None = None,
    sums: Tensor | None = None,
) -> None:
    """Walk over the length and write what is there to write to."""
    directions, batch, _, channels = scans.u.shape
    given = {"y": y, "dy": dy, "dy_row": 0 if dy is None else dy.stride(1), "dz": dz, "entering": entering}
    given |= {"sums": sums, "MEASURE": sums is not None, "MEASURED": _MEASURED}
    asked = {"OUTPUT": y is not None, "GATE_GRADIENT": dz is not None, "ENTERING": entering is not None}
    states = triton.next_power_of_2(max(1, scans.B.shape[3]))
    scan_kernels.scan_forward.launch(
        lambda constants: (batch * triton.cdiv(channels, constants["BLOCK"]), directions),
        **{**given, **asked, "BLOCK_STATES": states, "TILE": _TILE, **scans.arguments()},
    )
