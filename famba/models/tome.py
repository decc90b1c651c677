"""Token merging in timm's vision transformers (Bolya et al. 2023, arXiv 2210.09461), without touching them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from famba.errors import ConfigError
from famba.fusion import TokenMap, match
from famba.fusion.matching import check_mode, check_order
from famba.models.calls import call_as, has_own_forward
from famba.models.fused import Choose, FusedNetwork, Passed, Way, check_choice
from famba.models.vim import WEIGHTINGS

AFTER_ATTENTION = "after_attention"
"""The one place where a transformer fuses: what Vim calls fusion_place."""

_POOLS = ("token", "avg")
_PREFIX = "vit."


@dataclass(frozen=True)
class Merging:
    """How each layer fuses; order, weighting, mode and proportional as in `apply_tome`."""

    order: str
    weighting: str
    mode: str
    proportional: bool

    def __post_init__(self) -> None:
        check_order(self.order)
        check_choice("weighting", self.weighting, WEIGHTINGS)
        check_mode(self.mode)

    @property
    def counts_patches(self) -> bool:
        """Whether the weights of tokens are the patches that they hold."""
        return self.mode == "fuse" and self.weighting == "size"

    @property
    def keeps_sizes(self) -> bool:
        """Whether what a token holds is of any matter."""
        return self.mode == "fuse" and (self.weighting == "size" or self.proportional)


class ToMe(FusedNetwork):
    """A vision transformer of timm's that fuses tokens between the attention and the MLP of its blocks.

    `apply_tome` makes it. It shares the transformer's parameters, and names them in state_dict as the transformer does.
    """

    def __init__(self, vit: VisionTransformer, fusion: Sequence[int], merging: Merging) -> None:
        super().__init__()
        _check_vit(vit)
        _check_parts(vit)
        self.vit = vit
        self.merging = merging
        self.grad_checkpointing = vit.grad_checkpointing
        self._check_fusion(fusion, self.depth)
        self.fusion = tuple(fusion)
        self.register_state_dict_post_hook(_without_prefix)
        self.register_load_state_dict_pre_hook(_with_prefix)

    @property
    def num_patches(self) -> int:  # type: ignore[override]
        """Tokens that may fuse, of images of the size that the transformer now takes."""
        return self.vit.patch_embed.num_patches

    @property
    def num_tokens(self) -> int:  # type: ignore[override]
        """Length of the sequence that enters the first block."""
        return self.num_patches + self.vit.num_prefix_tokens

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.vit.blocks)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images, in pixels."""
        height, width = self.vit.patch_embed.img_size
        return height, width

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        """Width of the classifier; 0 for none."""
        return self.vit.num_classes

    @property
    def pretrained_cfg(self) -> Any:
        """What timm knows of the transformer's weights, and of the images that they take."""
        return self.vit.pretrained_cfg

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        rows, columns = self.vit.patch_embed.grid_size
        return rows, columns

    @property
    def embed_dim(self) -> int:
        """d_model."""
        return self.vit.embed_dim

    @property
    def way(self) -> Way:
        """How it fuses, in every block alike."""
        merging = self.merging
        return Way(merging.order, merging.weighting, AFTER_ATTENTION, merging.mode, merging.proportional)

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
        """Remove other numbers of tokens from now on, one for each block, and in another way where one is given.

        Arguments as of `apply_tome`; place can only be "after_attention". Raises ConfigError where they do not fit;
        nothing has changed then.
        """
        self._check_fusion(fusion, self.depth)
        if place is not None:
            check_choice("fusion_place", place, (AFTER_ATTENTION,))
        given: dict[str, Any] = {"order": order, "weighting": weighting, "mode": mode, "proportional": proportional}
        self.merging = replace(self.merging, **{name: value for name, value in given.items() if value is not None})
        self.fusion = tuple(fusion)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that the transformer does not decay, by their names here."""
        own = {f"{_PREFIX}{name}" for name in self.vit.no_weight_decay()}
        return own & {name for name, _ in self.named_parameters()}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the transformer's patterns of parameter names, for their names here."""

        def here(pattern: str) -> str:
            # The beginning that a pattern is bound to lies behind the prefix here.
            return rf"^{re.escape(_PREFIX)}(?:{pattern.replace('^', '')})"

        return {
            group: here(given) if isinstance(given, str) else [(here(pattern), order) for pattern, order in given]
            for group, given in self.vit.group_matcher(coarse).items()
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward instead of keeping what it needs."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier, or classifiers."""
        return self.vit.get_classifier()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one; 0 classes for none."""
        check_choice("global_pool", global_pool or self.vit.global_pool, _POOLS)
        self.vit.reset_classifier(num_classes, global_pool)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Any:
        """Classify images (b, in_chans, height, width): logits (b, num_classes), as the transformer gives them."""
        _check_vit(self.vit)

        def classify(x: Tensor) -> Any:
            passed = self._run(x)
            return self._head(self._normed(passed.leaving), passed.tokens)

        return call_as(self.vit, classify, x)

    def forward_head(self, x: Float[Tensor, "b l d"], pre_logits: bool = False) -> Any:
        """Classify what `forward_features` returns, (b, num_tokens, embed_dim), as the transformer does.

        Raises:
            ConfigError: x has another number of tokens; or the mean is taken over tokens whatever they hold (fused by
                equal weights, or pruned), which features of patches do not tell.
        """
        if x.shape[1] != self.num_tokens:
            raise ConfigError(
                f"forward_head was given {x.shape[1]} tokens per image; allowed: what forward_features returns, "
                f"{self.num_tokens} tokens per image"
            )
        if self.vit.global_pool == "avg" and any(self.fusion) and not self.merging.counts_patches:
            raise ConfigError(
                "this transformer takes the mean over its tokens, however many patches each holds, which the features "
                "of patches do not tell; call the model itself for logits, or fuse with weighting='size'"
            )
        return self.vit.forward_head(x, pre_logits=pre_logits)

    def patch_places(self, device: torch.device) -> Int[Tensor, " n"]:
        """Places of the patches in the sequence that enters the first block."""
        return torch.arange(self.protected, self.num_tokens, device=device)

    def _run(
        self, x: Tensor, choose: Choose | None = None, taken: Sequence[int] = (), depth: int | None = None
    ) -> Passed[Tensor, Tensor | None]:
        vit = self.vit
        _check_parts(vit)  # again, since they may have been replaced
        x, sizes = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(x)))), None
        maps, kept = [], {}
        for index, (block, r) in enumerate(zip(list(vit.blocks)[:depth], self.fusion, strict=False)):
            if self.grad_checkpointing and self.training and torch.is_grad_enabled():
                out = checkpoint(self._block, block, x, sizes, r, use_reentrant=False)
            else:
                out = self._block(block, x, sizes, r, choose)  # type: ignore[arg-type]
            x, sizes, token_map = out
            maps.append(token_map)
            if index in taken:
                kept[index] = x
        return Passed(x, sizes, maps, kept)

    def _normed(self, leaving: Tensor) -> Tensor:
        return self.vit.norm(leaving)

    def _stream(self, leaving: Tensor) -> Tensor:
        return leaving.to(self.vit.patch_embed.proj.weight.dtype)

    def _parted(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        return features[:, self.protected :], features[:, : self.protected] if self.protected else None

    def _block(
        self, block: Block, x: Tensor, sizes: Tensor | None, r: int, choose: Choose | None = None
    ) -> tuple[Tensor, Tensor | None, TokenMap | None]:
        """One block, which fuses between its halves: its tokens (b, l - r, d), their sizes, and what it fused."""
        token_map = None

        def halves(x: Tensor) -> Tensor:
            nonlocal sizes, token_map
            assert isinstance(block.attn, Attention)
            attended, metric = attend(block.attn, block.norm1(x), sizes if self.merging.proportional else None)
            x = x + block.drop_path1(block.ls1(attended))
            removed = r
            if choose is not None:
                # The sets are dealt by the parity of the protected tokens alone.
                odd = self.protected % 2
                removed = choose(metric[:, self.protected - odd :], 0 if odd else None)
            if removed:
                weights = sizes if self.merging.weighting == "size" else None
                protected = range(self.protected)
                token_map = match(metric, removed, protected, self.merging.order, weights, self.merging.mode)
                x = token_map.fuse(x, weights)
                sizes = token_map.sizes(sizes) if self.merging.keeps_sizes else None
            return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))

        return call_as(block, halves, x), sizes, token_map

    def _head(self, x: Tensor, sizes: Tensor | None) -> Any:
        """The transformer's head on normed tokens; a mean of tokens counts each patch once where weighing by size."""
        vit = self.vit
        if vit.global_pool == "token" or sizes is None or not self.merging.counts_patches:
            return vit.forward_head(x)
        first = 0 if vit.pool_include_prefix else self.protected
        weights = sizes[:, first:, None]
        pooled = ((x[:, first:] * weights).sum(1) / weights.sum(1)).to(x.dtype)
        return vit.head(vit.head_drop(vit.fc_norm(pooled)))


def attend(
    attention: Attention, x: Float[Tensor, "b l d"], sizes: Float[Tensor, "b l"] | None
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b l head"]]:
    """Self-attention of timm's, and what similarity is measured on: the mean of the keys over the heads.

    With sizes, a token is attended to in proportion to them (proportional attention, ToMe section 3).
    """
    metric = x

    def attended(x: Tensor) -> Tensor:
        nonlocal metric
        batch, length, _ = x.shape
        qkv = attention.qkv(x).reshape(batch, length, 3, attention.num_heads, attention.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = attention.q_norm(q), attention.k_norm(k)
        metric = k.mean(1)
        bias = None if sizes is None else sizes.log()[:, None, None, :].to(q.dtype)
        out = attention.norm(_weighted(attention, q, k, v, bias).transpose(1, 2).flatten(2))
        if (gate := getattr(attention, "gate", None)) is not None:
            out = out * gate(x).sigmoid()
        return attention.proj_drop(attention.proj(out))

    return call_as(attention, attended, x), metric


def _weighted(attention: Attention, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Return attended values (b, heads, l, head): by one op or, where timm is told so, with all weights at hand."""
    if attention.fused_attn:
        dropped = attention.attn_drop.p if attention.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropped, scale=attention.scale)
    scores = (q * attention.scale) @ k.transpose(-2, -1)
    return attention.attn_drop((scores if bias is None else scores + bias).softmax(dim=-1)) @ v


def apply_tome(
    vit: VisionTransformer,
    schedule: Sequence[int],
    *,
    order: str = "tome",
    weighting: str = "size",
    mode: str = "fuse",
    proportional: bool = True,
) -> ToMe:
    """Let a timm vision transformer fuse tokens between attention and MLP, trained with fusion or not.

    The transformer is left as it was: the result holds it (`.vit`, and `remove_tome` gives it back) and shares its
    parameters, device and mode. Similarity is that of the keys, averaged over the heads. Hooks act as without
    fusion, and so do layers that replace others: all but the blocks and their attentions, which are computed here.

    Args:
        vit: ViT, DeiT and their kin, with a class token or without, a distillation token, registers, layer scale, norms
            of queries and keys; pooled by the class token or the mean.
        schedule: tokens removed in each block, from `famba.fusion.schedule` with protected=vit.num_prefix_tokens;
            "all" with a budget of depth * r is ToMe's constant r, "decreasing" its decreasing one.
        order: "tome" or "sequence", as in `famba.fusion.match`.
        weighting: "size", by the patches that a token holds, as in ToMe, or "mean".
        mode: "fuse", or "prune", where the same tokens are dropped.
        proportional: add the logarithm of a token's size to what it is attended by. ToMe has this for a transformer
            that was trained without fusion, and not in training.

    Raises:
        ConfigError: vit is none that this can do, or the schedule does not fit it.
    """
    _check_kind(schedule, vit)
    model = ToMe(vit, schedule, Merging(order, weighting, mode, proportional))
    return model.train(vit.training)


def remove_tome(model: ToMe) -> VisionTransformer:
    """Give back the transformer that fuses: the very one that `apply_tome` was given, with what training did to it.

    Raises ConfigError for what `apply_tome` has not made.
    """
    if not isinstance(model, ToMe):
        raise ConfigError(f"a {type(model).__name__} was not made by apply_tome; there is nothing to remove")
    return model.vit


def _check_kind(schedule: Any, vit: Any) -> None:
    """Raise ConfigError for ToMe's own r, or a strategy's name, in place of a schedule."""
    if isinstance(schedule, str) or not isinstance(schedule, Sequence):
        depth = len(vit.blocks) if isinstance(vit, VisionTransformer) else "depth"
        raise ConfigError(
            f"the schedule is {schedule!r}; allowed: tokens to remove in each block, such as [8] * {depth}, or as "
            "famba.fusion.schedule works them out"
        )


def _check_vit(vit: Any) -> None:
    """Raise ConfigError for what is no transformer of the kind that can be composed with fusion."""
    if not isinstance(vit, VisionTransformer):
        raise ConfigError(
            f"{type(vit).__name__} is no timm VisionTransformer; allowed: the ViT and DeiT models that "
            "timm.list_models(module='vision_transformer') and timm.list_models(module='deit') name"
        )
    kind = type(vit)
    if kind.forward is not VisionTransformer.forward or kind.forward_features is not VisionTransformer.forward_features:
        raise ConfigError(
            f"{kind.__name__} has a forward or forward_features of its own, which fusion would leave out; allowed: "
            "those of timm's VisionTransformer"
        )
    _check_forward("the transformer", vit)
    if vit.global_pool not in _POOLS:
        raise ConfigError(
            f"the transformer pools by global_pool={vit.global_pool!r}, which counts tokens and not patches; "
            f"allowed: {', '.join(_POOLS)}"
        )
    if not isinstance(vit.patch_drop, nn.Identity):
        raise ConfigError("the transformer drops patches (patch_drop_rate), which fusion does by its own schedule")
    if vit.dynamic_img_size:
        raise ConfigError(
            "the transformer takes images of any size (dynamic_img_size), a schedule is for one; "
            "create it with img_size instead"
        )


def _check_parts(vit: VisionTransformer) -> None:
    """Raise ConfigError for blocks and attentions that compute something else than is computed here."""
    for index, block in enumerate(vit.blocks):
        # Not isinstance: what a subclass adds would be left out.
        if type(block) is not Block:
            raise ConfigError(f"block {index} is a {type(block).__name__}; allowed: timm's Block, attention then MLP")
        if type(block.attn) is not Attention:
            raise ConfigError(f"block {index} attends by {type(block.attn).__name__}; allowed: timm's Attention")
        _check_forward(f"block {index}", block)
        _check_forward(f"the attention of block {index}", block.attn)


def _check_forward(name: str, module: nn.Module) -> None:
    if has_own_forward(module):
        raise ConfigError(
            f"{name} had its forward replaced, which fusion would leave out; allowed: hooks, and other layers in the "
            "places of its layers. Undo it by: del module.forward"
        )


def _without_prefix(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Name parameters as the transformer alone names them."""
    inner = prefix + _PREFIX
    for name in [name for name in state if name.startswith(inner)]:
        state[prefix + name[len(inner) :]] = state.pop(name)


def _with_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Undo `_without_prefix` on what is to be loaded."""
    for name in [name for name in state if name.startswith(prefix)]:
        state[prefix + _PREFIX + name[len(prefix) :]] = state.pop(name)
