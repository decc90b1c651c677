"""What a Vim costs with a schedule, by its shapes alone: multiply-adds, and bytes kept for the backward."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from famba.models.vim import Vim, VimBlock
from famba.ops.bidirectional_mixer import kept_bytes, mixer_macs
from famba.ops.inputs import MixerSizes
from famba.ops.match_tokens import match_macs
from famba.ops.reference import scan_state_shape

_FP32, _INT64 = 4, 8


@dataclass(frozen=True)
class LayerCost:
    """One layer, per image: tokens that enter its fusion and that leave it, multiply-adds, bytes for the backward."""

    entering: int
    leaving: int
    macs: int
    saved_bytes: int


@dataclass(frozen=True)
class Cost:
    """A model with a schedule, per image. embedding and head have multiply-adds and bytes, in this order."""

    layers: tuple[LayerCost, ...]
    embedding: tuple[int, int]
    head: tuple[int, int]

    @property
    def macs(self) -> int:
        """Multiply-adds of a forward pass, what papers on vision backbones call FLOPs.

        Matrix products, convolutions, scans and the similarities between tokens count; norms, activations and sums do
        not. A training step does about three times as many.
        """
        return sum(layer.macs for layer in self.layers) + self.embedding[0] + self.head[0]

    @property
    def saved_bytes(self) -> int:
        """Bytes that autograd keeps of a forward pass for the backward."""
        return sum(layer.saved_bytes for layer in self.layers) + self.embedding[1] + self.head[1]

    @property
    def token_layers(self) -> int:
        """Tokens left after each layer's fusion, summed over the layers."""
        return sum(layer.leaving for layer in self.layers)


def cost(model: Vim, backend: str, dtype: torch.dtype) -> Cost:
    """Work out what a model costs; its weights are not looked at, so it may be on the meta device.

    Args:
        model: with the schedule that it has.
        backend: what computes the ops, by name: one keeps more than another.
        dtype: of the matrix products, torch.float32 or what autocast makes of it.
    """
    tokens = model.num_tokens
    layers = []
    for layer in model.layers:
        assert isinstance(layer, VimBlock)
        shape = _Shape.of(model, layer, backend, dtype)
        layers.append(shape.cost(tokens))
        tokens = layers[-1].leaving
    return Cost(tuple(layers), _embedding(model, dtype), _head(model, tokens, dtype))


@dataclass(frozen=True)
class _Shape:
    """What a layer's costs depend on besides the tokens. protected: tokens that never fuse. bytes: of a product."""

    d_model: int
    d_inner: int
    d_state: int
    dt_rank: int
    d_conv: int
    r: int
    after_scan: bool
    protected: int
    backend: str
    bytes: int

    @classmethod
    def of(cls, model: Vim, layer: VimBlock, backend: str, dtype: torch.dtype) -> _Shape:
        mixer, fusion = layer.mixer, layer.fusion
        return cls(
            d_model=model.embed_dim,
            d_inner=mixer.d_inner,
            d_state=mixer.d_state,
            dt_rank=mixer.dt_rank,
            d_conv=mixer.conv1d.kernel_size[0],
            r=fusion.r,
            after_scan=fusion.place == "after_scan",
            protected=model.num_tokens - model.num_patches,
            backend=backend,
            bytes=dtype.itemsize,
        )

    def cost(self, entering: int) -> LayerCost:
        leaving = entering - self.r
        after_scan = self.after_scan and self.r > 0
        scanned = entering if after_scan else leaving
        macs = mixer_macs(
            scanned, self.d_model, self.d_inner, self.d_state, self.dt_rank, self.d_conv, output=not after_scan
        )
        # The norm keeps the residual stream, the mixer its input.
        saved = entering * self.d_model * _FP32 + self._mixer_bytes(scanned, output=not after_scan)
        if self.r:
            channels = self.d_inner if after_scan else self.d_model
            macs += match_macs(entering, self.protected, channels)
            # Places and shares, which both streams are fused by.
            saved += entering * (_INT64 + _FP32)
        if after_scan:
            macs += leaving * self.d_inner * self.d_model
            saved += leaving * self.d_inner * self.bytes
        return LayerCost(entering, leaving, macs, saved)

    def _mixer_bytes(self, tokens: int, output: bool) -> int:
        projected = self.dt_rank + 2 * self.d_state
        kept = tokens * self.d_model * self.bytes
        out = self.d_model if output else None
        sizes = MixerSizes(
            1, tokens, self.d_model, self.d_inner, self.d_state, self.dt_rank, out, cast=self.bytes != _FP32
        )
        # Of one image more: copied weights are kept once, for all.
        one, two = (kept_bytes(self.backend, sizes._replace(batch=batch), self.bytes) for batch in (1, 2))
        if one is not None and two is not None:
            return kept + two - one
        # Part by part: u and z, then for each direction u convolved, dt, B and C, the step sizes, and the states.
        per_direction = tokens * (2 * self.d_inner + projected) * self.bytes
        per_direction += math.prod(scan_state_shape(1, tokens, self.d_inner, self.d_state)) * _FP32
        kept += tokens * 2 * self.d_inner * self.bytes + 2 * per_direction
        return kept + (tokens * self.d_inner * self.bytes if output else 0)


def _embedding(model: Vim, dtype: torch.dtype) -> tuple[int, int]:
    """The patch embedding, which keeps the image."""
    weight = model.patch_embed.proj.weight
    (height, width), channels = model.patch_embed.img_size, weight.shape[1]
    return model.num_patches * weight.numel(), height * width * channels * dtype.itemsize


def _head(model: Vim, tokens: int, dtype: torch.dtype) -> tuple[int, int]:
    """The last norm keeps the residual stream, the classifier what it reads."""
    width, norm = model.embed_dim, tokens * model.embed_dim * _FP32
    if not isinstance(model.head, nn.Linear):
        return 0, norm
    fused = any(model.fusion)
    if model.cls_index is None:
        # The mean of the tokens; the sizes that it weighs by are kept.
        read = width * dtype.itemsize + (tokens * _FP32 if fused and model.fusion_by_size else 0)
    elif fused and model.cls_index > 0:
        # The class token is gathered from where it is in each image: the tokens, its place, and itself.
        read = (tokens + 1) * width * dtype.itemsize + _INT64
    else:
        read = tokens * width * dtype.itemsize
    return width * model.num_classes, norm + read
