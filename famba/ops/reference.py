"""Define each op in plain torch: any dtype, any device, and the oracle of every other backend.

Forward and backward are written out, so that memory stays bounded: the scan's states, `d_state` times larger than
its inputs, exist for one tile of images and time steps at once and are recomputed in the backward.
Arithmetic is in float32, or in float64 where the input is. Layout is (batch, length, channels) throughout.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from famba.ops.inputs import ScanGradients, ScanInputs

# Elements of one time step's state, and of a chunk of states, that are worked on at once: large enough to
# outweigh the cost of launching an op, small enough for a processor's second-level cache.
_STEP_ELEMENTS = 2**17
_CHUNK_ELEMENTS = 2**19


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which an op on `x` is worked out: float64 for float64, float32 otherwise."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def scan_state_shape(batch: int, length: int, channels: int, states: int) -> tuple[int, ...]:
    """Return the shape of what the forward scan keeps for its backward: nothing."""
    return (0,)


def selective_scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """Run Mamba's selective scan (Gu and Dao 2023, arXiv 2312.00752, Algorithm 2), gated by silu(z).

    h[t] = exp(delta[t] A) h[t - 1] + delta[t] u[t] B[t];  y[t] = (C[t] . h[t] + D u[t]) silu(z[t]).
    Returns y (b, l, d) in u's dtype, and an empty tensor.
    """
    scan = _Scan(inputs)
    y = torch.empty_like(scan.u)
    for images in scan.tiles:
        state = scan.start(images)
        for steps in scan.chunks:
            here = steps, images
            states = scan.run(here, state)[0]
            state = states[-1]
            out = scan.read_out(here, states)
            y[here] = out if scan.z is None else out * F.silu(scan.z[here])
    return scan.as_given(y).to(inputs.u.dtype), y.new_empty(0)


def selective_scan_backward(dy: Tensor, inputs: ScanInputs, state: Tensor) -> ScanGradients:
    """Return the gradients; `state` is the forward's empty tensor."""
    scan, (_, channels) = _Scan(inputs), inputs.A.t().shape
    dy = scan.ordered(dy)
    du, ddelta, dB, dC = (torch.empty_like(x) for x in (scan.u, scan.delta, scan.B, scan.C))
    dz = None if scan.z is None else torch.empty_like(scan.z)
    dA, dD, dbias = (scan.A.new_zeros(shape) for shape in (scan.A.shape, channels, channels))
    for images in scan.tiles:
        carry = scan.start(images)  # gradient of a chunk's last state, from the chunks after it
        entering = [carry]
        for steps in scan.chunks[:-1]:
            entering.append(scan.run((steps, images), entering[-1])[0][-1].clone())
        for steps, before in reversed(list(zip(scan.chunks, entering, strict=False))):
            here = steps, images
            states, decay, delta, slope = scan.run(here, before)
            u, B, C, dout = scan.u[here], scan.B[here], scan.C[here], dy[here]
            if scan.z is not None and dz is not None:
                dz[here] = dout * scan.read_out(here, states) * _silu_slope(scan.z[here])
                dout = dout * F.silu(scan.z[here])
            dC[here] = torch.matmul(states, dout.unsqueeze(3)).squeeze(3)

            dstates = dout.unsqueeze(2) * C.unsqueeze(3)
            dstates[-1] += carry
            backwards = dstates.unbind()[::-1]
            for rate, after, earlier in zip(decay.unbind()[:0:-1], backwards, backwards[1:], strict=False):
                earlier.addcmul_(rate, after)
            carry = decay[0] * dstates[0]
            dB[here] = torch.matmul(dstates, (delta * u).unsqueeze(3)).squeeze(3)
            ddrive = torch.matmul(B.unsqueeze(2), dstates).squeeze(2)

            dexponent = dstates.mul_(decay)
            dexponent[0] *= before
            dexponent[1:] *= states[:-1]
            dstep = (dexponent * scan.A).sum(2) + ddrive * u
            ddelta[here] = dstep = dstep if slope is None else dstep * slope
            du[here] = ddrive * delta if scan.D is None else ddrive * delta + dout * scan.D
            dA += dexponent.mul_(delta.unsqueeze(2)).sum((0, 1))
            dD += (dout * u).sum((0, 1))
            dbias += dstep.sum((0, 1))
    du, ddelta, dB, dC = map(scan.as_given, (du, ddelta, dB, dC))
    dz = None if dz is None else scan.as_given(dz)
    return ScanGradients.cast(inputs, du, ddelta, dA.t().contiguous(), dB, dC, dD, dz, dbias)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    """Convolve each channel over the length that sees only the past (the future where `reverse`).

    x (b, l, d), weight (d, width), bias (d,). Returns (b, l, d) in x's dtype.
    """
    y = _conv_linear(x, weight, bias, reverse)
    return (F.silu(y) if silu else y).to(x.dtype)


