"""Vim's mixer by Triton kernels and torch's matrix products.

Both directions share each launch of a kernel: forward 2 launches, backward 5 (the convolution and the walk over the
states again, the scans' gradients, the convolution's and its sums). Kept are the convolution's input and what the small
projections gave; the gate, the convolution, the step sizes and the states are worked out again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from famba.ops.checks import check_equal_directions
from famba.ops.triton.conv import convolve, convolve_backward
from famba.ops.triton.launch import activation
from famba.ops.triton.scan import Gradients, Scans, scan, scan_backward, stack_parameters

_REVERSES = (False, True)


def mixer_kept_shapes(batch: int, length: int, channels: int, projected: int, states: int) -> list[tuple[int, ...]]:
    """Shapes of u, of dt, B and C of both directions in one tensor, and of three that hold nothing."""
    return [(batch, length, channels), (2, batch, length, projected), *[(0,)] * 3]


def mixer(
    x: Tensor, in_weight: Tensor, forward: Sequence[Tensor], backward: Sequence[Tensor], out_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the result, and what the backward needs."""
    check_equal_directions("triton", forward, backward)
    channels = in_weight.shape[0] // 2
    tokens = x.reshape(-1, x.shape[2])
    u, z = (_rows(tokens @ half.t(), x) for half in in_weight.split(channels))
    directions = (forward, backward)
    inner = _convolved(u, directions)
    projected = u.new_empty(2, *x.shape[:2], forward[2].shape[0])
    for inside, out, weights in zip(inner, projected, directions, strict=True):
        torch.mm(_flat(inside), weights[2].t(), out=_flat(out))
    y = scan(_scans(inner, projected, z, directions))
    y = y[0] + y[1]
    out = y if out_weight is None else _rows(_flat(y) @ out_weight.t(), x)
    nothing = (torch.empty(0, dtype=torch.float32, device=x.device) for _ in range(2))
    return out, u, projected, u.new_empty(0), *nothing  # type: ignore[return-value]


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
    u, projected = kept[:2]
    directions = (forward, backward)
    tokens, dout = x.reshape(-1, x.shape[2]), activation(dout, x.dtype)
    flat_dout = dout.reshape(-1, dout.shape[2])
    # The gate is worked out again: keeping it would cost a third more memory, its product 4 % of a step's.
    z = _rows(tokens @ in_weight[u.shape[2] :].t(), x)
    dy = dout if out_weight is None else _rows(flat_dout @ out_weight, x)

    inner = _convolved(u, directions)
    scans = _scans(inner, projected, z, directions)
    of_scans = scan_backward(scans, dy, with_y=out_weight is not None)
    dinner, of_projections = _projections_backward(of_scans, inner, projected, directions)
    du, dconv_weights, dconv_biases = convolve_backward(
        dinner, u, [w[0] for w in directions], [w[1] for w in directions], True, _REVERSES
    )

    assert of_scans.z is not None
    dxz = _flat(torch.cat([du, of_scans.z[0] + of_scans.z[1]], dim=2))
    grads = []
    for k, weights in enumerate(directions):
        dA, dD, dbias = of_scans.parameters(k)
        of_direction = (dconv_weights[k], dconv_biases[k], *of_projections[k], dbias, dA, dD)
        grads.append([g.to(w.dtype) for g, w in zip(of_direction, weights, strict=True) if g is not None])
    dout_weight = None
    if of_scans.y is not None:
        dout_weight = flat_dout.t() @ _flat(of_scans.y[0] + of_scans.y[1])
    return (dxz @ in_weight).view(x.shape), dxz.t() @ tokens, grads[0], grads[1], dout_weight


def _convolved(u: Tensor, directions: Sequence[Sequence[Tensor]]) -> Tensor:
    """The inputs of both scans, (2, b, l, d)."""
    return convolve(u, [w[0] for w in directions], [w[1] for w in directions], True, _REVERSES)


def _scans(inner: Tensor, projected: Tensor, z: Tensor, directions: Sequence[Sequence[Tensor]]) -> Scans:
    """Both scans, each of which gives half of the result; works out the step sizes."""
    rank = directions[0][3].shape[1]
    delta = torch.empty_like(inner)
    for dt, out, weights in zip(projected[..., :rank], delta, directions, strict=True):
        torch.mm(dt.reshape(-1, rank), weights[3].t(), out=_flat(out))
    B, C = projected[..., rank:].chunk(2, dim=-1)
    dt_biases, As, Ds = ([w[i] for w in directions] for i in (4, 5, 6))
    return Scans(inner, delta, B, C, z, stack_parameters(As, Ds, dt_biases), _REVERSES, scale=0.5)


def _projections_backward(
    grads: Gradients, inner: Tensor, projected: Tensor, directions: Sequence[Sequence[Tensor]]
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Gradients of the scans' inputs (2, b, l, d), and of x_weight and dt_weight of each direction."""
    rank = directions[0][3].shape[1]
    states = grads.BC.shape[3]
    dprojected = torch.empty_like(projected)
    dprojected[..., rank:].unflatten(3, (2, states)).copy_(grads.BC.permute(1, 2, 4, 0, 3))
    of_weights = []
    for k, weights in enumerate(directions):
        ddelta, flat = _flat(grads.delta[k]), _flat(dprojected[k])
        torch.mm(ddelta, weights[3], out=flat[:, :rank])
        _flat(grads.u[k]).addmm_(flat, weights[2])
        of_weights.append((flat.t() @ _flat(inner[k]), ddelta.t() @ _flat(projected[k])[:, :rank]))
    return grads.u, of_weights


def _flat(x: Tensor) -> Tensor:
    """(b, l, c) as (b l, c)."""
    return x.view(-1, x.shape[2])


def _rows(flat: Tensor, like: Tensor) -> Tensor:
    """(b l, c) as (b, l, c)."""
    return flat.view(like.shape[0], like.shape[1], flat.shape[1])
