"""Vision Mamba (Zhu et al. 2024, arXiv 2401.09417) with token fusion (Shen et al. 2024, arXiv 2409.09808)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from timm.layers import DropPath, PatchEmbed, lecun_normal_, trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from famba.errors import ConfigError
from famba.fusion import TokenMap, match
from famba.fusion.matching import check_mode, check_order
from famba.models.dense import Indices, chosen_layers
from famba.models.fused import Choose, FusedNetwork, Passed, Way, check_choice
from famba.models.mixer import VimMixer
from famba.ops import add_rms_norm

CLS_POSITIONS = ("head", "middle", "none")
WEIGHTINGS = ("mean", "size")
PLACES = ("before_mixer", "after_scan")


@dataclass(frozen=True)
class LayerFusion:
    """How one layer fuses: r tokens go; order, place and mode as in `Vim`; by_size weighs tokens by their patches."""

    r: int
    order: str
    by_size: bool
    place: str
    mode: str


class Tokens(NamedTuple):
    """What is known of a sequence besides its values.

    cls: the class token's place, an int, per image a tensor (b,), or None. sizes: patches that each token holds
    (b, l), None while they are all 1 or do not matter.
    """

    cls: int | Tensor | None
    sizes: Tensor | None


class Leaving(NamedTuple):
    """What a layer leaves (b, l, d): what it adds, as far as drop_path lets it, and the residual stream before that."""

    hidden: Tensor
    residual: Tensor | None


class RMSNorm(nn.Module):
    """RMS norm over the channels of the residual stream, with the addition to it."""

    def __init__(self, d_model: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the normed sum in x's dtype and the sum in float32, each (b, l, d_model)."""
        return add_rms_norm(x, residual, self.weight, self.eps)


class NoNorm(nn.Module):
    """Stands where the final norm was pruned: the addition alone."""

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum in x's dtype and in float32, each (b, l, d_model)."""
        total = x + residual
        return total.to(x.dtype), total


class VimBlock(nn.Module):
    """Add, norm, fuse, mix: one pre-norm layer.

    `drop_path` drops, with chance, what the layer before contributes; the model applies it on the way here, so that
    what a layer leaves is known before the next one fuses.
    """

    def __init__(self, mixer: VimMixer, d_model: int, drop_path: float, fusion: LayerFusion) -> None:
        super().__init__()
        self.norm = RMSNorm(d_model)
        self.mixer = mixer
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.fusion = fusion

    def forward(
        self, hidden: Tensor, residual: Tensor | None, tokens: Tokens, choose: Choose | None = None
    ) -> tuple[Tensor, Tensor, Tokens, TokenMap | None]:
        """Take the last layer's output (b, l, d) and the residual stream; return those of this layer, (b, l - r, d).

        `choose`, where given, is shown what similarity is measured on, and says what r is this once.
        """
        normed, stream = self.norm(hidden, residual)
        if choose is None and not self.fusion.r:
            return self.mixer(normed), stream, tokens, None
        token_map = None

        def fuse(metric: Tensor) -> Tensor:
            nonlocal stream, tokens, token_map
            r = self.fusion.r if choose is None else choose(metric, tokens.cls)
            if not r:
                return metric
            token_map = match(metric, r, tokens.cls, self.fusion.order, tokens.sizes, self.fusion.mode)
            metric, stream = token_map.fuse(metric, tokens.sizes), token_map.fuse(stream, tokens.sizes)
            tokens = self._fused(tokens, token_map)
            return metric

        mixed = self.mixer(fuse(normed)) if self.fusion.place == "before_mixer" else self.mixer(normed, fuse)
        return mixed, stream, tokens, token_map

    def _fused(self, tokens: Tokens, token_map: TokenMap) -> Tokens:
        # At the head the class token stays where it is in either order: a place known beforehand is cheaper.
        at_head = isinstance(tokens.cls, int) and tokens.cls == 0
        cls = 0 if at_head else token_map.protected
        by_size = self.fusion.by_size and self.fusion.mode == "fuse"
        return Tokens(cls, token_map.sizes(tokens.sizes) if by_size else None)