def causal_conv1d_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of x, weight and bias, each in its input's dtype."""
    grad = dy.to(compute_dtype(x))
    if silu:
        grad = grad * _silu_slope(_conv_linear(x, weight, bias, reverse))
    dx = _conv_linear(grad, weight, None, not reverse)
    dweight = torch.empty(weight.shape, dtype=grad.dtype, device=x.device)
    for k, (there, here) in enumerate(_conv_windows(x.shape[1], weight.shape[1], reverse)):
        dweight[:, k] = (grad[:, here] * x[:, there]).sum((0, 1))
    dbias = None if bias is None else grad.sum((0, 1)).to(bias.dtype)
    return dx.to(x.dtype), dweight.to(weight.dtype), dbias


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add x to the residual stream, then RMS-normalise the sum (Zhang and Sennrich 2019, arXiv 1910.07467).

    x (b, l, d); residual (b, l, d) in float32 (float64), or None; weight (d,).
    Returns the normed sum in x's dtype and the sum in float32 (float64).
    """
    total = x.to(compute_dtype(x), copy=True, memory_format=torch.contiguous_format)
    if residual is not None:
        total += residual
    return (total * _inverse_rms(total, eps) * weight).to(x.dtype), total


def add_rms_norm_backward(
    dnormed: Tensor, dtotal: Tensor, total: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the sum (which are those of x and of the residual) and of weight."""
    inverse = _inverse_rms(total, eps)
    normed = total * inverse
    grad = dnormed.to(total.dtype)
    dweight = (grad * normed).sum((0, 1)).to(weight.dtype)
    grad = grad * weight
    grad = inverse * (grad - normed * (grad * normed).mean(-1, keepdim=True))
    return (grad + dtotal).contiguous(), dweight


def fuse_tokens(x: Tensor, places: Tensor, weights: Tensor, length: int) -> Tensor:
    """Add up the tokens (b, l, c) of each place (b, l), times their weights (b, l): (b, length, c) in x's dtype."""
    batch, _, channels = x.shape
    weighted = x * weights.to(compute_dtype(x)).unsqueeze(2)
    rows = torch.arange(batch, device=x.device).unsqueeze(1) * length + places
    # One row of x to one row of the result: torch adds these without atomics, in a fixed order, on a CPU.
    index = rows.reshape(-1, 1).expand(-1, channels)
    # Negative zero is what leaves every number as it is when it is added.
    nothing = weighted.new_full((batch * length, channels), -0.0)
    fused = nothing.scatter_add(0, index, weighted.reshape(-1, channels))
    return fused.reshape(batch, length, channels).to(x.dtype)


