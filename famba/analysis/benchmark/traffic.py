"""What an op has to do at the least, and how long a device needs for that at its best: the floor under a measured time.

Counted are bytes that go through device memory: each input read once, each output written once, whatever is worked out
in between kept on the chip. So the floor of an op leaves out that a kernel reads something twice, keeps more than it
has to, or fills the device badly; and it lies too high where an input is still in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from famba.analysis.benchmark.peaks import Peaks
from famba.analysis.benchmark.products import Linear
from famba.models.vim import Vim, VimBlock
from famba.ops.selective_scan import scan_macs

ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of an activation in each precision; parameters, sums and states are float32."""
_FP32, _INT64 = 4, 8
# Of each state in the backward: three instructions that work it out again, then its adjoint (2), the gradients of
# B, C and delta u (3), of the decay (2), and from that of delta and A (2).
_BACKWARD_VECTOR = 12
_ADAMW_TENSORS = 7  # weight, gradient and two moments are read; weight and moments are written


@dataclass(frozen=True)
class Work:
    """What one pass over data does at the least.

    bytes: read from and written to device memory. products: operations of matrix products, two for each multiply-add.
    vector: float32 instructions on single numbers. special: exponentials, logarithms and reciprocals; a kernel may
    work out some as polynomials instead, on the units that `vector` counts.
    """

    bytes: int
    products: int = 0
    vector: int = 0
    special: int = 0

    def floor_ms(self, peaks: Peaks, precision: str) -> float:
        """Milliseconds that a device takes where all its units are busy and the slowest decides."""
        rates = (peaks.bandwidth, peaks.products.get(precision), peaks.vector, peaks.special)
        amounts = (self.bytes, self.products, self.vector, self.special)
        return 1000 * max(amount / rate for amount, rate in zip(amounts, rates, strict=True) if rate)


@dataclass(frozen=True)
class Passes:
    """Passes over data, one after the other: those of a forward, and those of its backward."""

    forward: tuple[Work, ...]
    backward: tuple[Work, ...] = ()

    @property
    def both(self) -> tuple[Work, ...]:
        """Forward and backward."""
        return self.forward + self.backward


def floor_ms(passes: Iterable[Work], peaks: Peaks, precision: str) -> float:
    """Milliseconds for passes that wait for one another."""
    return sum(one.floor_ms(peaks, precision) for one in passes)


def total_bytes(passes: Iterable[Work]) -> int:
    """Bytes of all passes."""
    return sum(one.bytes for one in passes)


def selective_scan(
    batch: int, length: int, channels: int, states: int, item: int, *, inner: bool = False, directions: int = 1
) -> Passes:
    """Count a scan with skip weights; as the mixer has it, with gate, softplus and bias, where `inner`.

    With b, l, d, n of its shapes and k directions that share gate and result, bytes are, for activations of `item`,
    forward b l (d (2 k + 1) + 2 k n), backward b l (d (4 k + 1) + 4 k n), and b l d and 2 b l d more for a gate; for
    float32 parameters k d (n + 1) and twice that, k d and 2 k d more for a bias. States that a kernel keeps for its
    backward are left out: they can be worked out again. Special functions are, of each token and channel, n
    exponentials; softplus takes 2, in the backward 3, the gate 2.
    """
    tokens, gates = batch * length, int(inner)
    parameters = _FP32 * directions * channels * (states + 1 + gates)
    forward = Work(
        tokens * item * (channels * (2 * directions + 1 + gates) + 2 * directions * states) + parameters,
        vector=directions * scan_macs(batch, length, channels, states, skip=True, gate=inner),
        special=directions * tokens * channels * (states + 4 * gates),
    )
    backward = Work(
        tokens * item * (channels * (4 * directions + 1 + 2 * gates) + 4 * directions * states) + 2 * parameters,
        vector=directions * tokens * channels * states * _BACKWARD_VECTOR,
        special=directions * tokens * channels * (states + 5 * gates),
    )
    return Passes((forward,), (backward,))


def causal_conv1d(batch: int, length: int, channels: int, width: int, item: int, *, directions: int = 1) -> Passes:
    """Count a convolution with bias and silu, of one input in k directions.

    Bytes of activations: forward b l d (1 + k), backward b l d (2 + k), where silu's argument is worked out again; of
    float32 parameters k d (width + 1), and twice that.
    """
    values, parameters = batch * length * channels, _FP32 * directions * channels * (width + 1)
    forward = Work(
        values * item * (1 + directions) + parameters,
        vector=values * directions * width,
        special=values * directions * 2,
    )
    backward = Work(
        values * item * (2 + directions) + 2 * parameters,
        vector=values * directions * 3 * width,
        special=values * directions * 2,
    )
    return Passes((forward,), (backward,))