class Vim(FusedNetwork):
    """Vision Mamba: patches, a class token, `depth` pre-norm layers of bidirectional scans.

    Args:
        img_size: height and width in pixels, or one number for both; divisible by patch_size.
        patch_size: height and width of a patch in pixels, or one number for both.
        in_chans: channels of the image.
        num_classes: width of the classifier; 0 for none.
        embed_dim: d_model.
        depth: number of layers.
        d_state: states per channel of the scan.
        d_conv: width of the causal convolution.
        expand: d_inner / d_model.
        drop_path_rate: stochastic depth, rising linearly to this rate at the last layer.
        cls_position: "head" (Famba-V), "middle" (official Vim, at patches // 2), or "none" (mean of the tokens).
        fusion: tokens removed in each layer, from `famba.fusion.schedule`; None for no fusion.
        fusion_order: "sequence" or "tome", as in `famba.fusion.match`.
        fusion_weighting: "mean" (equal weights, as in the paper) or "size" (by the patches that a token holds); of no
            matter where tokens are pruned.
        fusion_place: "before_mixer" (similarity of the normed tokens, as the released code has it) or "after_scan"
            (similarity of the gated scans' mean, before the output projection, as the paper's figure draws it).
        fusion_mode: "fuse", or "prune": the tokens that would fuse into another are dropped, as a baseline.

    Raises:
        ConfigError: a value or the schedule does not fit.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 192,
        depth: int = 24,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        drop_path_rate: float = 0.0,
        cls_position: str = "head",
        fusion: Sequence[int] | None = None,
        fusion_order: str = "sequence",
        fusion_weighting: str = "mean",
        fusion_place: str = "before_mixer",
        fusion_mode: str = "fuse",
    ) -> None:
        super().__init__()
        check_choice("cls_position", cls_position, CLS_POSITIONS)
        check_choice("fusion_weighting", fusion_weighting, WEIGHTINGS)
        check_choice("fusion_place", fusion_place, PLACES)
        check_order(fusion_order)
        check_mode(fusion_mode)
        _check_patches(_pair(img_size), _pair(patch_size))
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.cls_position = cls_position
        self.grad_checkpointing = False

        # timm's annotation says int, its code takes both.
        self.patch_embed = PatchEmbed(_pair(img_size), _pair(patch_size), in_chans, embed_dim)  # type: ignore[arg-type]
        self.num_patches = self.patch_embed.num_patches
        self.num_tokens = self.num_patches + (cls_position != "none")
        reduction = self.patch_embed.feat_ratio()
        self.feature_info = [
            {"module": f"layers.{i}", "num_chs": embed_dim, "reduction": reduction} for i in range(depth)
        ]
        if cls_position != "none":
            self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.num_tokens, embed_dim))

        self.fusion = tuple(fusion) if fusion is not None else (0,) * depth
        self._check_fusion(self.fusion, depth)
        self.fusion_by_size = fusion_weighting == "size"
        self.fusion_mode = fusion_mode
        # A layer drops what the layer before it adds, the final norm what the last layer adds.
        rates = [0.0, *(drop_path_rate * i / max(1, depth - 1) for i in range(depth))]
        self.layers = nn.ModuleList(
            VimBlock(
                VimMixer(embed_dim, d_state, d_conv, expand),
                embed_dim,
                rate,
                LayerFusion(r, fusion_order, self.fusion_by_size, fusion_place, fusion_mode),
            )
            for rate, r in zip(rates, self.fusion, strict=False)
        )
        self.drop_path = DropPath(rates[-1]) if rates[-1] else nn.Identity()
        self.norm_f: nn.Module = RMSNorm(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self._init_weights()

    def _init_weights(self) -> None:
        lecun_normal_(self.patch_embed.proj.weight)
        assert self.patch_embed.proj.bias is not None
        nn.init.zeros_(self.patch_embed.proj.bias)
        trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_position != "none":
            trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, VimMixer):
                module.init_weights(len(self.layers))
        self._init_head()

    def _init_head(self) -> None:
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    @property
    def way(self) -> Way:
        """How it fuses, in every layer alike."""
        first = self.layers[0]
        assert isinstance(first, VimBlock)
        weighting = "size" if first.fusion.by_size else "mean"
        return Way(first.fusion.order, weighting, first.fusion.place, first.fusion.mode, proportional=False)

    @torch.jit.ignore
    def set_fusion(
        self,
        fusion: Sequence[int],
        order: str | None = None,
        weighting: str | None = None,
        place: str | None = None,
        mode: str | None = None,
        proportional: bool | None = None,
    ) -> None:
        """Remove other numbers of tokens from now on, one for each layer, and in another way where one is given.

        Arguments as of `Vim`; proportional attention is for networks that have attention. Raises ConfigError where they
        do not fit; nothing has changed then.
        """
        if proportional:
            raise ConfigError("proportional attention is asked for, and a Vim has no attention", "proportional")
        self._check_fusion(fusion, len(self.layers))
        chosen: dict[str, str | bool] = {}
        if order is not None:
            check_order(order)
            chosen["order"] = order
        if weighting is not None:
            check_choice("fusion_weighting", weighting, WEIGHTINGS)
            chosen["by_size"] = weighting == "size"
        if place is not None:
            check_choice("fusion_place", place, PLACES)
            chosen["place"] = place
        if mode is not None:
            check_mode(mode)
            chosen["mode"] = mode
        self.fusion = tuple(fusion)
        self.fusion_by_size = bool(chosen.get("by_size", self.fusion_by_size))
        self.fusion_mode = mode or self.fusion_mode
        for layer, r in zip(self.layers, self.fusion, strict=True):
            assert isinstance(layer, VimBlock)
            layer.fusion = replace(layer.fusion, r=r, **chosen)  # type: ignore[arg-type]

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that the released recipe does not decay, besides the one-dimensional ones."""
        return {"pos_embed", "cls_token"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns of parameter names, as timm's models have them: the stem, then layer by layer.

        The final norm goes with the last layer. `coarse` changes nothing, since there are no stages.
        """
        return {
            "stem": r"^cls_token|^pos_embed|^patch_embed",
            "blocks": [(r"^layers\.(\d+)", None), (r"^norm_f", (99999,))],  # in the group before it
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each layer in the backward instead of keeping what it needs."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one; 0 classes for none."""
        if global_pool is not None:
            raise ConfigError("a Vim pools by cls_position, chosen when it is built; global_pool is not taken")
        weight = self.pos_embed
        self.num_classes = num_classes
        self.head = nn.Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()
        self.head.to(device=weight.device, dtype=weight.dtype)
        self._init_head()

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images, in pixels."""
        assert self.patch_embed.img_size is not None
        return self.patch_embed.img_size

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.patch_embed.grid_size

    @property
    def cls_index(self) -> int | None:
        """The class token's place in the sequence that enters the first layer."""
        return {"head": 0, "middle": self.num_patches // 2, "none": None}[self.cls_position]

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes"]:
        """Classify images (b, in_chans, height, width): logits (b, num_classes)."""
        passed = self._run(x)
        return self.head(self._pool(self._normed(passed.leaving), passed.tokens))

    def forward_head(self, x: Float[Tensor, "b l d"], pre_logits: bool = False) -> Float[Tensor, "b out"]:
        """Classify what `forward_features` returns, (b, num_tokens, embed_dim): logits (b, num_classes).

        With `pre_logits`, what the classifier would read, (b, embed_dim).

        Raises:
            ConfigError: x has another number of tokens; or the model pools over tokens whatever they hold (no class
                token, tokens that fuse by equal weights or are pruned), which features of patches do not tell.
        """
        if x.shape[1] != self.num_tokens:
            raise ConfigError(
                f"forward_head was given {x.shape[1]} tokens per image; allowed: what forward_features returns, "
                f"{self.num_tokens} tokens per image"
            )
        if self.cls_index is not None:
            pooled = x[:, self.cls_index]
        elif any(self.fusion) and not (self.fusion_by_size and self.fusion_mode == "fuse"):
            raise ConfigError(
                "this model takes the mean over its tokens, however many patches each holds, which the features of "
                "patches do not tell; call the model itself for logits, or use fusion_weighting='size', or a class "
                "token (cls_position)"
            )
        else:
            pooled = x.mean(1)
        return pooled if pre_logits else self.head(pooled)

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: Indices = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the features of some layers do not need.

        Args:
            indices: layers as in `forward_intermediates`; those behind the last of them go, and their part of the
                schedule.
            prune_norm: remove the final norm.
            prune_head: remove the classifier.

        Returns:
            The layers that were asked for, counted from 0.
        """
        layers = chosen_layers(len(self.layers), indices)
        left = max(layers) + 1
        if left < len(self.layers):
            # It drops what the last layer that is left adds.
            self.drop_path = self.layers[left].drop_path  # type: ignore[assignment]
        self.layers, self.fusion = self.layers[:left], self.fusion[:left]
        if prune_norm:
            self.norm_f = NoNorm()
        if prune_head:
            self.reset_classifier(0)
        return layers

    def patch_places(self, device: torch.device) -> Int[Tensor, " n"]:
        """Places of the patches in the sequence that enters the first layer."""
        patches = torch.arange(self.num_patches, device=device)
        return patches if self.cls_index is None else patches + (patches >= self.cls_index)

    def _run(
        self, x: Tensor, choose: Choose | None = None, taken: Sequence[int] = (), depth: int | None = None
    ) -> Passed[Leaving, Tokens]:
        hidden, residual = self._embed(x), None
        tokens = Tokens(self.cls_index, None)
        maps, kept = [], {}
        layers = cast("list[VimBlock]", list(self.layers))
        drops = [*(layer.drop_path for layer in layers[1:]), self.drop_path]
        for index, layer in enumerate(layers[:depth]):
            if self.grad_checkpointing and self.training and torch.is_grad_enabled():
                out = checkpoint(layer, hidden, residual, tokens, use_reentrant=False)
            else:
                out = layer(hidden, residual, tokens, choose)
            hidden, residual, tokens, token_map = out
            hidden = drops[index](hidden)
            maps.append(token_map)
            if index in taken:
                kept[index] = Leaving(hidden, residual)
        return Passed(Leaving(hidden, residual), tokens, maps, kept)

    def _normed(self, leaving: Leaving) -> Tensor:
        return self.norm_f(leaving.hidden, leaving.residual)[0]

    def _stream(self, leaving: Leaving) -> Tensor:
        """The residual stream with what a layer adds (b, l, d), in the dtype of the weights."""
        assert leaving.residual is not None
        return (leaving.hidden + leaving.residual).to(self.pos_embed.dtype)

    def _parted(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """The patches' features (b, patches, d) and the class token's (b, 1, d), of all as `_embed` lays them out."""
        at = self.cls_index
        if at is None:
            return features, None
        cls = features[:, at : at + 1]
        return (torch.cat([features[:, :at], features[:, at + 1 :]], dim=1) if at else features[:, 1:]), cls

    def _embed(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        if self.cls_index is not None:
            cls = self.cls_token.expand(x.shape[0], -1, -1)
            x = torch.cat([x[:, : self.cls_index], cls, x[:, self.cls_index :]], dim=1)
        return x + self.pos_embed

    def _pool(self, x: Tensor, tokens: Tokens) -> Tensor:
        """The class token (b, d), or the mean of the tokens, weighted as they were fused."""
        if tokens.cls is None:
            if tokens.sizes is None:
                return x.mean(1)
            return ((x * tokens.sizes.unsqueeze(2)).sum(1) / self.num_patches).to(x.dtype)
        if isinstance(tokens.cls, int):
            return x[:, tokens.cls]
        return x.gather(1, tokens.cls[:, None, None].expand(-1, 1, x.shape[2])).squeeze(1)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _check_patches(image: tuple[int, int], patch: tuple[int, int]) -> None:
    for side, size, step in zip(("height", "width"), image, patch, strict=True):
        if step < 1 or size < step or size % step:
            low = max(step, size - size % step) if step >= 1 else 0
            raise ConfigError(
                f"image {side} {size} is not divisible by patch size {step}; "
                f"use {low} or {low + step}, or another patch size",
                "img_size",
            )