def fuse_tokens_backward(dy: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """Return the gradient of the tokens, (b, l, c) in dy's dtype."""
    index = places.unsqueeze(2).expand(-1, -1, dy.shape[2])
    return (dy.gather(1, index) * weights.to(compute_dtype(dy)).unsqueeze(2)).to(dy.dtype)


def match_tokens(
    metric: Tensor, leading: int, protected: Tensor | None, sizes: Tensor | None, r: int, order: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose r tokens that fuse with another, by ToMe's bipartite matching (Bolya et al. 2023, arXiv 2210.09461).

    metric (b, l, c); of tokens that never fuse, `leading` at the head, or protected: their places (1 or b, p), in any
    order; sizes (b, l), 1 where None; order "sequence" or "tome". `famba.fusion.match` says which tokens are chosen.
    Returns places (b, l), int64 in [0, l - r); each token's share of its place (b, l), its size over the sum of sizes;
    and these sums (b, l - r), both in float32 (float64).
    """
    batch, length, _ = metric.shape
    in_a, in_b = split_alternately(leading, protected, length, metric.device)
    unit = F.normalize(metric.to(compute_dtype(metric)), dim=-1)
    similarity = take(unit, in_a) @ take(unit, in_b).transpose(1, 2)
    closest, partner = similarity.max(dim=2)  # of equal values the first, by torch's definition
    chosen = closest.argsort(dim=1, descending=True, stable=True)[:, :r]
    # The tokens of A that fuse, and those of B that they join.
    source = in_a.expand(batch, -1).gather(1, chosen)
    target = in_b.expand(batch, -1).gather(1, partner.gather(1, chosen))
    kept = torch.ones(batch, length, dtype=torch.bool, device=metric.device).scatter_(1, source, False)
    if order == "sequence":
        places = kept.cumsum(1) - 1
    else:
        is_b = torch.zeros_like(kept).scatter_(1, in_b.expand(batch, -1), True)
        rest = length - in_b.shape[1] - r
        places = torch.where(is_b, rest + is_b.cumsum(1), (kept & ~is_b).cumsum(1)) - 1
    places = places.scatter(1, source, places.gather(1, target))
    return places, *group_shares(places, sizes, length - r, compute_dtype(metric))


def split_alternately(
    leading: int, protected: Tensor | None, length: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the places of the tokens of set A and of set B, ascending, (1 or b, their number).

    Of the tokens that belong to neither, `leading` stand at the head, or `protected` has their places (1 or b, p).
    """
    count = leading if protected is None else protected.shape[1]
    free = free_places(leading, protected, length, device)
    return free[:, count % 2 :: 2], free[:, 1 - count % 2 :: 2]


def group_shares(places: Tensor, sizes: Tensor | None, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return each token's share of its place's size (b, l), exactly 1 for one alone, and the sizes (b, length)."""
    if sizes is None:
        sizes = torch.ones(places.shape, dtype=dtype, device=places.device)
    sizes = sizes.to(dtype)
    totals = sizes.new_zeros(sizes.shape[0], length).scatter_add(1, places, sizes)
    return sizes / totals.gather(1, places), totals


def free_places(leading: int, protected: Tensor | None, length: int, device: torch.device) -> Tensor:
    """Return the places of the tokens that may fuse, ascending, (1 or b, length - p)."""
    if protected is None:
        return torch.arange(leading, length, device=device).unsqueeze(0)
    free = torch.arange(length - protected.shape[1], device=device).unsqueeze(0)
    for place in protected.sort(dim=1).values.unbind(1):
        free = free + (free >= place.unsqueeze(1))
    return free


def take(x: Tensor, places: Tensor) -> Tensor:
    """Return the rows of x (b, l, c) at places (1 or b, k)."""
    if places.shape[0] == 1:
        return x.index_select(1, places[0])
    return x.gather(1, places.unsqueeze(2).expand(-1, -1, x.shape[2]))


class _Scan:
    """Hold a scan's inputs in the dtype of the arithmetic, those of tokens as (l, b, c) in the order of the scan.

    Work is on tiles of images, and within these on chunks of steps.
    """

    def __init__(self, inputs: ScanInputs) -> None:
        u, delta, A, B, C, D, z, bias, self.softplus, self.reverse = inputs
        self.dtype = compute_dtype(u)
        # (n, d): with the channels innermost every elementwise op runs over contiguous memory.
        self.A = A.t().to(self.dtype).contiguous()
        self.D, self.bias = (None if x is None else x.to(self.dtype) for x in (D, bias))
        self.u, self.delta, self.B, self.C = map(self.ordered, (u, delta, B, C))
        self.z = None if z is None else self.ordered(z)
        size = max(1, A.numel())
        images = max(1, min(u.shape[0], _STEP_ELEMENTS // size))
        self.tiles = _pieces(u.shape[0], images)
        self.chunks = _pieces(u.shape[1], max(1, _CHUNK_ELEMENTS // (size * images)))

    def ordered(self, x: Tensor) -> Tensor:
        """Return what belongs to tokens (b, l, c) as (l, b, c), the last step first if the scan is reversed."""
        x = x.to(self.dtype).transpose(0, 1)
        return x.flip(0) if self.reverse else x.contiguous()

    def as_given(self, x: Tensor) -> Tensor:
        """Undo `ordered`."""
        return (x.flip(0) if self.reverse else x).transpose(0, 1).contiguous()

    def start(self, images: slice) -> Tensor:
        """Return states (b, n, d) of zeros."""
        return self.A.new_zeros(images.stop - images.start, *self.A.shape)

    def run(self, here: tuple[slice, slice], state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return the states after each step and their decays (t, b, n, d), step sizes (t, b, d), and softplus' slope.

        here: steps and images. state: enters the first step (b, n, d).
        """
        delta = self.delta[here] if self.bias is None else self.delta[here] + self.bias
        slope = torch.sigmoid(delta) if self.softplus else None
        # The same as softplus, which is several times slower in torch's CPU build.
        delta = -F.logsigmoid(-delta) if self.softplus else delta
        decay = (delta.unsqueeze(2) * self.A).exp_()
        states = (delta * self.u[here]).unsqueeze(2) * self.B[here].unsqueeze(3)
        for rate, after in zip(decay.unbind(), states.unbind(), strict=True):
            state = after.addcmul_(rate, state)
        return states, decay, delta, slope

    def read_out(self, here: tuple[slice, slice], states: Tensor) -> Tensor:
        """Return the output before the gate, (t, b, d)."""
        out = torch.matmul(self.C[here].unsqueeze(2), states).squeeze(2)
        return out if self.D is None else out + self.D * self.u[here]


def _pieces(count: int, most: int) -> list[slice]:
    return [slice(i, min(i + most, count)) for i in range(0, count, most)]


def _silu_slope(x: Tensor) -> Tensor:
    gate = torch.sigmoid(x)
    return gate * (1 + x * (1 - gate))


def _conv_windows(length: int, width: int, reverse: bool) -> Iterator[tuple[slice, slice]]:
    """Give for each tap of the kernel the positions it reads and those it writes."""
    for k in range(width):
        shift = min(width - 1 - k, length)
        early, late = slice(0, length - shift), slice(shift, length)
        yield (late, early) if reverse else (early, late)


def _conv_linear(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> Tensor:
    dtype = compute_dtype(x)
    y = torch.zeros(x.shape, dtype=dtype, device=x.device)
    if bias is not None:
        y += bias
    taps = weight.to(dtype).t().contiguous()
    x = x.to(dtype)
    for tap, (there, here) in zip(taps, _conv_windows(x.shape[1], weight.shape[1], reverse), strict=True):
        y[:, here].addcmul_(x[:, there], tap)
    return y


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
