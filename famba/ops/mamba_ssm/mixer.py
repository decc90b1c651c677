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
from famba.ops.inputs import MixerInputs, MixerSizes
from famba.ops.mamba_ssm import calls
from famba.ops.products import Columns, ProductWeights, copy_each


def mixer_kept_shapes(sizes: MixerSizes) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Return the shapes of dt, B and C of both directions, the scans' mean, the copied weights, and the states kept.

    The mean is kept since to work it out again would be another scan. The rest is worked out again.
    """
    batch, length, channels = sizes.batch, sizes.length, sizes.channels
    projected = (2, Columns.of(sizes).width, batch, length)
    entering = calls.entering_shape(batch, length, 2 * channels, sizes.states)
    return [projected, (channels, batch, length), ProductWeights.kept_shape(sizes)], [entering]


def mixer(inputs: MixerInputs) -> tuple[Tensor, ...]:
    """Return the result, and what the backward needs."""
    check_equal_directions("mamba_ssm", *inputs.directions)
    products, copied = ProductWeights.copied(inputs)
    weights, tokens = _Weights(inputs, products), _Tokens(inputs.x)
    u, z = tokens.project(products.into).chunk(2)
    inner = weights.convolve(_both(u))
    projected = weights.project(inner)
    y, _, entering = calls.scan(weights.scan(inner, projected))
    mean = torch.lerp(*_directions(y.transpose(0, 1)), 0.5)
    gated = mean * F.silu(z)
    out = tokens.rows(gated) if products.out is None else tokens.product(gated, products.out)
    return out, projected, mean, copied, entering


def mixer_backward(
    dout: Tensor, inputs: MixerInputs, kept: Sequence[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], Tensor | None]:
    """Return the gradients of x, in_weight, both directions' weights and out_weight, each in its input's dtype."""
    projected, mean, copied, entering, *_ = kept
    x, products = inputs.x, ProductWeights.kept(copied, inputs)
    weights, tokens = _Weights(inputs, products), _Tokens(x)
    u, z = tokens.project(products.into).chunk(2)
    gate = F.silu(z)
    dgated = tokens.project_rows(dout, products.out)
    dxz = torch.empty(inputs.in_weight.shape[0], *x.shape[:2], dtype=x.dtype, device=x.device)
    du, dz = dxz.chunk(2)
    torch.ops.aten.silu_backward.grad_input(dgated * mean, z, grad_input=dz)
    dy = _both(dgated * gate / 2)
    both = _both(u)
    inner = weights.convolve(both)
    grads = calls.scan_backward(weights.scan(inner, projected), dy.transpose(0, 1), None, entering)
    dinner, dx_weight, ddt_weight = weights.project_back(inner, projected, grads)
    dboth, dconv_weight, dconv_bias = weights.convolve_back(both, dinner)
    torch.add(*_directions(dboth), out=du)
    of_products = ProductWeights(
        into=dxz.flatten(1) @ tokens.flat,
        x=dx_weight,
        dt=ddt_weight,
        out=None if products.out is None else _flat(dout).t() @ (mean * gate).flatten(1).t(),
    )
    din_weight, *of_projections, dout_weight = of_products.as_given(inputs)
    others = weights.unstacked(dconv_weight, dconv_bias, grads.delta_bias, grads.A, grads.D)
    dforward, dbackward = (
        [*side[:2], *projections, *side[2:]] for side, projections in zip(others, of_projections, strict=True)
    )
    return (dxz.flatten(1).t() @ products.into).view(x.shape), din_weight, dforward, dbackward, dout_weight


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

    def __init__(self, inputs: MixerInputs, products: ProductWeights) -> None:
        self._columns, self.products = Columns.of(inputs.sizes), products
        # Without those of the products: convolution, its bias, the step sizes' bias, A and D.
        self._others = [[*side[:2], *side[4:]] for side in inputs.directions]
        self._conv_weight, self._conv_bias, self._dt_bias, self._A, self._D = (
            torch.cat(pair).to(torch.float32) for pair in zip(*self._others, strict=True)
        )

    def convolve(self, both: Tensor) -> Tensor:
        """The scans' input from u for both directions: (2 d, b, l)."""
        y = calls.convolve(both.transpose(0, 1), self._conv_weight, self._conv_bias, silu=True)
        return y.transpose(0, 1)

    def project(self, inner: Tensor) -> Tensor:
        """Work out dt, B and C of both directions, padded (2, width, b, l), from the scans' input (2 d, b, l)."""
        return torch.bmm(self.products.x, _halves(inner)).unflatten(2, inner.shape[1:])

    def scan(self, inner: Tensor, projected: Tensor) -> calls.Scan:
        """The scan of inner (2 d, b, l) for dt, B and C (2, width, b, l), without its gate."""
        dt, B, C = self._columns.split(projected, dim=1)
        delta = torch.bmm(self.products.dt, dt.flatten(2)).view(inner.shape)
        # (2, n, b, l) as (b, 2, n, l): a group for each direction.
        B, C = (x.permute(2, 0, 1, 3) for x in (B, C))
        return calls.Scan(
            inner.transpose(0, 1), delta.transpose(0, 1), self._A, B, C, self._D, None, self._dt_bias, softplus=True
        )

    def project_back(
        self, inner: Tensor, projected: Tensor, grads: calls.ScanGradients
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return gradients of the input (2 d, b, l), x (2, width, d) and dt (2, d, dt), from those of the scan."""
        dt, _, _ = self._columns.split(projected, dim=1)
        ddelta, dprojected = _halves(grads.delta.transpose(0, 1)), torch.empty_like(projected)
        ddt, dB, dC = self._columns.split(dprojected, dim=1)
        torch.bmm(self.products.dt.mT, ddelta, out=ddt.view(2, self._columns.dt, ddelta.shape[2]))
        for into, grad in ((dB, grads.B), (dC, grads.C)):
            into.copy_(grad.permute(1, 2, 0, 3))
        self._columns.clear_tail(dprojected, dim=1)
        flat = dprojected.flatten(2)
        dinner = torch.baddbmm(_halves(grads.u.transpose(0, 1)), self.products.x.mT, flat)
        return dinner.view(inner.shape), torch.bmm(flat, _halves(inner).mT), torch.bmm(ddelta, dt.flatten(2).mT)

    def convolve_back(self, both: Tensor, dinner: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return gradients of u for both directions (2 d, b, l), and of the stacked weights and biases."""
        dboth, dweight, dbias = calls.convolve_backward(
            both.transpose(0, 1), self._conv_weight, self._conv_bias, True, dinner.transpose(0, 1)
        )
        return dboth.transpose(0, 1), dweight, dbias

    def unstacked(self, *stacked: Tensor | None) -> list[list[Tensor]]:
        """Return each direction's gradients of the weights that are not the products', in the dtypes of these."""
        sides = [[torch.empty_like(w, memory_format=torch.contiguous_format) for w in side] for side in self._others]
        halves = zip(*(grad.chunk(2) for grad in stacked if grad is not None), strict=True)
        copy_each(pair for side, half in zip(sides, halves, strict=True) for pair in zip(side, half, strict=True))
        return sides


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
