"""The scan and the convolution of channels-last tensors, (batch, length, channels), by the CUDA extensions."""

from __future__ import annotations

import torch
from torch import Tensor

from famba.ops.mamba_ssm import calls


def scan_state_shape(batch: int, length: int, channels: int, states: int) -> tuple[int, ...]:
    """Shape of what the forward scan keeps for its backward: nothing, the backward runs the forward again."""
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
    """Return y and an empty tensor."""
    y, *_ = calls.scan(_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse))
    return _back(y, reverse, u.dtype), u.new_empty(0, dtype=torch.float32)


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
    scan = _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)
    # A gate's gradient needs the result before the gate, a long scan the states in between: both are there only during
    # the forward, and one tensor of a fixed shape would not hold them.
    _, ungated, entering = calls.scan(scan._replace(z=None))
    grads = calls.scan_backward(scan, _turned(dy, reverse, scan.u.dtype), None if z is None else ungated, entering)
    return (
        _back(grads.u, reverse, u.dtype),
        _back(grads.delta, reverse, delta.dtype),
        grads.A.to(A.dtype),
        _back(grads.B[:, 0], reverse, B.dtype),
        _back(grads.C[:, 0], reverse, C.dtype),
        None if D is None or grads.D is None else grads.D.to(D.dtype),
        None if z is None or grads.z is None else _back(grads.z, reverse, z.dtype),
        None if delta_bias is None or grads.delta_bias is None else grads.delta_bias.to(delta_bias.dtype),
    )


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    """Return y."""
    y = calls.convolve(_turned(x, reverse, x.dtype), _parameter(weight), _optional(bias), silu)
    return _back(y, reverse, x.dtype)


def causal_conv1d_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x, weight and bias, each in its input's dtype."""
    dx, dweight, dbias = calls.convolve_backward(
        _turned(x, reverse, x.dtype), _parameter(weight), _optional(bias), silu, _turned(dy, reverse, x.dtype)
    )
    return (
        _back(dx, reverse, x.dtype),
        dweight.to(weight.dtype),
        None if bias is None or dbias is None else dbias.to(bias.dtype),
    )


def _parameter(x: Tensor) -> Tensor:
    """As the extensions take what is no activation: float32 and contiguous.

    A copy: causal-conv1d wants adjacent numbers even where there is one only, which `contiguous` lets pass.
    """
    return x.to(torch.float32).clone(memory_format=torch.contiguous_format)


def _optional(x: Tensor | None) -> Tensor | None:
    return None if x is None else _parameter(x)


def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    softplus: bool,
    reverse: bool,
) -> calls.Scan:
    dtypes = {x.dtype for x in (u, delta, B, C, z) if x is not None}
    # Where they differ nothing is rounded to the coarsest.
    dtype = u.dtype if len(dtypes) == 1 else torch.float32
    return calls.Scan(
        _turned(u, reverse, dtype),
        _turned(delta, reverse, dtype),
        _parameter(A),
        _turned(B, reverse, dtype).unsqueeze(1),
        _turned(C, reverse, dtype).unsqueeze(1),
        _optional(D),
        None if z is None else _turned(z, reverse, dtype),
        _optional(delta_bias),
        softplus,
    )


def _turned(x: Tensor, reverse: bool, dtype: torch.dtype) -> Tensor:
    """(b, l, c) as (b, c, l), the last step first where `reverse`.

    Always a copy: the kernels read 16 bytes at once, and a view may begin anywhere.
    """
    x = x.to(dtype).transpose(1, 2)
    return (x.flip(2) if reverse else x).clone(memory_format=torch.contiguous_format)


def _back(x: Tensor, reverse: bool, dtype: torch.dtype) -> Tensor:
    """(b, c, l) as (b, l, c)."""
    x = x.transpose(1, 2)
    return (x.flip(1) if reverse else x).to(dtype).clone(memory_format=torch.contiguous_format)
