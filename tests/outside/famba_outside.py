"""A package outside famba that adds rules of token reduction and a backbone, as its users would."""

from __future__ import annotations

from typing import Any, ClassVar

import timm
import torch
from timm.layers import trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from famba.fusion import LayerTokens, TokenMap, register_rule
from famba.models import Backbone, register_backbone
from famba.models.backbone import Reduction, Run, Tokens


@register_rule("twos", orders=["sequence"], modes=["fuse"])
def twos(tokens: LayerTokens, r: int) -> TokenMap:
    """Fuse each second token that may fuse into the one before it, until r are gone."""
    batch, length, _ = tokens.metric.shape
    device, protected = tokens.metric.device, tokens.protected
    if not isinstance(protected, Tensor):
        assert not isinstance(protected, int)
        protected = torch.tensor(list(protected or ()), dtype=torch.int64, device=device).expand(batch, -1)
    is_free = torch.ones(batch, length, dtype=torch.bool, device=device).scatter(1, protected, False)
    rank = is_free.cumsum(1)
    joins = is_free & (rank % 2 == 0) & (rank <= 2 * r)
    places = (~joins).cumsum(1) - 1
    stands = is_free & ~joins
    before = torch.where(stands, torch.arange(length, device=device), -1).cummax(1).values.clamp(min=0)
    return TokenMap(torch.where(joins, places.gather(1, before), places), length - r)


@register_rule("by_keys", needs=["keys"])
def by_keys(tokens: LayerTokens, r: int) -> TokenMap:
    """Stand for a rule that only a network with attention can follow."""
    raise AssertionError("never called")


class MixerBlock(nn.Module):
    """Let each token see the mean of all."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mean, self.own = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, tokens: Tokens, reduction: Reduction | None) -> tuple[Tensor, Tokens]:
        """Reduce the tokens (b, l, d), and mix those that are left."""
        normed = self.norm(x)
        if reduction is not None:
            (normed, x), tokens = reduction(tokens, [normed, x], normed, features=normed)
        mixed = self.own(normed).relu() * self.mean(normed.mean(1, keepdim=True)).sigmoid()
        return x + mixed, tokens


@register_backbone
class TinyMixer(Backbone):
    """Patches by a matrix, blocks that mix by means, and no special token."""

    kind = "a tiny mixer"
    layers_name = "mixers"
    places: ClassVar = {"before_mixer": frozenset()}

    def __init__(
        self,
        img_size: int = 32,
        patch_size: int = 8,
        in_chans: int = 3,
        num_classes: int = 10,
        embed_dim: int = 16,
        depth: int = 2,
        drop_path_rate: float = 0.0,
        fusion: Any = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.num_classes, self.embed_dim, self.patch = num_classes, embed_dim, patch_size
        self.side, self.channels = img_size // patch_size, in_chans
        self.num_patches = self.num_tokens = self.side**2
        self.project = nn.Linear(in_chans * patch_size**2, embed_dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.num_tokens, embed_dim))
        trunc_normal_(self.pos_embed, std=0.02)
        self.mixers = nn.ModuleList(MixerBlock(embed_dim) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(embed_dim), nn.Linear(embed_dim, num_classes)
        self.set_fusion(self.fusion_of(fusion, settings))

    @classmethod
    def names(cls) -> list[str]:
        return timm.list_models("tiny_mixer_*")

    @property
    def depth(self) -> int:
        return len(self.mixers)

    @property
    def image_size(self) -> tuple[int, int]:
        return self.side * self.patch, self.side * self.patch

    @property
    def grid_size(self) -> tuple[int, int]:
        return self.side, self.side

    @property
    def in_chans(self) -> int:
        return self.channels

    @property
    def special(self) -> tuple[int, ...]:
        return ()

    def embed(self, x: Tensor) -> Tensor:
        """Cut images into patches, and project them (b, l, d)."""
        p = self.patch
        patches = x.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        return self.project(patches) + self.pos_embed

    def layer(self, index: int, stream: Tensor, tokens: Tokens, reduction: Reduction | None) -> tuple[Tensor, Tokens]:
        return self.recomputed(self.mixers[index], stream, tokens, reduction)

    def normed(self, stream: Tensor) -> Tensor:
        return self.norm(stream)

    def features_of(self, stream: Tensor) -> Tensor:
        return stream

    def classify(self, run: Run) -> Tensor:
        return self.head(self.normed(run.stream).mean(1))


default_cfgs = generate_default_cfgs({"tiny_mixer_patch8_32": {"input_size": (3, 32, 32), "num_classes": 10}})


@register_model
def tiny_mixer_patch8_32(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build a mixer for 32 x 32 images."""
    return build_model_with_cfg(TinyMixer, "tiny_mixer_patch8_32", pretrained, **kwargs)
