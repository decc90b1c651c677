"""Run Vim's mixer by compiled kernels and torch's matrix products, with as little kept and moved as can be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from famba.ops.inputs import Direction, MixerInputs, MixerSizes, ScanInputs
from famba.ops.native.kernels import (
    activation,
    convolve,
    convolve_backward,
    readable,
    run_scan,
    run_scan_backward,
    scan_state_shape,
)
from famba.ops.products import as_tokens, copy_each, flat_size, flatten, split_flat


def mixer_kept_shapes(sizes: MixerSizes) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Return the shapes of u, of dt, B and C for both directions, of cast weights, and of the scans' kept states."""
    tokens = (sizes.batch, sizes.length)
    state = scan_state_shape(sizes.batch, sizes.length, sizes.channels, sizes.states)
    projected = (*tokens, sizes.rank + 2 * sizes.states)
    return [(*tokens, sizes.channels), projected, projected, (flat_size(_shapes(sizes)),)], [(2, *state)]


def mixer(inputs: MixerInputs, measure: bool) -> tuple[Tensor | None, ...]:
    """Return the result, the measures where they are asked for, and what the backward needs."""
    x, sizes = inputs.x, inputs.sizes
    cast = x.new_zeros(flat_size(_shapes(sizes)))
    copy_each(zip(split_flat(cast, _shapes(sizes)), inputs.product_weights(), strict=False))
    products = _Products.of(inputs, cast)
    tokens = flatten(x.contiguous())
    u, z = (as_tokens(tokens @ half.t(), x) for half in products.into.chunk(2))
    y, inner, delta = (torch.empty_like(u) for _ in range(3))
    projections = []
    entering = torch.empty(2, *scan_state_shape(sizes.batch, sizes.length, sizes.channels, sizes.states))
    measures = torch.empty(2, 2, sizes.batch, sizes.length) if measure else None
    for reverse, weights in enumerate(inputs.directions):
        convolve(u, weights.conv_weight, weights.conv_bias, True, bool(reverse), inner)
        projections.append(as_tokens(flatten(inner) @ products.x[reverse].t(), x))
        scan = _scan(inner, delta, z, projections[-1], products.dt[reverse], weights, bool(reverse))
        # The second direction adds to what the first has written.
        of_direction = None if measures is None else measures[:, reverse]
        run_scan(scan, entering[reverse], y, 0.5, bool(reverse), of_direction)
    out = y if products.out is None else as_tokens(flatten(y) @ products.out.t(), x)
    return out, measures, u, *projections, cast, entering


def mixer_backward(
    dout: Tensor, inputs: MixerInputs, kept: Sequence[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], Tensor | None]:
    """Return the gradients of x, in_weight, both directions' weights and out_weight, each in its input's dtype."""
    u, *projections, cast, states = kept
    x, channels, products = inputs.x, u.shape[2], _Products.of(inputs, cast)
    tokens, dout = flatten(x.contiguous()), activation(dout, x.dtype).contiguous()
    # The gate is worked out again: keeping it would cost a third more memory, its product 4 % of a step's.
    z = as_tokens(tokens @ products.into[channels:].t(), x)
    dy, y = dout, None
    if products.out is not None:
        dy, y = as_tokens(flatten(dout) @ products.out, x), torch.empty_like(u)
    inner, delta, dinner, ddelta = (torch.empty_like(u) for _ in range(4))
    dxz = x.new_empty(*x.shape[:2], 2 * channels)
    du, dz = dxz.chunk(2, dim=-1)
    of_directions = []
    sides = zip(inputs.directions, projections, states, strict=True)
    for reverse, (weights, projected, entering) in enumerate(sides):
        convolution = (u, weights.conv_weight, weights.conv_bias, True, bool(reverse))
        convolve(*convolution, inner)
        rank, x_weight, dt_weight = weights.dt_weight.shape[1], products.x[reverse], products.dt[reverse]
        scan = _scan(inner, delta, z, projected, dt_weight, weights, bool(reverse))
        dprojected = torch.empty_like(projected)
        dB, dC = dprojected[..., rank:].chunk(2, dim=-1)
        written = {"du": dinner, "ddelta": ddelta, "dB": dB, "dC": dC, "dz": dz, "y": y}
        dA, dD, dbias = run_scan_backward(scan, entering, dy, scale=0.5, accumulate=bool(reverse), **written)
        flat_ddelta = flatten(ddelta)
        flatten(dprojected)[:, :rank].copy_(flat_ddelta @ dt_weight)
        ddt_weight = flat_ddelta.t() @ flatten(projected)[:, :rank]
        flatten(dinner).addmm_(flatten(dprojected), x_weight)
        dx_weight = flatten(dprojected).t() @ flatten(inner)
        dconv_weight, dconv_bias = convolve_backward(dinner, *convolution, du, accumulate=bool(reverse))
        grads = (dconv_weight, dconv_bias, dx_weight, ddt_weight, dbias, dA, dD)
        of_directions.append([grad.to(weight.dtype) for grad, weight in zip(grads, weights, strict=True)])
    flat, out_weight = flatten(dxz), inputs.out_weight
    dout_weight = None if out_weight is None or y is None else (flatten(dout).t() @ flatten(y)).to(out_weight.dtype)
    din_weight = (flat.t() @ tokens).to(inputs.in_weight.dtype)
    return (flat @ products.into).view(x.shape), din_weight, of_directions[0], of_directions[1], dout_weight


def _scan(
    inner: Tensor, delta: Tensor, z: Tensor, projected: Tensor, dt_weight: Tensor, weights: Direction, reverse: bool
) -> ScanInputs:
    """Return the scan of `inner` for dt, B and C (b, l, r + 2 n), ready for the kernel; write its step sizes."""
    rank = dt_weight.shape[1]
    B, C = projected[..., rank:].chunk(2, dim=-1)
    torch.mm(flatten(projected)[:, :rank], dt_weight.t(), out=flatten(delta))
    return readable(ScanInputs(inner, delta, weights.A, B, C, weights.D, z, weights.dt_bias, True, reverse))


def _shapes(sizes: MixerSizes) -> list[tuple[int, ...]]:
    """Return the shapes of the products' weights, in their order, where they are cast; of none where they are not."""
    if not sizes.cast:
        return []
    d = sizes.channels
    direction = [(sizes.rank + 2 * sizes.states, d), (d, sizes.rank)]
    return [(2 * d, sizes.d_model), *direction, *direction, *([] if sizes.out is None else [(sizes.out, d)])]


class _Products(NamedTuple):
    """Hold the weights of the matrix products in x's dtype: those cast, or the given ones."""

    into: Tensor
    x: tuple[Tensor, Tensor]
    dt: tuple[Tensor, Tensor]
    out: Tensor | None

    @classmethod
    def of(cls, inputs: MixerInputs, cast: Tensor) -> _Products:
        """Find them in the memory of those cast."""
        found = split_flat(cast, _shapes(inputs.sizes)) or list(inputs.product_weights())
        into, x, dt, x_back, dt_back, *out = found
        return cls(into, (x, x_back), (dt, dt_back), out[0] if out else None)
