"""Make the scan, the convolution and the mixer of a backend out of GPU kernels that take one or two directions at once.

Both directions of a mixer share each launch of a kernel and each product. The forward of a scan keeps nothing for its
backward, which walks forward once more, noting the states that enter each tile of steps, and then goes through the
tiles from the last to the first. Of a mixer what the small projections gave is kept, and the cast weights; all else is
worked out again from the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from famba.errors import ConfigError
from famba.ops.inputs import MixerInputs, ScanGradients, ScanInputs, as_tokens, common_dtype, even_rows, flatten
from famba.ops.products import Columns, ProductWeights

MEASURED = 32
"""Channels over which kernels add up the measures of a token; torch adds up the rest."""

_REVERSES = (False, True)


class Convolution(NamedTuple):
    """Hold convolutions of the same x (b, l, d), one or two, of one width.

    weights (d, width) and biases (d,), or all None, of each direction. x has rows at equal distances.
    """

    x: Tensor
    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    silu: bool
    reverses: tuple[bool, ...]


@dataclass(frozen=True)
class Scans:
    """Hold scans over the same tokens, k of them, one or two, as kernels read them; all activations of one dtype.

    u, delta: (k, b, l, d), contiguous. B, C: (k, b, l, n), rows at equal distances over directions and images too, the
    same in both. z: (b, l, d), the gate of all, rows at equal distances; or None. parameters: (k, n + 2, d) in float32:
    A, D and the bias of the steps. scale: what every result is multiplied by.
    """

    u: Tensor
    delta: Tensor
    B: Tensor
    C: Tensor
    z: Tensor | None
    parameters: Tensor
    reverses: tuple[bool, ...]
    skip: bool = True
    softplus: bool = True
    scale: float = 1.0

    @classmethod
    def single(cls, inputs: ScanInputs) -> Scans:
        """Take one scan."""
        u, delta, A, B, C, D, z, bias, softplus, reverse = inputs
        dtype = common_dtype(u, delta, B, C, z)
        u, delta = (x.to(dtype).contiguous().unsqueeze(0) for x in (u, delta))
        B, C = (even_rows(x, dtype).unsqueeze(0) for x in (B, C))
        if B.stride(2) != C.stride(2):
            B, C = (x.clone(memory_format=torch.contiguous_format) for x in (B, C))
        z = None if z is None else even_rows(z, dtype)
        return cls(u, delta, B, C, z, stack_parameters([(A, D, bias)]), (reverse,), D is not None, softplus)

    def floats(self, *shape: int) -> Tensor:
        """Return memory in float32."""
        return self.u.new_empty(shape, dtype=torch.float32)


@dataclass(frozen=True)
class Gradients:
    """Hold the gradients of k scans: of u, delta and z (k, b, l, d) in their dtype, z's None without a gate.

    A (d, n), D and delta_bias (d,) of each scan are in float32. y: the scans' result again, where it was asked for.
    """

    u: Tensor
    delta: Tensor
    z: Tensor | None
    y: Tensor | None
    A: list[Tensor]
    D: list[Tensor]
    delta_bias: list[Tensor]

    @classmethod
    def empty(cls, scans: Scans, with_y: bool) -> Gradients:
        """Return memory for them."""
        channels = scans.u.shape[3]
        u, delta = torch.empty_like(scans.u), torch.empty_like(scans.u)
        z, y = (torch.empty_like(u) if wanted else None for wanted in (scans.z is not None, with_y))
        A = [scans.floats(channels, scans.B.shape[3]) for _ in scans.reverses]
        D, bias = ([scans.floats(channels) for _ in scans.reverses] for _ in range(2))
        return cls(u, delta, z, y, A, D, bias)


def stack_parameters(scans: Sequence[tuple[Tensor, Tensor | None, Tensor | None]]) -> Tensor:
    """Stack A, D and delta_bias of k scans in float32, (k, n + 2, d); zeros where there is no D or bias."""
    channels, states = scans[0][0].shape
    nothing = scans[0][0].new_zeros(channels) if any(x is None for x in scans[0]) else None
    rows: list[Tensor] = []
    for A, *others in scans:
        given = [nothing if x is None else x for x in others]
        rows += [A.t(), *(x.unsqueeze(0) for x in given if x is not None)]
    return torch.cat([row.to(torch.float32) for row in rows]).view(len(scans), states + 2, channels)


@dataclass(frozen=True)
class Directional:
    """Provide what a backend provides, by four functions that write what kernels work out; not of tensors without any.

    convolve: y (k, b, l, d) in x's dtype. convolve_backward: for dys (k, b, l, d) of x's dtype the gradient of x, a sum
    over directions, dx (b, l, d), whose rows are at equal distances; and those of weights and biases in float32.
    scan: the results (k, b, l, d), and sums (2, k, b, l, blocks of 32 channels), where they are given, of step sizes
    and of positive results, before scale and gate. scan_backward: for dy (b, l, d), which all results share, the
    gradients, those of B and C into dB and dC, (k, b, l, n) with rows as in `Scans`.
    """

    name: str
    convolve: Callable[[Convolution, Tensor], None]
    convolve_backward: Callable[[Tensor, Convolution, Tensor, Sequence[Tensor], Sequence[Tensor | None]], None]
    scan: Callable[[Scans, Tensor, Tensor | None], None]
    scan_backward: Callable[[Scans, Tensor, Tensor, Tensor, Gradients], None]

    def selective_scan(self, inputs: ScanInputs) -> tuple[Tensor, Tensor]:
        """Return y, and an empty tensor."""
        y, _ = self._scan(Scans.single(inputs), False)
        return y.squeeze(0).to(inputs.u.dtype), inputs.u.new_empty(0, dtype=torch.float32)

    def selective_scan_backward(self, dy: Tensor, inputs: ScanInputs, state: Tensor) -> ScanGradients:
        """Return the gradients of the inputs, each in its input's dtype."""
        scans = Scans.single(inputs)
        dB, dC = (scans.u.new_empty(x.shape) for x in (inputs.B, inputs.C))
        dy = even_rows(dy, scans.u.dtype)
        grads = self._scan_backward(scans, dy, dB.unsqueeze(0), dC.unsqueeze(0), False)
        dz = None if grads.z is None else grads.z[0]
        first = grads.u[0], grads.delta[0], grads.A[0], dB, dC, grads.D[0], dz, grads.delta_bias[0]
        return ScanGradients.cast(inputs, *first)

    def causal_conv1d(self, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
        """Return y."""
        return self._convolve(Convolution(even_rows(x), [weight], [bias], silu, (reverse,))).squeeze(0)

    def causal_conv1d_backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the gradients of x, weight and bias, each in its input's dtype."""
        dx, dys = x.new_empty(x.shape), dy.to(x.dtype).contiguous().unsqueeze(0)
        convolution = Convolution(even_rows(x), [weight], [bias], silu, (reverse,))
        (dweight,), (dbias,) = self._convolve_backward(dys, convolution, dx)
        return dx, dweight.to(weight.dtype), None if bias is None or dbias is None else dbias.to(bias.dtype)

    def mixer_kept_shapes(self, inputs: MixerInputs) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        """Return the shapes of dt, B and C of both directions, padded as `Columns` says, and of the copied weights."""
        return [(2, *inputs.x.shape[:2], Columns.of(inputs).width), ProductWeights.kept_shape(inputs)], []

    def mixer(self, inputs: MixerInputs, measure: bool) -> tuple[Tensor | None, ...]:
        """Return the result, the measures where they are asked for, and what the backward needs."""
        for ours, theirs in zip(*inputs.directions, strict=True):
            if ours.shape != theirs.shape:
                raise ConfigError(
                    f"bidirectional_mixer: weights of {tuple(ours.shape)} forward and {tuple(theirs.shape)} backward, "
                    f"backend {self.name!r} needs the same; use backend 'reference'"
                )
        x = inputs.x
        weights, copied = ProductWeights.copied(inputs)
        u, z = as_tokens(flatten(x) @ weights.into.t(), x).chunk(2, dim=2)
        inner = self._convolve(_convolution(u, inputs))
        projected = inner.new_empty(*inner.shape[:3], weights.x.shape[1])
        torch.bmm(_both(inner), weights.x.mT, out=_both(projected))
        y, measures = self._scan(_scans(inner, projected, z, weights, inputs), measure)
        y = y[0] + y[1]
        out = y if weights.out is None else as_tokens(flatten(y) @ weights.out.t(), x)
        return out, measures, projected, copied

    def mixer_backward(self, dout: Tensor, inputs: MixerInputs, kept: Sequence[Tensor]) -> MixerInputs:
        """Return the gradients in the places of the inputs, each in its input's dtype."""
        projected, copied, *_ = kept
        x, weights = inputs.x, ProductWeights.kept(copied, inputs)
        tokens, flat_dout = flatten(x), flatten(even_rows(dout, x.dtype))
        dy = as_tokens(flat_dout if weights.out is None else flat_dout @ weights.out, x)
        # Kept, u and z would take eight times the memory of `projected` in a Vim-Ti, for one product that is saved.
        xz = tokens @ weights.into.t()
        u, z = as_tokens(xz, x).chunk(2, dim=2)
        convolution = _convolution(u, inputs)
        inner = self._convolve(convolution)
        scans = _scans(inner, projected, z, weights, inputs)

        columns, dprojected = Columns.of(inputs), torch.empty_like(projected)
        ddt, dB, dC = columns.split(dprojected)
        grads = self._scan_backward(scans, dy, dB, dC, weights.out is not None)
        torch.bmm(_both(grads.delta), weights.dt, out=_both(ddt))
        columns.clear_tail(dprojected)
        dinner = _both(grads.u).baddbmm_(_both(dprojected), weights.x)

        dxz = torch.empty_like(xz)
        du, dz = as_tokens(dxz, x).chunk(2, dim=2)
        assert grads.z is not None
        torch.add(*grads.z, out=dz)
        of_convolutions = self._convolve_backward(dinner.view(inner.shape), convolution, du)

        dt, _, _ = columns.split(projected)
        of_products = ProductWeights(
            into=dxz.t() @ tokens,
            x=torch.bmm(_both(dprojected).mT, _both(inner)),
            dt=torch.bmm(_both(grads.delta).mT, _both(dt)),
            out=None if grads.y is None else flat_dout.t() @ flatten(grads.y[0] + grads.y[1]),
        )
        others = list(zip(*of_convolutions, grads.delta_bias, grads.A, grads.D, strict=True))
        return of_products.with_others((dxz @ weights.into).view(x.shape), others, inputs)

    def _convolve(self, convolution: Convolution) -> Tensor:
        """Return the results (k, b, l, d)."""
        x = convolution.x
        y = x.new_empty(len(convolution.weights), *x.shape)
        if y.numel():
            self.convolve(convolution, y)
        return y

    def _convolve_backward(
        self, dys: Tensor, convolution: Convolution, dx: Tensor
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """Write the gradient of x; return those of weights and biases."""
        fresh = dx.new_empty if dx.numel() else dx.new_zeros
        dweights = [fresh(weight.shape, dtype=torch.float32) for weight in convolution.weights]
        dbiases = [None if bias is None else fresh(bias.shape, dtype=torch.float32) for bias in convolution.biases]
        if dx.numel():
            self.convolve_backward(dys, convolution, dx, dweights, dbiases)
        return dweights, dbiases

    def _scan(self, scans: Scans, measure: bool) -> tuple[Tensor, Tensor | None]:
        """Return the results (k, b, l, d), and the measures (2, k, b, l) where they are asked for."""
        y, (*sizes, channels) = torch.empty_like(scans.u), scans.u.shape
        sums = scans.floats(2, *sizes, -(-channels // MEASURED)) if measure else None
        if y.numel():
            self.scan(scans, y, sums)
        if sums is None:
            return y, None
        measures = sums.sum(-1)
        measures[0] /= channels
        return y, measures

    def _scan_backward(self, scans: Scans, dy: Tensor, dB: Tensor, dC: Tensor, with_y: bool) -> Gradients:
        """Return the gradients, and y again where it is asked for; write those of B and C."""
        grads = Gradients.empty(scans, with_y)
        if scans.u.numel():
            self.scan_backward(scans, dy, dB, dC, grads)
        else:
            for grad in (dB, dC, *grads.A, *grads.D, *grads.delta_bias):
                grad.zero_()
        return grads


def _convolution(u: Tensor, inputs: MixerInputs) -> Convolution:
    """Return both convolutions, which give the inputs of the scans."""
    weights, biases = ([w[i] for w in inputs.directions] for i in (0, 1))
    return Convolution(u, weights, biases, True, _REVERSES)


def _scans(inner: Tensor, projected: Tensor, z: Tensor, weights: ProductWeights, inputs: MixerInputs) -> Scans:
    """Return both scans, each of which gives half of the result; work out the step sizes."""
    dt, B, C = Columns.of(inputs).split(projected)
    delta = torch.empty_like(inner)
    torch.bmm(_both(dt), weights.dt.mT, out=_both(delta))
    parameters = stack_parameters([(w.A, w.D, w.dt_bias) for w in inputs.directions])
    return Scans(inner, delta, B, C, z, parameters, _REVERSES, scale=0.5)


def _both(x: Tensor) -> Tensor:
    """View (2, b, l, c), rows at equal distances, as (2, b l, c)."""
    # Not `flatten`, which makes a copy where it finds no view: products write here.
    return x.view(x.shape[0], x.shape[1] * x.shape[2], x.shape[3])
