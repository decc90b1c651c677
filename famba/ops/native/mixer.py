"""Run Vim's mixer by compiled kernels and torch's matrix products, with as little kept and moved as can be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from famba.ops.inputs import MixerInputs, ScanInputs
from famba.ops.layout import as_tokens, flatten
from famba.ops.native.kernels import (
    activation,
    convolve,
    convolve_backward,
    readable,
    run_scan,
    run_scan_backward,
    scan_state_shape,
)
from famba.ops.products import Columns, ProductWeights


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
    states = torch.empty(mixer_kept_shapes(inputs)[1][0])
    measures = torch.empty(2, 2, *u.shape[:2]) if measure else None
    for reverse, side in enumerate(inputs.directions):
        convolve(u, side.conv_weight, side.conv_bias, True, bool(reverse), inner)
        torch.mm(flatten(inner), weights.x[reverse].t(), out=flatten(projected[reverse]))
        scan = _scan((inner, delta, z, projected[reverse]), weights, inputs, reverse)
        # The second direction adds to what the first has written.
        steps, outputs = (None, None) if measures is None else measures[:, reverse]
        more = {"accumulate": bool(reverse), "step_means": steps, "output_sums": outputs}
        run_scan(scan, states[reverse], y, scale=0.5, **more)
    out = y if weights.out is None else as_tokens(flatten(y) @ weights.out.t(), x)
    return out, measures, u, projected, copied, states


def mixer_backward(
    dout: Tensor, inputs: MixerInputs, kept: Sequence[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], Tensor | None]:
    """Return the gradients of x, in_weight, both directions' weights and out_weight, each in its input's dtype."""
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
        convolve(*convolution, inner)
        scan = _scan((inner, delta, z, projected[reverse]), weights, inputs, reverse)
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
    of_weights = of_products.as_given(inputs)
    dx = (flat @ weights.into).view(x.shape)
    return dx, of_weights.in_weight, *of_weights.with_others(others, inputs), of_weights.out_weight


def _scan(tensors: Sequence[Tensor], weights: ProductWeights, inputs: MixerInputs, reverse: int) -> ScanInputs:
    """Return the scan of a direction, ready for the kernel; write its step sizes."""
    inner, delta, z, projected = tensors
    dt, B, C = Columns.of(inputs, padded=False).split(projected)
    torch.mm(flatten(dt), weights.dt[reverse].t(), out=flatten(delta))
    side = inputs.directions[reverse]
    return readable(ScanInputs(inner, delta, side.A, B, C, side.D, z, side.dt_bias, True, bool(reverse)))
