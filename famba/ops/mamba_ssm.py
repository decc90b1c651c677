"""Run the scan, the convolution and the mixer by the CUDA extensions of mamba-ssm and causal-conv1d.

Neither package knows of tokens that fuse, and mamba-ssm's norm lies where an import draws in much else: these ops are
done by the Triton kernels. Not reproducible to the bit: mamba-ssm's backward scan, and causal-conv1d's backward
convolution unless torch is asked for deterministic algorithms, add partial sums in whatever order they arrive.

The extensions take (batch, channels, length), the steps adjacent. Sources: csrc/selective_scan/selective_scan.cpp of
mamba-ssm, which takes the same arguments from 2.2 to 2.3.2, and csrc/causal_conv1d.cpp of causal-conv1d 1.4 to 1.7.

The mixer has everything as (channels, batch, length): that is what a product of weight and tokens^T gives, what the
extensions read as (batch, channels, length) through strides, and what all further products read without a copy. Both
directions run in one call: their channels are stacked, the second direction's steps are turned round, and the scan
reads B and C in two groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from famba.errors import ConfigError
from famba.ops.availability import MAMBA_SSM, convolution
from famba.ops.checks import check_equal_directions
from famba.ops.inputs import MixerInputs, MixerSizes, ScanGradients, ScanInputs
from famba.ops.products import Columns, ProductWeights, copy_each, flatten
from famba.ops.triton import add_rms_norm, add_rms_norm_backward, fuse_tokens, fuse_tokens_backward, match_tokens

_INSTEAD = "use backend 'triton' or 'reference'"
_STEPS_PER_CHUNK = 2048
_MOST_STATES = 256
_WIDTHS = (2, 4)
# Channels lie on the second axis of the launch grid, and elements are counted in 32 bits.
_MOST_CHANNELS = 2**16 - 1
_MOST_ELEMENTS = 2**32 - 1


def scan_state_shape(batch: int, length: int, channels: int, states: int) -> tuple[int, ...]:
    """Return the shape of what the forward scan keeps: nothing, the backward runs the forward again."""
    return (0,)


def selective_scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """Return y and an empty tensor."""
    y, *_ = _run_scan(_scan_inputs(inputs))
    return _back(y, inputs.reverse, inputs.u.dtype), y.new_empty(0, dtype=torch.float32)


def selective_scan_backward(dy: Tensor, inputs: ScanInputs, state: Tensor) -> ScanGradients:
    """Return the gradients of the inputs, each in its input's dtype."""
    scan = _scan_inputs(inputs)
    # A gate's gradient needs the result before the gate, a long scan the states in between: both are there only during
    # the forward, and one tensor of a fixed shape would not hold them.
    _, ungated, entering = _run_scan(scan._replace(z=None))
    dy = _turned(dy, inputs.reverse, scan.u.dtype)
    grads = _run_scan_backward(scan, dy, None if scan.z is None else ungated, entering)
    grads = grads._replace(B=grads.B[:, 0], C=grads.C[:, 0])
    turned = (grad if grad is None or grad.ndim < 3 else _back(grad, inputs.reverse, grad.dtype) for grad in grads)
    return ScanGradients.cast(inputs, *turned)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    """Return y."""
    return _back(_convolve(_turned(x, reverse, x.dtype), _parameter(weight), _optional(bias), silu), reverse, x.dtype)


def causal_conv1d_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of x, weight and bias, each in its input's dtype."""
    x, dy = _turned(x, reverse, x.dtype), _turned(dy, reverse, x.dtype)
    dx, dweight, dbias = _convolve_backward(x, _parameter(weight), _optional(bias), silu, dy)
    dbias = None if bias is None or dbias is None else dbias.to(bias.dtype)
    return _back(dx, reverse, x.dtype), dweight.to(weight.dtype), dbias


