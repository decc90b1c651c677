"""Run the ops on CPUs by compiled kernels, and the mixer by these and torch's matrix products.

`famba.ops.reference` says what each means.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from famba.errors import ConfigError
from famba.ops.inputs import (
    MixerInputs,
    ScanGradients,
    ScanInputs,
    as_tokens,
    common_dtype,
    flatten,
    optional_parameter,
    parameter,
)
from famba.ops.native.library import Conv, Fuse, Norm, Scan, call
from famba.ops.products import Columns, ProductWeights

# A product and a sort, which torch does well on a CPU.
from famba.ops.reference import match_tokens

# The scan keeps the states that enter each chunk of at most this many steps; shorter sequences keep none.
# A chunk's states then fit a processor's second-level cache in the backward.
_CHUNK = 384


def _floats(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32)  # whatever torch.set_default_dtype says


def scan_chunk(length: int) -> int:
    """Return the steps between two kept states: chunks as equal as can be."""
    chunks = max(1, -(-length // _CHUNK))
    return max(1, -(-length // chunks))


def scan_state_shape(batch: int, length: int, channels: int, states: int) -> tuple[int, ...]:
    """Return the shape of the states that the forward scan keeps for its backward."""
    chunks = max(1, -(-length // scan_chunk(length)))
    return (batch, chunks - 1, channels, states)


def selective_scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """Return y and the states that enter the later chunks."""
    scan = readable(inputs)
    y = torch.empty(scan.u.shape, dtype=scan.u.dtype)
    batch, length, channels = y.shape
    state = _floats(*scan_state_shape(batch, length, channels, inputs.A.shape[1]))
    call("scan_forward", Scan, y.dtype, **_scan(scan, state), y=y)
    return y.to(inputs.u.dtype), state


def selective_scan_backward(dy: Tensor, inputs: ScanInputs, state: Tensor) -> ScanGradients:
    """Return the gradients of the inputs, each in its input's dtype."""
    scan = readable(inputs)
    du, ddelta, dB, dC = (torch.empty(x.shape, dtype=scan.u.dtype) for x in (scan.u, scan.delta, scan.B, scan.C))
    dz = None if scan.z is None else torch.empty(scan.z.shape, dtype=scan.u.dtype)
    dA, dD, dbias = run_scan_backward(scan, state.contiguous(), dy, du=du, ddelta=ddelta, dB=dB, dC=dC, dz=dz)
    return ScanGradients.cast(inputs, du, ddelta, dA, dB, dC, dD, dz, dbias)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    """Return y."""
    y = torch.empty(x.shape, dtype=x.dtype)
    call("conv_forward", Conv, x.dtype, **_conv(x, weight, bias, silu, reverse), y=y)
    return y


def causal_conv1d_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of x, weight and bias, each in its input's dtype."""
    dx = torch.empty(x.shape, dtype=x.dtype)
    dweight, dbias = convolve_backward(dy, (x, weight, bias, silu, reverse), dx)
    return dx, dweight.to(weight.dtype), None if bias is None else dbias.to(bias.dtype)


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the normed sum and the sum."""
    normed, total = torch.empty(x.shape, dtype=x.dtype), _floats(*x.shape)
    given = {"x": x.contiguous(), "residual": optional_parameter(residual), "weight": parameter(weight)}
    _norm("norm_forward", x, eps, **given, normed=normed, total=total)
    return normed, total


def add_rms_norm_backward(
    dnormed: Tensor, dtotal: Tensor, total: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the sum and of weight."""
    grad, dweight = _floats(*total.shape), _floats(*weight.shape)
    given = {"dtotal": parameter(dtotal), "total": parameter(total), "weight": parameter(weight)}
    _norm("norm_backward", dnormed, eps, dnormed=dnormed.contiguous(), **given, grad=grad, dweight=dweight)
    return grad, dweight.to(weight.dtype)


def _norm(kernel: str, like: Tensor, eps: float, **tensors: Tensor | None) -> None:
    batch, length, channels = like.shape
    call(kernel, Norm, like.dtype, rows=batch * length, channels=channels, eps=eps, **tensors)


def fuse_tokens(x: Tensor, places: Tensor, weights: Tensor, length: int) -> Tensor:
    """Return the fused tokens (b, length, c)."""
    y = torch.empty(x.shape[0], length, x.shape[2], dtype=x.dtype)
    _fuse("fuse_forward", activation(x, x.dtype), y, places, weights)
    return y


