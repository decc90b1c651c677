"""Vim's mixer by the CUDA extensions and torch's matrix products, in one layout from its input to its output.

Inside everything is (channels, batch, length): that is what a product of weight and tokens^T gives, what the extensions
read as (batch, channels, length) through strides, and what all further products read without a copy. Both directions
run in one call: their channels are stacked, the second direction's steps are turned round, and the scan reads B and C
in two groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from famba.ops.checks import check_equal_directions
from famba.ops.mamba_ssm import calls


def mixer_kept_shapes(batch: int, length: int, channels: int, projected: int, states: int) -> list[tuple[int, ...]]:
    """Shapes of u, of dt, B and C of both directions, of the scans' mean, of states between chunks; one is spare.

    The mean is kept since to work it out again would be another scan. The rest is worked out again.
    """
    inner = (channels, batch, length)
    entering = calls.entering_shape(batch, length, 2 * channels, states)
    return [inner, (2, projected, batch, length), inner, entering, (0,)]


def mixer(
    x: Tensor, in_weight: Tensor, forward: Sequence[Tensor], backward: Sequence[Tensor], out_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the result, and what the backward needs."""
    weights = _Weights(forward, backward)
    tokens = _Tokens(x)
    u, z = (tokens.project(half) for half in in_weight.chunk(2))
    inner = weights.convolve(_both(u))
    projected = weights.project(inner)
    y, _, entering = calls.scan(weights.scan(inner, projected))
    mean = torch.lerp(*_directions(y.transpose(0, 1)), 0.5)
    gated = mean * F.silu(z)
    out = tokens.rows(gated) if out_weight is None else tokens.product(gated, out_weight)
    return out, u, projected, mean, entering, entering.new_empty(0)


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
    u, projected, mean, entering, _ = kept
    weights = _Weights(forward, backward)
    tokens = _Tokens(x)
    z = tokens.project(in_weight[u.shape[0] :])
    gate = F.silu(z)
    dgated = tokens.project_rows(dout, out_weight)
    dout_weight = None if out_weight is None else _flat(dout).t() @ (mean * gate).flatten(1).t()
    dz = torch.ops.aten.silu_backward(dgated * mean, z)
    dy = _both(dgated * gate / 2)
    both = _both(u)
    inner = weights.convolve(both)
    grads = calls.scan_backward(weights.scan(inner, projected), dy.transpose(0, 1), None, entering)
    du, dforward, dbackward = weights.gradients(both, inner, projected, grads)
    dxz = torch.cat([du, dz]).flatten(1)
    return (dxz.t() @ in_weight).view(x.shape), dxz @ tokens.flat, dforward, dbackward, dout_weight


class _Tokens:
    """Tokens x (b, l, c), and products between them and (channels, b, l)."""

    def __init__(self, x: Tensor) -> None:
        self._batch, self._length, _ = x.shape
        self.flat = _flat(x)

    def project(self, weight: Tensor) -> Tensor:
        """Product of weight (d, c) and the tokens: (d, b, l)."""
        return self._unflatten(weight @ self.flat.t())

    def project_rows(self, dout: Tensor, weight: Tensor | None) -> Tensor:
        """Product of weight^T, where there is one, and dout (b, l, c): (d, b, l)."""
        flat = _flat(dout).t()
        return self._unflatten(flat.contiguous() if weight is None else weight.t() @ flat)

    def product(self, inner: Tensor, weight: Tensor) -> Tensor:
        """Product of inner (d, b, l) and weight (c, d), turned: (b, l, c)."""
        return (inner.flatten(1).t() @ weight.t()).unflatten(0, (self._batch, self._length))

    def rows(self, inner: Tensor) -> Tensor:
        """(d, b, l) as (b, l, d)."""
        return inner.permute(1, 2, 0).contiguous()

    def _unflatten(self, inner: Tensor) -> Tensor:
        """(d, b l) as (d, b, l)."""
        return inner.unflatten(1, (self._batch, self._length))


