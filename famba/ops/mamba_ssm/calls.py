"""The extensions' forward and backward, in their own layout: (batch, channels, length), the steps adjacent.

Sources: csrc/selective_scan/selective_scan.cpp of mamba-ssm, which takes the same arguments from 2.2 to 2.3.2, and
csrc/causal_conv1d.cpp of causal-conv1d 1.4 to 1.7.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from famba.errors import ConfigError
from famba.ops.mamba_ssm import extensions

_INSTEAD = "use backend 'triton' or 'reference'"
_STEPS_PER_CHUNK = 2048
_MOST_STATES = 256
_WIDTHS = (2, 4)
# Channels lie on the second axis of the launch grid, and elements are counted in 32 bits.
_MOST_CHANNELS = 2**16 - 1
_MOST_ELEMENTS = 2**32 - 1


class Scan(NamedTuple):
    """Inputs of a scan with softplus or without.

    u, delta, z (b, d, l) and B, C (b, groups, n, l) of one dtype, the first d / groups channels belonging to the first
    group; A (d, n), D and delta_bias (d,) in float32.
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    softplus: bool


class ScanGradients(NamedTuple):
    """Gradients of a scan's inputs, each in its input's dtype; None for an input of None."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    delta_bias: Tensor | None
    z: Tensor | None


def entering_shape(batch: int, length: int, channels: int, states: int) -> tuple[int, ...]:
    """Shape of the float32 states that the backward needs: none where all steps are one chunk of the kernel's."""
    chunks = -(-length // _STEPS_PER_CHUNK)
    return (batch, channels, chunks if chunks > 1 else 0, 2 * states)


def scan(inputs: Scan) -> tuple[Tensor, Tensor, Tensor]:
    """Return the result (b, d, l), the result before the gate, which is the same without one, and the states kept."""
    u, A = inputs.u, inputs.A
    _check_scan(u, A.shape[1])
    batch, channels, length = u.shape
    entering = u.new_empty(entering_shape(batch, length, channels, A.shape[1]), dtype=torch.float32)
    if u.numel() == 0:
        return u, u, entering
    ungated, states, *gated = extensions.scan().fwd(*inputs)
    return gated[0] if gated else ungated, ungated, states if entering.numel() else entering


def scan_backward(inputs: Scan, dy: Tensor, ungated: Tensor | None, entering: Tensor) -> ScanGradients:
    """Gradients for that of the result, dy (b, d, l) in u's dtype; `ungated` may be None without a gate."""
    if inputs.u.numel() == 0:
        *tensors, _ = inputs
        u, delta, A, B, C, D, z, bias = (None if x is None else torch.zeros_like(x) for x in tensors)
        return ScanGradients(u, delta, A, B, C, D, bias, z)  # type: ignore[arg-type]
    *tensors, softplus = inputs
    states = entering if entering.numel() else None
    grads = extensions.scan().bwd(*tensors, dy, states, ungated, None, softplus, False)
    du, ddelta, dA, dB, dC, dD, dbias, *dz = grads
    return ScanGradients(du, ddelta, dA, dB, dC, dD, dbias, dz[0] if dz else None)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """Causal convolution of x (b, d, l) with weight (d, width) and bias (d,), both float32."""
    _check_convolution(x, weight.shape[1])
    if x.numel() == 0:
        return x
    forward, _ = extensions.convolution()
    return forward(x, weight, bias, None, None, None, silu)


def convolve_backward(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x, weight and bias for that of the result, dy (b, d, l) in x's dtype."""
    if x.numel() == 0:
        return torch.zeros_like(x), torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias)
    _, backward = extensions.convolution()
    dx, dweight, dbias, _ = backward(x, weight, bias, dy, None, None, None, None, False, silu)
    return dx, dweight, None if bias is None else dbias


def _check_scan(u: Tensor, states: int) -> None:
    if not 1 <= states <= _MOST_STATES:
        raise ConfigError(f"selective_scan: {states} states, mamba-ssm takes 1 to {_MOST_STATES}; {_INSTEAD}")
    _check_size("selective_scan", u, "mamba-ssm")


def _check_convolution(x: Tensor, width: int) -> None:
    least, most = _WIDTHS
    if not least <= width <= most:
        raise ConfigError(f"causal_conv1d: width {width}, causal-conv1d takes {least} to {most}; {_INSTEAD}")
    _check_size("causal_conv1d", x, "causal-conv1d")


def _check_size(op: str, x: Tensor, package: str) -> None:
    if x.shape[1] > _MOST_CHANNELS:
        raise ConfigError(f"{op}: {x.shape[1]} channels, {package} takes at most {_MOST_CHANNELS}; {_INSTEAD}")
    if x.numel() > _MOST_ELEMENTS:
        raise ConfigError(
            f"{op}: {x.numel()} elements, {package} counts at most {_MOST_ELEMENTS}; use a smaller batch, or {_INSTEAD}"
        )
