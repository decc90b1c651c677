"""Vim's mixer by compiled kernels and torch's matrix products, with as little kept and moved as can be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from famba.ops.native.kernels import ConvArguments, ScanArguments, activation, scan_state_shape


def mixer_kept_shapes(batch: int, length: int, channels: int, projected: int, states: int) -> list[tuple[int, ...]]:
    """Shapes of u, of dt, B and C for both directions, and of the states that enter later chunks for both."""
    state = scan_state_shape(batch, length, channels, states)
    return [(batch, length, channels), *[(batch, length, projected)] * 2, *[state] * 2]


def mixer(
    x: Tensor, in_weight: Tensor, forward: Sequence[Tensor], backward: Sequence[Tensor], out_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the result, and what the backward needs."""
    batch, length, _ = x.shape
    channels = in_weight.shape[0] // 2
    tokens, in_weight = _flat(x.contiguous()), in_weight.to(x.dtype)
    u, z = (_rows(tokens @ half.t(), x) for half in (in_weight[:channels], in_weight[channels:]))
    y, inner, delta = (torch.empty_like(u) for _ in range(3))
    projections, entering = [], []
    for reverse, weights in enumerate((forward, backward)):
        run = _Direction(u, z, weights, bool(reverse), inner, delta)
        run.convolve()
        projections.append(_rows(_flat(inner) @ run.x_weight.t(), x))
        entering.append(torch.empty(scan_state_shape(batch, length, channels, run.states)))
        run.scan(projections[-1], entering[-1]).forward(y)
    out = y if out_weight is None else _rows(_flat(y) @ out_weight.to(x.dtype).t(), x)
    return out, u, *projections, *entering  # type: ignore[return-value]


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
    u, *projections = kept[:3]
    channels = u.shape[2]
    tokens, dout = _flat(x.contiguous()), activation(dout, x.dtype).contiguous()
    # The gate is worked out again: keeping it would cost a third more memory, its product 4 % of a step's.
    into = in_weight.to(x.dtype)
    z = _rows(tokens @ into[channels:].t(), x)
    dy, y = dout, None
    if out_weight is not None:
        dy, y = _rows(_flat(dout) @ out_weight.to(x.dtype), x), torch.empty_like(u)
    inner, delta, dinner, ddelta = (torch.empty_like(u) for _ in range(4))
    dxz = x.new_empty(*x.shape[:2], 2 * channels)
    grads = []
    for reverse, (weights, projected, state) in enumerate(zip((forward, backward), projections, kept[3:], strict=True)):
        run = _Direction(u, z, weights, bool(reverse), inner, delta)
        grads.append(run.backward(projected, state, dy, y, dinner, ddelta, dxz))
    flat = _flat(dxz)
    dout_weight = None if out_weight is None or y is None else (_flat(dout).t() @ _flat(y)).to(out_weight.dtype)
    din_weight = (flat.t() @ tokens).to(in_weight.dtype)
    return (flat @ into).view(x.shape), din_weight, grads[0], grads[1], dout_weight


class _Direction:
    """One direction of a mixer: its weights, and memory (b, l, d) that both directions use in turn.

    The second direction, the one in reverse, adds to what the first has written.
    """

    def __init__(
        self, u: Tensor, z: Tensor, weights: Sequence[Tensor], reverse: bool, inner: Tensor, delta: Tensor
    ) -> None:
        self._u, self._z, self._weights, self._reverse = u, z, weights, reverse
        self._inner, self._delta = inner, delta
        conv_weight, conv_bias, x_weight, dt_weight, *_ = weights
        self.x_weight, self._dt_weight = x_weight.to(u.dtype), dt_weight.to(u.dtype)
        self.states = weights[5].shape[1]
        self._conv = ConvArguments(u, conv_weight, conv_bias, silu=True, reverse=reverse, accumulate=reverse)

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