def add_rms_norm(batch: int, length: int, channels: int, item: int, *, first: bool = False) -> Passes:
    """Count the addition to a float32 residual and the norm; `first` where no residual is there yet.

    Forward: x, residual and weight are read, the normed sum and the sum written. Backward: gradients of both and the
    sum are read; gradients of x and residual, one and the same in float32, and of the weight are written.
    """
    values, weight = batch * length * channels, _FP32 * channels
    forward = Work(values * (2 * item + _FP32 * (2 - first)) + weight)
    gradients = item if first or item == _FP32 else item + _FP32
    return Passes((forward,), (Work(values * (item + 2 * _FP32 + gradients) + 2 * weight),))


def match_tokens(batch: int, length: int, channels: int, removed: int, item: int) -> Passes:
    """Count a matching with one protected token: the metric is read; places, shares and sums are written.

    Similarities are b ceil((l - 1) / 2) floor((l - 1) / 2) d multiply-adds in float32, and stay on the chip.
    """
    free = length - 1
    written = batch * (length * (_INT64 + _FP32) + (length - removed) * _FP32)
    pairs = math.ceil(free / 2) * (free // 2)
    return Passes((Work(batch * length * channels * item + written, vector=batch * pairs * channels),))


def fuse_tokens(batch: int, length: int, channels: int, removed: int, item: int) -> Passes:
    """Count a fusing: tokens, places and shares are read, the fused tokens written; backward the same, turned round."""
    tokens = batch * (2 * length - removed) * channels * item
    work = Work(tokens + batch * length * (_INT64 + _FP32))
    return Passes((work,), (work,))


def product(linear: Linear, item: int) -> Passes:
    """Count y = x W^T: each of its up to three products reads two operands and writes one."""
    rows, inputs, outputs = linear.rows, linear.inputs, linear.outputs
    one = Work(item * (rows * (inputs + outputs) + inputs * outputs), products=2 * rows * inputs * outputs)
    return Passes((one,), (one,) * (1 + linear.needs_dx))


def mixer(
    batch: int, length: int, d_model: int, channels: int, states: int, rank: int, width: int, item: int
) -> Passes:
    """Count Vim's mixer: its six products, and between them one pass for both convolutions and one for both scans.

    The gradients that meet at a tensor are taken to be added up where they are written. Not counted is what a backend
    works out again in the backward to keep less; a kernel that holds a product as well would move less.
    """
    tokens = batch * length
    into = product(Linear(tokens, d_model, 2 * channels), item)
    conv = causal_conv1d(batch, length, channels, width, item, directions=2)
    selecting = product(Linear(tokens, channels, rank + 2 * states), item)
    steps = product(Linear(tokens, rank, channels), item)
    scan = selective_scan(batch, length, channels, states, item, inner=True, directions=2)
    out = product(Linear(tokens, channels, d_model), item)
    return _in_turn([into, conv, selecting, selecting, steps, steps, scan, out])


def forward_and_step(model: Vim, batch: int, precision: str) -> Passes:
    """Count an inference of a model (`forward`) and what a training step adds to it (`backward`, with AdamW).

    Left out: the casts of autocast, position embedding, class token, loss and drop path.
    """
    item, width = ITEM_BYTES[precision], model.embed_dim
    patches = model.patch_embed.proj.weight[0].numel()
    parts = [product(Linear(batch * model.num_patches, patches, width, needs_dx=False), item)]
    tokens = model.num_tokens
    assert model.settings.place == "before_mixer"
    for number, (layer, removed) in enumerate(zip(model.layers, model.fusion, strict=True)):
        assert isinstance(layer, VimBlock)
        parts.append(add_rms_norm(batch, tokens, width, item, first=number == 0))
        if removed:
            parts.append(match_tokens(batch, tokens, width, removed, item))
            parts += [fuse_tokens(batch, tokens, width, removed, size) for size in (item, _FP32)]
        tokens -= removed
        inner = layer.mixer
        conv = inner.conv1d.weight.shape[2]
        parts.append(mixer(batch, tokens, width, inner.d_inner, inner.d_state, inner.dt_rank, conv, item))
    parts.append(add_rms_norm(batch, tokens, width, item))
    if isinstance(model.head, nn.Linear):
        parts.append(product(Linear(batch, width, model.head.out_features), item))
    update = Work(_ADAMW_TENSORS * _FP32 * sum(weight.numel() for weight in model.parameters()))
    return _in_turn([*parts, Passes((), (update,))])


def _in_turn(parts: list[Passes]) -> Passes:
    """Parts one after the other; their backward the other way round makes no difference to sums."""
    return Passes(
        tuple(work for part in parts for work in part.forward), tuple(work for part in parts for work in part.backward)
    )
