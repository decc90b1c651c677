"""Vim's bidirectional Mamba mixer (Zhu et al. 2024, arXiv 2401.09417, Algorithm 1)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from famba.ops import Direction, TokenMeasures, bidirectional_mixer, causal_conv1d
from famba.ops.bidirectional_mixer import gated_scan

_DELTA_RANGE, _DELTA_FLOOR = (0.001, 0.1), 1e-4
_log = logging.getLogger(__name__)

Between = Callable[[Tensor, TokenMeasures | None], Tensor]
"""Callback (the mean of the gated scans, what was measured) -> what is projected instead."""
_Side = tuple[Any, Any, Any, Tensor, Tensor]  # one direction's conv1d, x_proj, dt_proj, A_log and D


class VimMixer(nn.Module):
    """Mix tokens by two selective scans, one in each direction, each with its own parameters.

    Parameter names are those of the official checkpoints; d_inner = expand * d_model, dt_rank = ceil(d_model / 16).
    Its layers are computed together, as one op. Where one has hooks or was replaced, such as by an adapter or a
    quantized layer, the layers are called one by one, which is slower and logged once.
    """

    def __init__(self, d_model: int, d_state: int = 16, d_conv: int = 4, expand: int = 2) -> None:
        super().__init__()
        inner = self.d_inner = expand * d_model
        rank = self.dt_rank = math.ceil(d_model / 16)
        self.d_state = d_state
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=False)
        # Forward, and with "_b" backward.
        conv = partial(nn.Conv1d, inner, inner, d_conv, groups=inner, padding=d_conv - 1)
        self.conv1d, self.conv1d_b = conv(), conv()
        self.x_proj, self.x_proj_b = (nn.Linear(inner, rank + 2 * d_state, bias=False) for _ in range(2))
        self.dt_proj, self.dt_proj_b = (nn.Linear(rank, inner) for _ in range(2))
        rates = torch.arange(1, d_state + 1).float().log().repeat(inner, 1)
        self.A_log, self.A_b_log = (nn.Parameter(rates.clone()) for _ in range(2))
        self.D, self.D_b = (nn.Parameter(torch.ones(inner)) for _ in range(2))
        self.out_proj = nn.Linear(inner, d_model, bias=False)

    def init_weights(self, depth: int) -> None:
        """Initialise as Vim does: step sizes log-uniform in [0.001, 0.1], the output scaled by 1 / sqrt(depth)."""
        low, high = (math.log(x) for x in _DELTA_RANGE)
        for projection in (self.dt_proj, self.dt_proj_b):
            nn.init.uniform_(projection.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
            delta = torch.empty(self.d_inner).uniform_(low, high).exp().clamp(min=_DELTA_FLOOR)
            with torch.no_grad():
                projection.bias.copy_(delta + torch.log(-torch.expm1(-delta)))  # the inverse of softplus
        nn.init.kaiming_uniform_(self.out_proj.weight, a=math.sqrt(5))
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(depth)

    def forward(
        self, x: Float[Tensor, "b l d_model"], between: Between | None = None, measure: bool = False
    ) -> Float[Tensor, "b left d_model"]:
        """Mix normed tokens (b, l, d_model); `between` changes what `scan` returns before the output projection."""
        if between is None and _is_linear(self.out_proj, False) and self._changed() is None:
            return bidirectional_mixer(x, self.in_proj.weight, *self._directions(), self.out_proj.weight)
        scanned, measures = self.scan(x, measure)
        return self.out_proj(scanned if between is None else between(scanned, measures))

    def scan(
        self, x: Float[Tensor, "b l d_model"], measure: bool = False
    ) -> tuple[Float[Tensor, "b l d_inner"], TokenMeasures | None]:
        """Compute all but the output projection: the mean of the two gated scans (b, l, d_inner).

        With `measure` also what the scans did with each token, else None.
        """
        changed = self._changed()
        if changed is None:
            if measure:
                return bidirectional_mixer(x, self.in_proj.weight, *self._directions(), measure=True)
            return bidirectional_mixer(x, self.in_proj.weight, *self._directions()), None
        _tell_slower(changed)
        u, z = self.in_proj(x).chunk(2, dim=-1)
        measures: list[Tensor] | None = [] if measure else None
        ahead, back = (self._scan_by_calls(u, z, side, bool(i), measures) for i, side in enumerate(self._sides()))
        mean = (ahead + back) / 2
        return mean, None if measures is None else TokenMeasures.of(torch.stack(measures, dim=1))

    def _changed(self) -> str | None:
        """Name a layer before the output projection that has to be called; None where one op computes them all."""
        layers = self._modules  # an attribute of a module takes longer to find
        for name, is_as_built in _AS_BUILT.items():
            if not is_as_built(layers[name]):
                return name
        return None

    def _sides(self) -> tuple[_Side, _Side]:
        forward = (self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D)
        return forward, (self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b)

    def _directions(self) -> tuple[Direction, Direction]:
        forward, backward = [
            Direction(conv.weight.squeeze(1), conv.bias, x_proj.weight, dt_proj.weight, dt_proj.bias, _rates(A_log), D)
            for conv, x_proj, dt_proj, A_log, D in self._sides()
        ]
        return forward, backward

    def _scan_by_calls(self, u: Tensor, z: Tensor, side: _Side, reverse: bool, measures: list[Tensor] | None) -> Tensor:
        """Scan in one direction, as the op does, by calls of the layers; append measures where there is a list."""
        conv, x_proj, dt_proj, A_log, D = side
        u = _convolved(u, conv, reverse)
        dt, B, C = x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        # The bias enters inside the scan, in float32, so that small steps survive bf16.
        plain = is_plain(dt_proj, nn.Linear)
        delta, bias = (F.linear(dt, dt_proj.weight), dt_proj.bias) if plain else (dt_proj(dt), None)
        return gated_scan(u, delta, _rates(A_log), B, C, D, z, bias, reverse, measures)


def _rates(A_log: Tensor) -> Tensor:
    return -A_log.to(torch.promote_types(A_log.dtype, torch.float32)).exp()


def _convolved(u: Tensor, conv: Any, reverse: bool) -> Tensor:
    """Return silu of the convolution of u (b, l, d): a position sees itself and those before it, or those after it."""
    if _is_causal(conv):
        return causal_conv1d(u, conv.weight.squeeze(1), conv.bias, activation="silu", reverse=reverse)
    turned = u.flip(1) if reverse else u
    y = conv(turned.transpose(1, 2))[..., : u.shape[1]].transpose(1, 2)
    return F.silu(y.flip(1) if reverse else y)


def _is_linear(layer: Any, has_bias: bool) -> bool:
    return is_plain(layer, nn.Linear) and (layer.bias is not None) == has_bias


def _is_causal(layer: Any) -> bool:
    """Return whether a layer is the depthwise convolution that the ops compute, however wide."""
    return (
        is_plain(layer, nn.Conv1d)
        and layer.bias is not None
        and layer.padding == (layer.kernel_size[0] - 1,)
        and layer.padding_mode == "zeros"
        and layer.stride == layer.dilation == (1,)
        and layer.groups == layer.in_channels == layer.out_channels
    )


_AS_BUILT: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("in_proj", "x_proj", "x_proj_b"), partial(_is_linear, has_bias=False)),
    **dict.fromkeys(("conv1d", "conv1d_b"), _is_causal),
    **dict.fromkeys(("dt_proj", "dt_proj_b"), partial(_is_linear, has_bias=True)),
}
"""Map each layer before the output projection to a check that one op computes what it does."""

_told: set[str] = set()


@torch.compiler.assume_constant_result
def _tell_slower(name: str) -> None:
    """Log once in a process that a mixer takes longer, and why; torch.compile, which cannot log, does not trace it."""
    if not _told:
        _told.add(name)
        told = "the mixer calls its layers one by one, which is right but slower than its one op"
        _log.warning("%s of a Vim's mixer was replaced or has hooks: %s", name, told)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether a call of a module computes what its very class computes, and nothing more."""
    # Adapters and quantized layers are subclasses or wrappers. Written out, since mixers ask it at every call.
    return type(module) is kind and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )
