"""Run Vim's mixer by Triton kernels and torch's matrix products.

Both directions share each launch of a kernel and each product. Kernels are launched twice forward and 7 times backward:
the convolution and the walk over the states again, the scans' gradients with two sums, the convolution's with one. Kept
is what the small projections gave, and the cast weights; all else is worked out again from the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from famba.ops.checks import check_equal_directions
from famba.ops.inputs import MixerInputs, MixerSizes
from famba.ops.products import Columns, ProductWeights, as_tokens, flatten
from famba.ops.triton.conv import convolve, convolve_backward
from famba.ops.triton.launch import activation
from famba.ops.triton.scan import Parameters, Scans, scan, scan_backward, stack_parameters

_REVERSES = (False, True)


def mixer_kept_shapes(sizes: MixerSizes) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Return the shapes of dt, B and C of both directions, padded as `Columns` says, and of the copied weights."""
    return [(2, sizes.batch, sizes.length, Columns.of(sizes).width), ProductWeights.kept_shape(sizes)], []


def mixer(inputs: MixerInputs, measure: bool) -> tuple[Tensor | None, ...]:
    """Return the result, the measures where they are asked for, and what the backward needs."""
    check_equal_directions("triton", *inputs.directions)
    x = inputs.x
    weights, copied = ProductWeights.copied(inputs)
    u, z = as_tokens(flatten(x) @ weights.into.t(), x).chunk(2, dim=2)
    inner = _convolved(u, inputs)
    projected = inner.new_empty(*inner.shape[:3], weights.x.shape[1])
    torch.bmm(_both(inner), weights.x.mT, out=_both(projected))
    y, measures = scan(_scans(inner, projected, z, weights, inputs), measure)
    y = y[0] + y[1]
    out = y if weights.out is None else as_tokens(flatten(y) @ weights.out.t(), x)
    return out, measures, projected, copied


def mixer_backward(
    dout: Tensor, inputs: MixerInputs, kept: Sequence[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], Tensor | None]:
    """Return the gradients of x, in_weight, both directions' weights and out_weight, each in its input's dtype."""
    projected, copied, *_ = kept
    x, weights = inputs.x, ProductWeights.kept(copied, inputs)
    tokens, flat_dout = flatten(x), flatten(activation(dout, x.dtype))
    dy = as_tokens(flat_dout if weights.out is None else flat_dout @ weights.out, x)
    # Kept, u and z would take eight times the memory of `projected` in a Vim-Ti, for one product that is saved.
    xz = tokens @ weights.into.t()
    u, z = as_tokens(xz, x).chunk(2, dim=2)
    inner = _convolved(u, inputs)
    scans = _scans(inner, projected, z, weights, inputs)

    columns, dprojected = Columns.of(inputs.sizes), torch.empty_like(projected)
    ddt, dB, dC = columns.split(dprojected)
    of_parameters = [Parameters(w.A, w.D, w.dt_bias).empty() for w in inputs.directions]
    grads = scan_backward(scans, dy, dB, dC, of_parameters, with_y=weights.out is not None)
    torch.bmm(_both(grads.delta), weights.dt, out=_both(ddt))
    columns.clear_tail(dprojected)
    dinner = _both(grads.u).baddbmm_(_both(dprojected), weights.x)

    dxz = torch.empty_like(xz)
    du, dz = as_tokens(dxz, x).chunk(2, dim=2)
    assert grads.z is not None
    torch.add(*grads.z, out=dz)
    of_convolutions = convolve_backward(dinner.view(inner.shape), u, *_convolutions(inputs), True, _REVERSES, du)

    dt, _, _ = columns.split(projected)
    of_products = ProductWeights(
        into=dxz.t() @ tokens,
        x=torch.bmm(_both(dprojected).mT, _both(inner)),
        dt=torch.bmm(_both(grads.delta).mT, _both(dt)),
        out=None if grads.y is None else flat_dout.t() @ flatten(grads.y[0] + grads.y[1]),
    )
    of_weights = of_products.as_given(inputs)
    of_directions = [
        [dweight, dbias, side.x_weight, side.dt_weight, parameters.delta_bias, parameters.A, parameters.D]
        for dweight, dbias, side, parameters in zip(*of_convolutions, of_weights.directions, of_parameters, strict=True)
    ]
    dx = (dxz @ weights.into).view(x.shape)
    return dx, of_weights.in_weight, *of_directions, of_weights.out_weight  # type: ignore[return-value]


def _convolutions(inputs: MixerInputs) -> tuple[list[Tensor], list[Tensor | None]]:
    """Return weights and biases of both convolutions."""
    return [w.conv_weight for w in inputs.directions], [w.conv_bias for w in inputs.directions]


def _convolved(u: Tensor, inputs: MixerInputs) -> Tensor:
    """Return the inputs of both scans, (2, b, l, d)."""
    return convolve(u, *_convolutions(inputs), True, _REVERSES)


def _scans(inner: Tensor, projected: Tensor, z: Tensor, weights: ProductWeights, inputs: MixerInputs) -> Scans:
    """Return both scans, each of which gives half of the result; work out the step sizes."""
    dt, B, C = Columns.of(inputs.sizes).split(projected)
    delta = torch.empty_like(inner)
    torch.bmm(_both(dt), weights.dt.mT, out=_both(delta))
    As, Ds, dt_biases = zip(*((w.A, w.D, w.dt_bias) for w in inputs.directions), strict=True)
    return Scans(inner, delta, B, C, z, stack_parameters(As, Ds, dt_biases), _REVERSES, scale=0.5)


def _both(x: Tensor) -> Tensor:
    """View (2, b, l, c), rows at equal distances, as (2, b l, c)."""
    # Not `flatten`, which makes a copy where it finds no view: products write here.
    return x.view(x.shape[0], x.shape[1] * x.shape[2], x.shape[3])
