"""Vim's mixer by compiled kernels and torch's matrix products, with as little kept and moved as can be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from famba.ops.inputs import MixerInputs, MixerSizes
from famba.ops.native.kernels import ConvArguments, ScanArguments, activation, scan_state_shape
from famba.ops.products import copy_each, flat_size, split_flat


def mixer_kept_shapes(sizes: MixerSizes) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Return the shapes of u, of dt, B and C for both directions, of cast weights, and of both scans' kept states."""
    tokens = (sizes.batch, sizes.length)
    state = scan_state_shape(sizes.batch, sizes.length, sizes.channels, sizes.states)
    projected = (*tokens, sizes.rank + 2 * sizes.states)
    return [(*tokens, sizes.channels), projected, projected, (flat_size(_shapes(sizes)),)], [state, state]


def mixer(inputs: MixerInputs) -> tuple[Tensor, ...]:
    """Return the result, and what the backward needs."""
    x, sizes = inputs.x, inputs.sizes
    cast = x.new_zeros(flat_size(_shapes(sizes)))
    products = _Products.of(inputs, cast)
    copy_each(zip(split_flat(cast, _shapes(sizes)), inputs.product_weights(), strict=False))
    tokens = _flat(x.contiguous())
    u, z = (_rows(tokens @ half.t(), x) for half in products.into.chunk(2))
    y, inner, delta = (torch.empty_like(u) for _ in range(3))
    state = scan_state_shape(sizes.batch, sizes.length, sizes.channels, sizes.states)
    projections, entering = [], []
    for reverse in (False, True):
        run = _Direction(u, z, inputs, products, reverse, inner, delta)
        run.convolve()
        projections.append(_rows(_flat(inner) @ run.x_weight.t(), x))
        entering.append(torch.empty(state))
        run.scan(projections[-1], entering[-1]).forward(y)
    out = y if products.out is None else _rows(_flat(y) @ products.out.t(), x)
    return out, u, *projections, cast, *entering


def mixer_backward(
    dout: Tensor, inputs: MixerInputs, kept: Sequence[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], Tensor | None]:
    """Return the gradients of x, in_weight, both directions' weights and out_weight, each in its input's dtype."""
    u, *projections, cast, state, back_state = kept
    x, channels, products = inputs.x, u.shape[2], _Products.of(inputs, cast)
    tokens, dout = _flat(x.contiguous()), activation(dout, x.dtype).contiguous()
    # The gate is worked out again: keeping it would cost a third more memory, its product 4 % of a step's.
    z = _rows(tokens @ products.into[channels:].t(), x)
    dy, y = dout, None
    if products.out is not None:
        dy, y = _rows(_flat(dout) @ products.out, x), torch.empty_like(u)
    inner, delta, dinner, ddelta = (torch.empty_like(u) for _ in range(4))
    dxz = x.new_empty(*x.shape[:2], 2 * channels)
    grads = []
    for reverse, projected, entering in zip((False, True), projections, (state, back_state), strict=True):
        run = _Direction(u, z, inputs, products, reverse, inner, delta)
        grads.append(run.backward(projected, entering, dy, y, dinner, ddelta, dxz))
    flat, out_weight = _flat(dxz), inputs.out_weight
    dout_weight = None if out_weight is None or y is None else (_flat(dout).t() @ _flat(y)).to(out_weight.dtype)
    din_weight = (flat.t() @ tokens).to(inputs.in_weight.dtype)
    return (flat @ products.into).view(x.shape), din_weight, grads[0], grads[1], dout_weight


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


class _Direction:
    """One direction of a mixer: its weights, and memory (b, l, d) that both directions use in turn.

    The second direction, the one in reverse, adds to what the first has written.
    """

    def __init__(
        self,
        u: Tensor,
        z: Tensor,
        inputs: MixerInputs,
        products: _Products,
        reverse: bool,
        inner: Tensor,
        delta: Tensor,
    ) -> None:
        weights = inputs.directions[reverse]
        self._u, self._z, self._weights, self._reverse = u, z, weights, reverse
        self._inner, self._delta = inner, delta
        self.x_weight, self._dt_weight = products.x[reverse], products.dt[reverse]
        self._conv = ConvArguments(
            u, weights.conv_weight, weights.conv_bias, silu=True, reverse=reverse, accumulate=reverse
        )

    def convolve(self) -> None:
        """Write the scan's input into `inner`."""
        self._conv.forward(self._inner)

    def scan(self, projected: Tensor, state: Tensor) -> ScanArguments:
        """The scan of `inner` for dt, B and C (b, l, r + 2 n), its result halved; writes the step sizes."""
        rank = self._dt_weight.shape[1]
        B, C = projected[..., rank:].chunk(2, dim=-1)
        torch.mm(_flat(projected)[:, :rank], self._dt_weight.t(), out=_flat(self._delta))
        *_, dt_bias, A, D = self._weights
        return ScanArguments(
            self._inner,
            self._delta,
            A,
            B,
            C,
            D,
            self._z,
            dt_bias,
            delta_softplus=True,
            reverse=self._reverse,
            state=state,
            scale=0.5,
            accumulate=self._reverse,
        )

    def backward(
        self,
        projected: Tensor,
        state: Tensor,
        dy: Tensor,
        y: Tensor | None,
        dinner: Tensor,
        ddelta: Tensor,
        dxz: Tensor,
    ) -> list[Tensor]:
        """Return the weights' gradients; write those of u and z into dxz (b, l, 2 d), and y where it is asked for."""
        self.convolve()
        du, dz = dxz.chunk(2, dim=-1)
        dprojected = torch.empty_like(projected)
        rank = self._dt_weight.shape[1]
        dB, dC = dprojected[..., rank:].chunk(2, dim=-1)
        dA, dD, dbias = self.scan(projected, state).backward(dy, dinner, ddelta, dB, dC, dz, y)
        dt, ddt, flat_ddelta = _flat(projected)[:, :rank], _flat(dprojected)[:, :rank], _flat(ddelta)
        ddt.copy_(flat_ddelta @ self._dt_weight)
        ddt_weight = flat_ddelta.t() @ dt
        _flat(dinner).addmm_(_flat(dprojected), self.x_weight)
        dx_weight = _flat(dprojected).t() @ _flat(self._inner)
        dconv_weight, dconv_bias = self._conv.backward(dinner, du)
        grads = (dconv_weight, dconv_bias, dx_weight, ddt_weight, dbias, dA, dD)
        return [grad.to(weight.dtype) for grad, weight in zip(grads, self._weights, strict=True)]


def _flat(x: Tensor) -> Tensor:
    """(b, l, c) as (b l, c)."""
    return x.view(x.shape[0] * x.shape[1], x.shape[2])


def _rows(flat: Tensor, like: Tensor) -> Tensor:
    """(b l, c) as (b, l, c)."""
    return flat.view(like.shape[0], like.shape[1], flat.shape[1])