def _scan_inputs(inputs: ScanInputs) -> ScanInputs:
    """Return a scan as the extension reads it: B and C (b, groups, n, l), parameters float32, never in reverse."""
    u, delta, A, B, C, D, z, delta_bias, softplus, reverse = inputs
    dtypes = {x.dtype for x in (u, delta, B, C, z) if x is not None}
    # Where they differ nothing is rounded to the coarsest.
    dtype = u.dtype if len(dtypes) == 1 else torch.float32
    u, delta, B, C = (_turned(x, reverse, dtype) for x in (u, delta, B, C))
    z = None if z is None else _turned(z, reverse, dtype)
    B, C = B.unsqueeze(1), C.unsqueeze(1)
    return ScanInputs(u, delta, _parameter(A), B, C, _optional(D), z, _optional(delta_bias), softplus, False)


def _entering_shape(batch: int, length: int, channels: int, states: int) -> tuple[int, ...]:
    """Return the shape of the float32 states that the backward needs: none where the kernel has a single chunk."""
    chunks = -(-length // _STEPS_PER_CHUNK)
    return (batch, channels, chunks if chunks > 1 else 0, 2 * states)


def _run_scan(inputs: ScanInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return the result (b, d, l), the result before the gate, which is the same without one, and the states kept."""
    u, states = inputs.u, inputs.A.shape[1]
    if not 1 <= states <= _MOST_STATES:
        raise ConfigError(f"selective_scan: {states} states, mamba-ssm takes 1 to {_MOST_STATES}; {_INSTEAD}")
    _check_size("selective_scan", u, "mamba-ssm")
    batch, channels, length = u.shape
    entering = u.new_empty(_entering_shape(batch, length, channels, states), dtype=torch.float32)
    if u.numel() == 0:
        return u, u, entering
    ungated, kept, *gated = MAMBA_SSM.load().fwd(*inputs[:-1])
    return gated[0] if gated else ungated, ungated, kept if entering.numel() else entering


def _run_scan_backward(inputs: ScanInputs, dy: Tensor, ungated: Tensor | None, entering: Tensor) -> ScanGradients:
    """Return the gradients for dy (b, d, l) in u's dtype; `ungated` may be None without a gate."""
    *tensors, softplus, _ = inputs
    if inputs.u.numel() == 0:
        return ScanGradients(*(None if x is None else torch.zeros_like(x) for x in tensors))  # type: ignore[arg-type]
    states = entering if entering.numel() else None
    du, ddelta, dA, dB, dC, dD, dbias, *dz = MAMBA_SSM.load().bwd(*tensors, dy, states, ungated, None, softplus, False)
    return ScanGradients(du, ddelta, dA, dB, dC, dD, dz[0] if dz else None, dbias)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """Return the causal convolution of x (b, d, l) with weight (d, width) and bias (d,), both float32."""
    least, most = _WIDTHS
    if not least <= weight.shape[1] <= most:
        raise ConfigError(f"causal_conv1d: width {weight.shape[1]}, causal-conv1d takes {least} to {most}; {_INSTEAD}")
    _check_size("causal_conv1d", x, "causal-conv1d")
    return x if x.numel() == 0 else convolution()[0](x, weight, bias, None, None, None, silu)


def _convolve_backward(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of x, weight and bias for that of the result, dy (b, d, l) in x's dtype."""
    if x.numel() == 0:
        return torch.zeros_like(x), torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias)
    dx, dweight, dbias, _ = convolution()[1](x, weight, bias, dy, None, None, None, None, False, silu)
    return dx, dweight, None if bias is None else dbias


def _check_size(op: str, x: Tensor, package: str) -> None:
    if x.shape[1] > _MOST_CHANNELS:
        raise ConfigError(f"{op}: {x.shape[1]} channels, {package} takes at most {_MOST_CHANNELS}; {_INSTEAD}")
    if x.numel() > _MOST_ELEMENTS:
        raise ConfigError(
            f"{op}: {x.numel()} elements, {package} counts at most {_MOST_ELEMENTS}; use a smaller batch, or {_INSTEAD}"
        )


def _parameter(x: Tensor) -> Tensor:
    """Return what is no activation as the extensions take it: float32 and contiguous.

    A copy: causal-conv1d wants adjacent numbers even where there is one only, which `contiguous` lets pass.
    """
    return x.to(torch.float32).clone(memory_format=torch.contiguous_format)


def _optional(x: Tensor | None) -> Tensor | None:
    return None if x is None else _parameter(x)


def _turned(x: Tensor, reverse: bool, dtype: torch.dtype) -> Tensor:
    """Return (b, l, c) as (b, c, l), the last step first where `reverse`.

    Always a copy: the kernels read 16 bytes at once, and a view may begin anywhere.
    """
    x = x.to(dtype).transpose(1, 2)
    return (x.flip(2) if reverse else x).clone(memory_format=torch.contiguous_format)


def _back(x: Tensor, reverse: bool, dtype: torch.dtype) -> Tensor:
    """Return (b, c, l) as (b, l, c)."""
    x = x.transpose(1, 2)
    return (x.flip(1) if reverse else x).to(dtype).clone(memory_format=torch.contiguous_format)


def mixer_kept_shapes(sizes: MixerSizes) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Return the shapes of dt, B and C of both directions, the scans' mean, the copied weights, and the states kept.

    The mean is kept since to work it out again would be another scan. The rest is worked out again.
    """
    batch, length, channels = sizes.batch, sizes.length, sizes.channels
    projected = (2, Columns.of(sizes).width, batch, length)
    entering = _entering_shape(batch, length, 2 * channels, sizes.states)
    return [projected, (channels, batch, length), ProductWeights.kept_shape(sizes)], [entering]


def mixer(inputs: MixerInputs, measure: bool) -> tuple[Tensor | None, ...]:
    """Return the result, the measures where they are asked for, and what the backward needs."""
    check_equal_directions("mamba_ssm", *inputs.directions)
    products, copied = ProductWeights.copied(inputs)
    weights, x = _Weights(inputs, products), inputs.x
    u, z = _project(products.into, x).chunk(2)
    inner = weights.convolve(_both(u))
    projected = torch.bmm(products.x, _halves(inner)).unflatten(2, inner.shape[1:])
    scan = weights.scan(inner, projected)
    y, _, entering = _run_scan(scan)
    measures = _measures(scan, y) if measure else None
    mean = torch.lerp(*_directions(y.transpose(0, 1)), 0.5)
    gated = (mean * F.silu(z)).flatten(1).t()
    out = gated.contiguous() if products.out is None else gated @ products.out.t()
    return out.unflatten(0, x.shape[:2]), measures, projected, mean, copied, entering


def mixer_backward(
    dout: Tensor, inputs: MixerInputs, kept: Sequence[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], Tensor | None]:
    """Return the gradients of x, in_weight, both directions' weights and out_weight, each in its input's dtype."""
    projected, mean, copied, entering, *_ = kept
    x, products = inputs.x, ProductWeights.kept(copied, inputs)
    weights = _Weights(inputs, products)
    u, z = _project(products.into, x).chunk(2)
    gate = F.silu(z)
    dgated = _project(None if products.out is None else products.out.t(), dout)
    dxz = torch.empty(inputs.in_weight.shape[0], *x.shape[:2], dtype=x.dtype, device=x.device)
    du, dz = dxz.chunk(2)
    torch.ops.aten.silu_backward.grad_input(dgated * mean, z, grad_input=dz)
    dy = _both(dgated * gate / 2)
    both = _both(u)
    inner = weights.convolve(both)
    grads = _run_scan_backward(weights.scan(inner, projected), dy.transpose(0, 1), None, entering)
    dinner, dx_weight, ddt_weight = weights.project_back(inner, projected, grads)
    dboth, dconv_weight, dconv_bias = weights.convolve_back(both, dinner)
    torch.add(*_directions(dboth), out=du)
    of_products = ProductWeights(
        into=dxz.flatten(1) @ flatten(x),
        x=dx_weight,
        dt=ddt_weight,
        out=None if products.out is None else flatten(dout).t() @ (mean * gate).flatten(1).t(),
    )
    of_weights = of_products.as_given(inputs)
    others = weights.unstacked(dconv_weight, dconv_bias, grads.delta_bias, grads.A, grads.D)
    dforward, dbackward = (
        [*other[:2], side.x_weight, side.dt_weight, *other[2:]]
        for other, side in zip(others, of_weights.directions, strict=True)
    )
    dx = (dxz.flatten(1).t() @ products.into).view(x.shape)
    return dx, of_weights.in_weight, dforward, dbackward, of_weights.out_weight


def _project(weight: Tensor | None, x: Tensor) -> Tensor:
    """Return the product of weight (d, c), where there is one, and x (b, l, c): (d, b, l)."""
    flat = flatten(x).t()
    return (flat.contiguous() if weight is None else weight @ flat).unflatten(1, x.shape[:2])


def _measures(scan: ScanInputs, y: Tensor) -> Tensor:
    """Return the measures (2, 2, b, l) of the scan of both directions, whose result is y (b, 2 d, l)."""
    bias = scan.delta_bias
    assert bias is not None
    steps = F.softplus(scan.delta.float() + bias.unsqueeze(1)).unflatten(1, (2, -1)).mean(2)
    outputs = y.float().relu().unflatten(1, (2, -1)).sum(2)
    both = torch.stack([steps, outputs]).transpose(1, 2)
    # The steps of the second direction are turned round.
    return torch.stack([both[:, 0], both[:, 1].flip(2)], dim=1)


class _Weights:
    """Hold the weights of both directions, stacked as the extensions and the products of both take them."""

    def __init__(self, inputs: MixerInputs, products: ProductWeights) -> None:
        self._columns, self.products = Columns.of(inputs.sizes), products
        # Without those of the products: convolution, its bias, the step sizes' bias, A and D.
        self._others = [[*side[:2], *side[4:]] for side in inputs.directions]
        self._conv_weight, self._conv_bias, self._dt_bias, self._A, self._D = (
            torch.cat(pair).to(torch.float32) for pair in zip(*self._others, strict=True)
        )

    def convolve(self, both: Tensor) -> Tensor:
        """Return the scans' input from u for both directions: (2 d, b, l)."""
        return _convolve(both.transpose(0, 1), self._conv_weight, self._conv_bias, silu=True).transpose(0, 1)

    def scan(self, inner: Tensor, projected: Tensor) -> ScanInputs:
        """Return the scan of inner (2 d, b, l) for dt, B and C (2, width, b, l), without its gate."""
        dt, B, C = self._columns.split(projected, dim=1)
        delta = torch.bmm(self.products.dt, dt.flatten(2)).view(inner.shape)
        # (2, n, b, l) as (b, 2, n, l): a group for each direction.
        B, C = (x.permute(2, 0, 1, 3) for x in (B, C))
        return ScanInputs(
            inner.transpose(0, 1), delta.transpose(0, 1), self._A, B, C, self._D, None, self._dt_bias, True, False
        )

    def project_back(self, inner: Tensor, projected: Tensor, grads: ScanGradients) -> tuple[Tensor, Tensor, Tensor]:
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
        dboth, dweight, dbias = _convolve_backward(
            both.transpose(0, 1), self._conv_weight, self._conv_bias, True, dinner.transpose(0, 1)
        )
        return dboth.transpose(0, 1), dweight, dbias

    def unstacked(self, *stacked: Tensor | None) -> list[list[Tensor]]:
        """Return each direction's gradients of the weights that are not the products', in the dtypes of these."""
        sides = [[torch.empty_like(w, memory_format=torch.contiguous_format) for w in side] for side in self._others]
        halves = zip(*(grad.chunk(2) for grad in stacked if grad is not None), strict=True)
        copy_each(pair for side, half in zip(sides, halves, strict=True) for pair in zip(side, half, strict=True))
        return sides


def _both(x: Tensor) -> Tensor:
    """Stack x (d, b, l) on itself with its steps turned round: (2 d, b, l)."""
    return torch.cat([x, x.flip(2)])


def _directions(both: Tensor) -> tuple[Tensor, Tensor]:
    """Return the halves of (2 d, b, l), the second with its steps turned back."""
    first, second = both.chunk(2)
    return first, second.flip(2)


def _halves(both: Tensor) -> Tensor:
    """View (2 d, b, l) as (2, d, b l)."""
    return both.reshape(2, both.shape[0] // 2, -1)