class _Weights:
    """The weights of both directions, stacked as the extensions and the products of both take them."""

    def __init__(self, forward: Sequence[Tensor], backward: Sequence[Tensor]) -> None:
        check_equal_directions("mamba_ssm", forward, backward)
        self._dtypes = [[weight.dtype for weight in direction] for direction in (forward, backward)]
        conv_weight, conv_bias, x_weight, dt_weight, dt_bias, A, D = zip(forward, backward, strict=True)
        self._conv_weight, self._conv_bias, self._dt_bias, self._A, self._D = (
            torch.cat(pair).to(torch.float32) for pair in (conv_weight, conv_bias, dt_bias, A, D)
        )
        self._x_weight, self._dt_weight = torch.stack(x_weight), torch.stack(dt_weight)

    def convolve(self, both: Tensor) -> Tensor:
        """The scans' input from u for both directions: (2 d, b, l)."""
        y = calls.convolve(both.transpose(0, 1), self._conv_weight, self._conv_bias, silu=True)
        return y.transpose(0, 1)

    def project(self, inner: Tensor) -> Tensor:
        """dt, B and C of both directions from the scans' input (2 d, b, l): (2, r + 2 n, b, l)."""
        return torch.bmm(self._x_weight, _halves(inner)).unflatten(2, inner.shape[1:])

    def scan(self, inner: Tensor, projected: Tensor) -> calls.Scan:
        """The scan of inner (2 d, b, l) for dt, B and C (2, r + 2 n, b, l), without its gate."""
        dt, B, C = self._split(projected)
        delta = torch.bmm(self._dt_weight, dt.flatten(2)).view(inner.shape)
        # (2, n, b, l) as (b, 2, n, l): a group for each direction.
        B, C = (x.permute(2, 0, 1, 3) for x in (B, C))
        return calls.Scan(
            inner.transpose(0, 1), delta.transpose(0, 1), self._A, B, C, self._D, None, self._dt_bias, softplus=True
        )

    def gradients(
        self, both: Tensor, inner: Tensor, projected: Tensor, grads: calls.ScanGradients
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Gradients of u (d, b, l) and of both directions' weights, from those of the scan."""
        dt, _, _ = self._split(projected)
        ddelta, flat = _halves(grads.delta.transpose(0, 1)), _halves(inner)
        ddt = torch.bmm(self._dt_weight.transpose(1, 2), ddelta).view(dt.shape)
        dprojected = torch.cat([ddt, *(g.permute(1, 2, 0, 3) for g in (grads.B, grads.C))], dim=1).flatten(2)
        dinner = torch.baddbmm(_halves(grads.u.transpose(0, 1)), self._x_weight.transpose(1, 2), dprojected)
        dboth, dconv_weight, dconv_bias = calls.convolve_backward(
            both.transpose(0, 1),
            self._conv_weight,
            self._conv_bias,
            True,
            dinner.view(inner.shape).transpose(0, 1),
        )
        dx_weight = torch.bmm(dprojected, flat.transpose(1, 2))
        ddt_weight = torch.bmm(ddelta, dt.flatten(2).transpose(1, 2))
        first, second = _directions(dboth.transpose(0, 1))
        stacked = (dconv_weight, dconv_bias, dx_weight, ddt_weight, grads.delta_bias, grads.A, grads.D)
        return first + second, *self._unstacked(stacked)

    def _split(self, projected: Tensor) -> tuple[Tensor, ...]:
        states = self._A.shape[1]
        return projected.split([projected.shape[1] - 2 * states, states, states], dim=1)

    def _unstacked(self, stacked: Sequence[Tensor | None]) -> tuple[list[Tensor], list[Tensor]]:
        """Each direction's gradients, in the dtypes of its weights."""
        halves = [
            grad.flatten(0, 1).chunk(2) if grad.ndim == 3 else grad.chunk(2) for grad in stacked if grad is not None
        ]
        forward, backward = (
            [half.to(dtype, copy=True) for half, dtype in zip(side, dtypes, strict=True)]
            for side, dtypes in zip(zip(*halves, strict=True), self._dtypes, strict=True)
        )
        return forward, backward


def _flat(x: Tensor) -> Tensor:
    """(b, l, c) as (b l, c)."""
    return x.reshape(-1, x.shape[2])


def _both(x: Tensor) -> Tensor:
    """Stack x (d, b, l) on itself with its steps turned round: (2 d, b, l)."""
    return torch.cat([x, x.flip(2)])


def _directions(both: Tensor) -> tuple[Tensor, Tensor]:
    """The halves of (2 d, b, l), the second with its steps turned back."""
    first, second = both.chunk(2)
    return first, second.flip(2)


def _halves(both: Tensor) -> Tensor:
    """(2 d, b, l) as (2, d, b l)."""
    return both.reshape(2, both.shape[0] // 2, -1)
