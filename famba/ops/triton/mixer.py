"""Vim's mixer by Triton kernels and torch's matrix products.

Both directions share each launch of a kernel and each product. Kernels are launched twice forward and 7 times backward:
the convolution and the walk over the states again, the scans' gradients with two sums, the convolution's with one. Kept
is what the small projections gave; all else is worked out again from the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from famba.ops.checks import check_equal_directions
from famba.ops.products import Columns, ProductWeights
from famba.ops.triton.conv import convolve, convolve_backward
from famba.ops.triton.launch import activation
from famba.ops.triton.scan import Parameters, Scans, scan, scan_backward, stack_parameters

_REVERSES = (False, True)


def mixer_kept_shapes(batch: int, length: int, channels: int, projected: int, states: int) -> list[tuple[int, ...]]:
    """Return the shapes of dt, B and C of both directions, padded as `Columns` says, and of four empty tensors."""
    return [(2, batch, length, Columns(projected - 2 * states, states).width), *[(0,)] * 4]


def mixer(
    x: Tensor, in_weight: Tensor, forward: Sequence[Tensor], backward: Sequence[Tensor], out_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the result, and what the backward needs."""
    check_equal_directions("triton", forward, backward)
    directions, weights = (forward, backward), ProductWeights.of(x.dtype, in_weight, forward, backward, out_weight)
    u, z = _rows(_flat(x) @ weights.into.t(), x).chunk(2, dim=2)
    inner = _convolved(u, directions)
    projected = inner.new_empty(*inner.shape[:3], weights.x.shape[1])
    torch.bmm(_both(inner), weights.x.mT, out=_both(projected))
    y = scan(_scans(inner, projected, z, weights, directions))
    y = y[0] + y[1]
    out = y if weights.out is None else _rows(_flat(y) @ weights.out.t(), x)
    nothing = [
        torch.empty(0, dtype=dtype, device=x.device) for dtype in (x.dtype, x.dtype, torch.float32, torch.float32)
    ]
    return out, projected, *nothing  # type: ignore[return-value]


def mixer_backward(
    dout: Tensor,
    x: Tensor,
    in_weight: Tensor,
    forward: Sequence[Tensor],
    backward: Sequence[Tensor],
    out_weight: Tensor | None,
    kept: Sequence[Tensor],
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], Tensor | None]:
    """Gradients of x, in_weight, both directions' weights and out_weight, each in its input's dtype."""
    directions, weights = (forward, backward), ProductWeights.of(x.dtype, in_weight, forward, backward, out_weight)
    projected = kept[0]
    tokens, flat_dout = _flat(x), _flat(activation(dout, x.dtype))
    dy = _rows(flat_dout if weights.out is None else flat_dout @ weights.out, x)
    # Kept, u and z would take eight times the memory of `projected` in a Vim-Ti, for one product that is saved.
    xz = tokens @ weights.into.t()
    u, z = _rows(xz, x).chunk(2, dim=2)
    inner = _convolved(u, directions)
    scans = _scans(inner, projected, z, weights, directions)

    columns, dprojected = Columns.of(forward), torch.empty_like(projected)
    ddt, dB, dC = columns.split(dprojected)
    of_parameters = [Parameters(w[5], w[6], w[4]).empty() for w in directions]
    grads = scan_backward(scans, dy, dB, dC, of_parameters, with_y=weights.out is not None)
    torch.bmm(_both(grads.delta), weights.dt, out=_both(ddt))
    columns.clear_tail(dprojected)
    dinner = _both(grads.u).baddbmm_(_both(dprojected), weights.x)

    dxz = torch.empty_like(xz)
    du, dz = _rows(dxz, x).chunk(2, dim=2)
    assert grads.z is not None
    torch.add(*grads.z, out=dz)
    of_convolutions = convolve_backward(
        dinner.view(inner.shape), u, [w[0] for w in directions], [w[1] for w in directions], True, _REVERSES, du
    )

    dt, _, _ = columns.split(projected)
    of_products = ProductWeights(
        into=dxz.t() @ tokens,
        x=torch.bmm(_both(dprojected).mT, _both(inner)),
        dt=torch.bmm(_both(grads.delta).mT, _both(dt)),
        out=None if grads.y is None else flat_dout.t() @ _flat(grads.y[0] + grads.y[1]),
    )
    din_weight, *of_projections, dout_weight = of_products.as_given(in_weight, forward, backward, out_weight)
    of_directions = [
        [dweight, dbias, *projections, parameters.delta_bias, parameters.A, parameters.D]
        for dweight, dbias, projections, parameters in zip(*of_convolutions, of_projections, of_parameters, strict=True)
    ]
    return (dxz @ weights.into).view(x.shape), din_weight, *of_directions, dout_weight  # type: ignore[return-value]


def _convolved(u: Tensor, directions: Sequence[Sequence[Tensor]]) -> Tensor:
    """The inputs of both scans, (2, b, l, d)."""
    return convolve(u, [w[0] for w in directions], [w[1] for w in directions], True, _REVERSES)


def _scans(
    inner: Tensor, projected: Tensor, z: Tensor, weights: ProductWeights, directions: Sequence[Sequence[Tensor]]
) -> Scans:
    """Both scans, each of which gives half of the result; works out the step sizes."""
    dt, B, C = Columns.of(directions[0]).split(projected)
    delta = torch.empty_like(inner)
    torch.bmm(_both(dt), weights.dt.mT, out=_both(delta))
    dt_biases, As, Ds = ([w[i] for w in directions] for i in (4, 5, 6))
    return Scans(inner, delta, B, C, z, stack_parameters(As, Ds, dt_biases), _REVERSES, scale=0.5)


def _both(x: Tensor) -> Tensor:
    """View (2, b, l, c), rows at equal distances, as (2, b l, c)."""
    # Not `flatten`, which makes a copy where it finds no view: products write here.
    return x.view(x.shape[0], x.shape[1] * x.shape[2], x.shape[3])


def _flat(x: Tensor) -> Tensor:
    """(b, l, c) as (b l, c)."""
    return x.reshape(-1, x.shape[2])


def _rows(flat: Tensor, like: Tensor) -> Tensor:
    """(b l, c) as (b, l, c)."""
    return flat.view(like.shape[0], like.shape[1], flat.shape[1])