def fuse_tokens_backward(dy: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """Return the gradient of the tokens."""
    dx = torch.empty(*places.shape, dy.shape[2], dtype=dy.dtype)
    _fuse("fuse_backward", dx, activation(dy, dy.dtype), places, weights)
    return dx


def _fuse(kernel: str, tokens: Tensor, fused: Tensor, places: Tensor, weights: Tensor) -> None:
    batch, length, channels = tokens.shape
    most = fused.shape[1]
    # A place outside would be written to outside.
    if places.numel() and not 0 <= int(places.min()) <= int(places.max()) < most:
        raise ConfigError(f"fuse_tokens: places from {places.min()} to {places.max()}, expected 0 to {most - 1}")
    sizes = {"batch": batch, "length": length, "fused": most, "channels": channels}
    given = {"places": places.contiguous(), "weights": parameter(weights)}
    call(kernel, Fuse, tokens.dtype, **sizes, x=tokens, y=fused, **given)


def activation(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an activation as the kernels read it: of one dtype, channels adjacent."""
    x = x.to(dtype)
    return x if x.stride(-1) == 1 else x.contiguous()


def readable(inputs: ScanInputs) -> ScanInputs:
    """Return a scan as the kernel reads it: activations of one dtype, parameters in float32."""
    u, delta, A, B, C, D, z, delta_bias, softplus, reverse = inputs
    dtype = common_dtype(u, delta, B, C, z)
    u, delta, B, C = (activation(x, dtype) for x in (u, delta, B, C))
    z = None if z is None else activation(z, dtype)
    return ScanInputs(
        u, delta, parameter(A), B, C, optional_parameter(D), z, optional_parameter(delta_bias), softplus, reverse
    )


def run_scan_backward(inputs: ScanInputs, state: Tensor, dy: Tensor, **more: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of A, D and delta_bias of a scan as `readable` gives it; write what memory is given for.

    more: further fields of `Scan`: du, ddelta, dB, dC, dz, and y again; scale, accumulate.
    """
    A, dtype = inputs.A, inputs.u.dtype
    dA, dD, dbias = _floats(*A.shape), _floats(A.shape[0]), _floats(A.shape[0])
    sums = {"dA": dA, "dD": dD, "ddelta_bias": dbias}
    call("scan_backward", Scan, dtype, **_scan(inputs, state) | more, dy=activation(dy, dtype), **sums)
    return dA, dD, dbias


def _scan(inputs: ScanInputs, state: Tensor) -> dict[str, Any]:
    batch, length, channels = inputs.u.shape
    sizes = {"batch": batch, "length": length, "channels": channels, "states": inputs.A.shape[1]}
    given = inputs._asdict()
    how = {"chunk": scan_chunk(length), "softplus": given.pop("delta_softplus"), "scale": 1.0}
    return {**sizes, **how, **given, "state": state}


def convolve_backward(
    dy: Tensor, convolution: tuple[Any, ...], dx: Tensor, accumulate: bool = False
) -> tuple[Tensor, Tensor]:
    """Write the input's gradient, or add it to dx; return those of weight and bias in float32.

    convolution: x, weight, bias, silu and reverse.
    """
    x, weight, *_ = convolution
    dweight, dbias = _floats(*weight.shape), _floats(weight.shape[0])
    written = {"dx": dx, "dweight": dweight, "dbias": dbias, "accumulate": accumulate}
    call("conv_backward", Conv, x.dtype, **_conv(*convolution), dy=activation(dy, x.dtype), **written)
    return dweight, dbias


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> dict[str, Any]:
    batch, length, channels = x.shape
    sizes = {"batch": batch, "length": length, "channels": channels, "width": weight.shape[1]}
    given = {"x": activation(x, x.dtype), "weight": parameter(weight), "bias": optional_parameter(bias)}
    return {**sizes, "silu": silu, "reverse": reverse, **given}


def mixer_kept_shapes(inputs: MixerInputs) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Return the shapes of u, of dt, B and C for both directions, of copied weights, and of the scans' kept states."""
    (batch, length, _), (channels, states) = inputs.x.shape, inputs.forward.A.shape
    projected = (2, batch, length, Columns.of(inputs, padded=False).width)
    shapes = [(batch, length, channels), projected, ProductWeights.kept_shape(inputs, padded=False)]
    return shapes, [(2, *scan_state_shape(batch, length, channels, states))]


def mixer(inputs: MixerInputs, measure: bool) -> tuple[Tensor | None, ...]:
    """Return the result, the measures where they are asked for, and what the backward needs."""
    x = inputs.x
    weights, copied = ProductWeights.copied(inputs, padded=False)
    tokens = flatten(x.contiguous())
    u, z = (as_tokens(tokens @ half.t(), x) for half in weights.into.chunk(2))
    y, inner, delta = (torch.empty_like(u) for _ in range(3))
    projected = u.new_empty(2, *u.shape[:2], weights.x.shape[1])
    states = _floats(*mixer_kept_shapes(inputs)[1][0])
    measures = _floats(2, 2, *u.shape[:2]) if measure else None
    for reverse, side in enumerate(inputs.directions):
        convolution = _conv(u, side.conv_weight, side.conv_bias, True, bool(reverse))
        call("conv_forward", Conv, x.dtype, **convolution, y=inner)
        torch.mm(flatten(inner), weights.x[reverse].t(), out=flatten(projected[reverse]))
        scan = _scan_of((inner, delta, z, projected[reverse]), weights, inputs, reverse)
        # The second direction adds to what the first has written.
        steps, outputs = (None, None) if measures is None else measures[:, reverse]
        more = {"scale": 0.5, "accumulate": bool(reverse), "step_means": steps, "output_sums": outputs}
        call("scan_forward", Scan, x.dtype, **_scan(scan, states[reverse]) | more, y=y)
    out = y if weights.out is None else as_tokens(flatten(y) @ weights.out.t(), x)
    return out, measures, u, projected, copied, states


def mixer_backward(dout: Tensor, inputs: MixerInputs, kept: Sequence[Tensor]) -> MixerInputs:
    """Return the gradients in the places of the inputs, each in its input's dtype."""
    u, projected, copied, states, *_ = kept
    x, channels, weights = inputs.x, u.shape[2], ProductWeights.kept(copied, inputs, padded=False)
    tokens, dout = flatten(x.contiguous()), activation(dout, x.dtype).contiguous()
    # The gate is worked out again: keeping it would cost a third more memory, its product 4 % of a step's.
    z = as_tokens(tokens @ weights.into[channels:].t(), x)
    dy, y = dout, None
    if weights.out is not None:
        dy, y = as_tokens(flatten(dout) @ weights.out, x), torch.empty_like(u)
    inner, delta, dinner, ddelta = (torch.empty_like(u) for _ in range(4))
    dxz = x.new_empty(*x.shape[:2], 2 * channels)
    du, dz = dxz.chunk(2, dim=-1)
    columns, dprojected = Columns.of(inputs, padded=False), torch.empty_like(projected[0])
    ddt, dB, dC = columns.split(dprojected)
    columns.clear_tail(dprojected)
    dx_weight, ddt_weight, others = torch.empty_like(weights.x), torch.empty_like(weights.dt), []
    for reverse, side in enumerate(inputs.directions):
        convolution = (u, side.conv_weight, side.conv_bias, True, bool(reverse))
        call("conv_forward", Conv, x.dtype, **_conv(*convolution), y=inner)
        scan = _scan_of((inner, delta, z, projected[reverse]), weights, inputs, reverse)
        written = {"du": dinner, "ddelta": ddelta, "dB": dB, "dC": dC, "dz": dz, "y": y}
        dA, dD, dbias = run_scan_backward(scan, states[reverse], dy, scale=0.5, accumulate=bool(reverse), **written)
        flat_ddelta, flat = flatten(ddelta), flatten(dprojected)
        ddt.copy_(as_tokens(flat_ddelta @ weights.dt[reverse], x))
        torch.mm(flat_ddelta.t(), flatten(projected[reverse])[:, : columns.dt], out=ddt_weight[reverse])
        flatten(dinner).addmm_(flat, weights.x[reverse])
        torch.mm(flat.t(), flatten(inner), out=dx_weight[reverse])
        others.append((*convolve_backward(dinner, convolution, du, accumulate=bool(reverse)), dbias, dA, dD))
    flat, dout_weight = flatten(dxz), None if y is None else flatten(dout).t() @ flatten(y)
    of_products = ProductWeights(flat.t() @ tokens, dx_weight, ddt_weight, dout_weight)
    return of_products.with_others((flat @ weights.into).view(x.shape), others, inputs)


def _scan_of(tensors: Sequence[Tensor], weights: ProductWeights, inputs: MixerInputs, reverse: int) -> ScanInputs:
    """Return the scan of a direction, ready for the kernel; write its step sizes."""
    inner, delta, z, projected = tensors
    dt, B, C = Columns.of(inputs, padded=False).split(projected)
    torch.mm(flatten(dt), weights.dt[reverse].t(), out=flatten(delta))
    side = inputs.directions[reverse]
    return readable(ScanInputs(inner, delta, side.A, B, C, side.D, z, side.dt_bias, True, bool(reverse)))
