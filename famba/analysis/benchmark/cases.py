"""The ops that `famba benchmark ops` times, on which inputs, and what they have to do at the least."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from famba.analysis.benchmark import traffic
from famba.analysis.benchmark.traffic import ITEM_BYTES, Passes
from famba.ops import (
    Direction,
    add_rms_norm,
    bidirectional_mixer,
    causal_conv1d,
    fuse_tokens,
    match_tokens,
    selective_scan,
    use_backend,
)

SHORTEST_FUSED = 3
"""Tokens of which two can fuse: the first is the class token."""
_WIDTH = 4  # of the convolution


@dataclass(frozen=True)
class Case:
    """An op and its size: (batch, length, channels), for the scan states per channel; precision as in DTYPES.

    The mixer has so many inner channels, and half as many outside.
    """

    op: str
    batch: int
    length: int
    channels: int
    states: int
    precision: str

    @property
    def title(self) -> str:
        """The case in one line."""
        return f"{self.op} {self.precision} ({self.batch}, {self.length}, {self.channels})"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the input: (batch, length, channels)."""
        return self.batch, self.length, self.channels

    @property
    def item(self) -> int:
        """Bytes of an activation."""
        return ITEM_BYTES[self.precision]

    @property
    def d_model(self) -> int:
        """Channels outside the mixer."""
        return max(1, self.channels // 2)

    @property
    def dt_rank(self) -> int:
        """Rank of the mixer's step sizes."""
        return math.ceil(self.d_model / 16)


def removed(length: int) -> int:
    """Tokens that fuse with another: 14 of 197, the most that a strategy of the paper removes in a layer."""
    return max(1, length // 14)


class _Draw:
    """Seeded random numbers in float32, the same for every device and precision; dtype is that of activations."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        """Normal numbers."""
        return torch.randn(shape, generator=self._generator)

    def uniform(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1)."""
        return torch.rand(shape, generator=self._generator)

    def activation(self, *shape: int) -> Tensor:
        """Normal numbers in the dtype of activations."""
        return self.normal(*shape).to(self.dtype)


@dataclass(frozen=True)
class Op:
    """An op to be timed.

    run: takes the inputs in order. inputs: makes them. work: what there is to do at the least. learned: the first so
    many inputs have gradients; all where None.
    """

    run: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: Callable[[Case, _Draw], list[Tensor]]
    work: Callable[[Case], Passes]
    learned: int | None = None
    tolerance: float | None = None


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Random inputs as a model has them under autocast: activations in `dtype`, parameters and residual in float32."""
    op = OPS[case.op]
    tensors = [x.to(device) for x in op.inputs(case, _Draw(dtype))]
    for x in tensors[: op.learned]:
        x.requires_grad_()
    return tensors


def passes(case: Case) -> Passes:
    """What a case has to do at the least."""
    return OPS[case.op].work(case)


def _scan_inputs(case: Case, draw: _Draw) -> list[Tensor]:
    (batch, length, channels), states = case.shape, case.states
    u, delta = draw.activation(batch, length, channels), (0.1 * draw.uniform(batch, length, channels)).to(draw.dtype)
    B, C = (draw.activation(batch, length, states) for _ in range(2))
    return [u, delta, -16 * draw.uniform(channels, states), B, C, torch.ones(channels)]


def _scan_work(case: Case) -> Passes:
    return traffic.selective_scan(*case.shape, case.states, case.item)


def _conv_inputs(case: Case, draw: _Draw) -> list[Tensor]:
    channels = case.channels
    return [draw.activation(case.batch, case.length, channels), draw.normal(channels, _WIDTH), draw.normal(channels)]


def _conv_work(case: Case) -> Passes:
    return traffic.causal_conv1d(*case.shape, _WIDTH, case.item)


def _norm_inputs(case: Case, draw: _Draw) -> list[Tensor]:
    return [draw.activation(*case.shape), draw.normal(*case.shape), draw.uniform(case.channels) + 0.5]


def _norm_work(case: Case) -> Passes:
    return traffic.add_rms_norm(*case.shape, case.item)


def _mix(x: Tensor, in_weight: Tensor, *weights: Tensor) -> Tensor:
    """The mixer under autocast, as a training step has it."""
    each = len(Direction._fields)
    forward, backward, (out_weight,) = weights[:each], weights[each : 2 * each], weights[2 * each :]
    with torch.autocast(x.device.type, dtype=x.dtype, enabled=x.dtype != torch.float32):
        return bidirectional_mixer(x, in_weight, Direction(*forward), Direction(*backward), out_weight)


def _mixer_inputs(case: Case, draw: _Draw) -> list[Tensor]:
    channels, d_model, states, rank = case.channels, case.d_model, case.states, case.dt_rank

    def weight(outputs: int, inputs: int) -> Tensor:
        return draw.normal(outputs, inputs) / math.sqrt(inputs)

    def direction() -> list[Tensor]:
        conv = [weight(channels, _WIDTH), draw.normal(channels)]
        projections = [weight(rank + 2 * states, channels), weight(channels, rank)]
        # Step sizes of about 0.001 to 0.1 and decays of 1 to n, as Vim begins.
        rates = [5 * draw.uniform(channels) - 7, -torch.arange(1.0, states + 1).repeat(channels, 1)]
        return [*conv, *projections, *rates, torch.ones(channels)]

    x = draw.activation(case.batch, case.length, d_model)
    return [x, weight(2 * channels, d_model), *direction(), *direction(), weight(d_model, channels)]


def _mixer_work(case: Case) -> Passes:
    size = (case.batch, case.length, case.d_model, case.channels, case.states, case.dt_rank, _WIDTH)
    return traffic.mixer(*size, case.item)


def _match_inputs(case: Case, draw: _Draw) -> list[Tensor]:
    return [draw.activation(*case.shape)]


def _match_work(case: Case) -> Passes:
    return traffic.match_tokens(*case.shape, removed(case.length), case.item)


def _fuse_inputs(case: Case, draw: _Draw) -> list[Tensor]:
    metric = draw.normal(*case.shape)
    with use_backend("reference"):
        places, shares, _ = match_tokens(metric, 1, None, None, removed(case.length), "sequence")
    return [draw.activation(*case.shape), places, shares]


def _fuse_work(case: Case) -> Passes:
    return traffic.fuse_tokens(*case.shape, removed(case.length), case.item)


OPS = {
    "selective_scan": Op(selective_scan, _scan_inputs, _scan_work),
    "causal_conv1d": Op(lambda x, w, bias: causal_conv1d(x, w, bias, activation="silu"), _conv_inputs, _conv_work),
    "add_rms_norm": Op(lambda x, residual, w: add_rms_norm(x, residual, w, 1e-5), _norm_inputs, _norm_work),
    "bidirectional_mixer": Op(_mix, _mixer_inputs, _mixer_work),
    "match_tokens": Op(
        lambda metric: match_tokens(metric, 1, None, None, removed(metric.shape[1]), "sequence"),
        _match_inputs,
        _match_work,
        learned=0,
        tolerance=2e-2,
    ),
    "fuse_tokens": Op(
        lambda x, places, shares: fuse_tokens(x, places, shares, x.shape[1] - removed(x.shape[1])),
        _fuse_inputs,
        _fuse_work,
        learned=1,
    ),
}
"""Name to what is timed; a test of speed adds nothing by other arguments."""
USUAL_OPS = ("selective_scan", "causal_conv1d", "add_rms_norm")
"""Those timed where none is asked for."""
