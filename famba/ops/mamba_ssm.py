"""Run the scan and the convolution by the CUDA extensions of mamba-ssm and causal-conv1d; the mixer is made of these.

Neither package knows of tokens that fuse, and mamba-ssm's norm lies where an import draws in much else: these ops are
done by the Triton kernels. Not reproducible to the bit: mamba-ssm's backward scan, and causal-conv1d's backward
convolution unless torch is asked for deterministic algorithms, add partial sums in whatever order they arrive.

The extensions take (batch, channels, length), the steps adjacent. Sources: csrc/selective_scan/selective_scan.cpp of
mamba-ssm, which takes the same arguments from 2.2 to 2.3.2, and csrc/causal_conv1d.cpp of causal-conv1d 1.4 to 1.7.
"""

from __future__ import annotations

import torch
from torch import Tensor

from famba.errors import ConfigError
from famba.ops import reference
from famba.ops.availability import MAMBA_SSM, convolution
from famba.ops.inputs import ScanGradients, ScanInputs, common_dtype
from famba.ops.reference import scan_state_shape
from famba.ops.triton import add_rms_norm, add_rms_norm_backward, fuse_tokens, fuse_tokens_backward, match_tokens

_INSTEAD = "use backend 'triton' or 'reference'"
_MOST_STATES = 256
# Channels lie on the second axis of the launch grid, and elements are counted in 32 bits.
_MOST_CHANNELS = 2**16 - 1
_MOST_ELEMENTS = 2**32 - 1


def selective_scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """Return y and an empty tensor: the backward runs the forward again."""
    *_, y = _run_scan(_scan_inputs(inputs))
    return _back(y, inputs.reverse, inputs.u.dtype), y.new_empty(0, dtype=torch.float32)


def selective_scan_backward(dy: Tensor, inputs: ScanInputs, state: Tensor) -> ScanGradients:
    """Return the gradients of the inputs, each in its input's dtype."""
    scan = _scan_inputs(inputs)
    *tensors, softplus, _ = scan
    if scan.u.numel() == 0:
        return reference.selective_scan_backward(dy, inputs, state)
    # A gate's gradient needs the result before the gate, a long scan the states in between: both are there only during
    # the forward, and one tensor of a fixed shape would not hold them.
    ungated, states, _ = _run_scan(scan._replace(z=None))
    dy = _turned(dy, inputs.reverse, scan.u.dtype)
    before = None if scan.z is None else ungated
    du, ddelta, dA, dB, dC, dD, dbias, *dz = MAMBA_SSM.load().bwd(*tensors, dy, states, before, None, softplus, False)
    grads = (du, ddelta, dA, dB[:, 0], dC[:, 0], dD, dz[0] if dz else None, dbias)
    turned = (grad if grad is None or grad.ndim < 3 else _back(grad, inputs.reverse, grad.dtype) for grad in grads)
    return ScanGradients.cast(inputs, *turned)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    """Return y."""
    if not 2 <= weight.shape[1] <= 4:
        raise ConfigError(f"causal_conv1d: width {weight.shape[1]}, causal-conv1d takes 2 to 4; {_INSTEAD}")
    _check_size("causal_conv1d", x, "causal-conv1d")
    if x.numel() == 0:
        return x.new_empty(x.shape)
    y = convolution()[0](_turned(x, reverse, x.dtype), _parameter(weight), _optional(bias), None, None, None, silu)
    return _back(y, reverse, x.dtype)


def causal_conv1d_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of x, weight and bias, each in its input's dtype."""
    if x.numel() == 0:
        return reference.causal_conv1d_backward(dy, x, weight, bias, silu, reverse)
    given = _turned(x, reverse, x.dtype), _parameter(weight), _optional(bias), _turned(dy, reverse, x.dtype)
    dx, dweight, dbias, _ = convolution()[1](*given, None, None, None, None, False, silu)
    return _back(dx, reverse, x.dtype), dweight.to(weight.dtype), None if bias is None else dbias.to(bias.dtype)


def _scan_inputs(inputs: ScanInputs) -> ScanInputs:
    """Return a scan as the extension reads it: B and C (b, 1, n, l), parameters float32, never in reverse."""
    u, delta, A, B, C, D, z, delta_bias, softplus, reverse = inputs
    if not 1 <= A.shape[1] <= _MOST_STATES:
        raise ConfigError(f"selective_scan: {A.shape[1]} states, mamba-ssm takes 1 to {_MOST_STATES}; {_INSTEAD}")
    _check_size("selective_scan", u, "mamba-ssm")
    dtype = common_dtype(u, delta, B, C, z)
    u, delta, B, C = (_turned(x, reverse, dtype) for x in (u, delta, B, C))
    z = None if z is None else _turned(z, reverse, dtype)
    B, C = B.unsqueeze(1), C.unsqueeze(1)
    return ScanInputs(u, delta, _parameter(A), B, C, _optional(D), z, _optional(delta_bias), softplus, False)


def _run_scan(inputs: ScanInputs) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the result (b, d, l) before the gate, the states that the backward takes, and the result."""
    if inputs.u.numel() == 0:
        return inputs.u, None, inputs.u
    ungated, states, *gated = MAMBA_SSM.load().fwd(*inputs[:-1])
    return ungated, states, gated[0] if gated else ungated


def _check_size(op: str, x: Tensor, package: str) -> None:
    """Raise ConfigError where x (b, l, d) is too large for a package."""
    if x.shape[2] > _MOST_CHANNELS:
        raise ConfigError(f"{op}: {x.shape[2]} channels, {package} takes at most {_MOST_CHANNELS}; {_INSTEAD}")
    if x.numel() > _MOST_ELEMENTS:
        limits = f"{x.numel()} elements, {package} counts at most {_MOST_ELEMENTS}"
        raise ConfigError(f"{op}: {limits}; use a smaller batch, or {_INSTEAD}")


def _parameter(x: Tensor) -> Tensor:
    """Return what is no activation as the extensions take it: float32 and contiguous."""
    # Always a copy: causal-conv1d wants adjacent numbers even where there is one only, which `contiguous` lets pass.
    return x.to(torch.float32).clone(memory_format=torch.contiguous_format)


def _optional(x: Tensor | None) -> Tensor | None:
    return None if x is None else _parameter(x)


def _turned(x: Tensor, reverse: bool, dtype: torch.dtype) -> Tensor:
    """Return (b, l, c) as (b, c, l), the last step first where `reverse`."""
    # Always a copy: the kernels read 16 bytes at once, and a view may begin anywhere.
    x = x.to(dtype).transpose(1, 2)
    return (x.flip(2) if reverse else x).clone(memory_format=torch.contiguous_format)


def _back(x: Tensor, reverse: bool, dtype: torch.dtype) -> Tensor:
    """Return (b, c, l) as (b, l, c)."""
    x = x.transpose(1, 2)
    return (x.flip(1) if reverse else x).to(dtype).clone(memory_format=torch.contiguous_format)
