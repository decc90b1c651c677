"""Fuse tokens in timm's vision transformers (ToMe, Bolya et al. 2023, arXiv 2210.09461), without changing them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import timm
import torch
from jaxtyping import Float
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from famba.errors import ConfigError, check_choice
from famba.fusion import Fusion
from famba.models.backbone import Backbone, Reduction, Run, Tokens, is_of_fusion, register_backbone, timm_cfg

AFTER_ATTENTION = "after_attention"
_POOLS = ("token", "avg")
_PREFIX = "vit."
_MODULES = ("vision_transformer", "deit")


def _of_vit(name: str) -> Any:
    return property(lambda self: getattr(self.vit, name))


@register_backbone
class ToMe(Backbone):
    """Fuse tokens of a timm vision transformer between the attention and the MLP of its blocks, as `apply_tome` says.

    state_dict names the parameters, which are the transformer's own, as the transformer does.
    """

    kind = "a vision transformer"
    layers_name = "blocks"
    places: ClassVar = {AFTER_ATTENTION: frozenset({"mixed", "keys"})}
    has_attention = True
    wraps_timm = True
    usual = Fusion(order="tome", weighting="size", place=AFTER_ATTENTION, proportional=True)

    # As the transformer has them now: its classifier and the size of its images can be changed.
    patch_embed, blocks, embed_dim = _of_vit("patch_embed"), _of_vit("blocks"), _of_vit("embed_dim")
    num_classes, pretrained_cfg = _of_vit("num_classes"), _of_vit("pretrained_cfg")

    def __init__(self, vit: VisionTransformer, settings: Fusion) -> None:
        super().__init__()
        _check_vit(vit)
        _check_parts(vit)
        self.vit = vit
        self.grad_checkpointing = vit.grad_checkpointing
        self.set_fusion(settings)
        self.register_state_dict_post_hook(_without_prefix)
        self.register_load_state_dict_pre_hook(_with_prefix)

    @classmethod
    def names(cls) -> list[str]:
        """List the timm names of vision transformers, most of which can fuse: `apply_tome` says which cannot."""
        return [*timm.list_models("vit_micro_*"), *(name for m in _MODULES for name in timm.list_models(module=m))]

    @classmethod
    def create(cls, name: str, **arguments: Any) -> ToMe:
        """Build one by its timm name; it attends as ToMe does without training unless told otherwise."""
        settings = {key: arguments.pop(key) for key in list(arguments) if is_of_fusion(key)}
        fusion = cls.fusion_of(arguments.pop("fusion", None), settings)
        vit: Any = timm.create_model(name, **arguments)
        return cls(vit, fusion).train(vit.training)

    @property
    def num_patches(self) -> int:  # type: ignore[override]
        """Number of tokens that may fuse."""
        return self.vit.patch_embed.num_patches

    @property
    def num_tokens(self) -> int:  # type: ignore[override]
        """Length of the sequence that enters the first block."""
        return self.num_patches + self.vit.num_prefix_tokens

    @property
    def special(self) -> tuple[int, ...]:
        """Places of the prefix tokens: a class token, a distillation token, registers."""
        return tuple(range(self.vit.num_prefix_tokens))

    def special_rows(self, rows: int, cls_position: str | None) -> tuple[int, ...]:
        """Return the rows of the prefix tokens; in some transformers they have none."""
        return () if self.vit.no_embed_class else self.special

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Name the parameters that the transformer does not decay."""
        own = {f"{_PREFIX}{name}" for name in self.vit.no_weight_decay()}
        return own & {name for name, _ in self.named_parameters()}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the transformer's patterns of parameter names, for their names here."""

        def here(given: Any) -> Any:
            if not isinstance(given, str):
                return [(here(pattern), order) for pattern, order in given]
            # The beginning that a pattern is bound to lies behind the prefix here.
            return rf"^{re.escape(_PREFIX)}(?:{given.replace('^', '')})"

        return {group: here(given) for group, given in self.vit.group_matcher(coarse).items()}

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the classifier, or classifiers."""
        return self.vit.get_classifier()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one; 0 classes for none."""
        check_choice("global_pool", global_pool or self.vit.global_pool, _POOLS)
        self.vit.reset_classifier(num_classes, global_pool)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Any:
        """Classify images (b, in_chans, height, width): logits (b, num_classes), as the transformer returns them."""
        _check_vit(self.vit)
        return call_as(self.vit, super().forward, x)

    def forward_head(self, x: Float[Tensor, "b l d"], pre_logits: bool = False) -> Any:
        """Classify what `forward_features` returns, as the transformer does.

        Raises ConfigError for another number of tokens, or where the transformer pools by the mean and fuses by equal
        weights or prunes: its mean over tokens is then not that over patches.
        """
        self.check_head(x, takes_mean=self.vit.global_pool == "avg")
        return self.vit.forward_head(x, pre_logits=pre_logits)

    def embed(self, x: Float[Tensor, "b c h w"]) -> Tensor:
        """Turn images into the tokens that enter the first block (b, l, d)."""
        vit = self.vit
        _check_parts(vit)  # again, since they may have been replaced
        return vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(x))))

    def layer(self, index: int, stream: Tensor, tokens: Tokens, reduction: Reduction | None) -> tuple[Tensor, Tokens]:
        """Compute one block, which fuses between its halves."""
        return self.recomputed(self._block, self.vit.blocks[index], stream, tokens, reduction)

    def normed(self, stream: Tensor) -> Tensor:
        """Apply the final norm (b, l, d)."""
        return self.vit.norm(stream)

    def features_of(self, stream: Tensor) -> Tensor:
        """Return the tokens (b, l, d) in the dtype of the weights."""
        return stream.to(self.vit.patch_embed.proj.weight.dtype)

    def classify(self, run: Run) -> Any:
        """Apply the transformer's head; a mean of tokens counts each patch once where weighing by size."""
        vit, x, sizes = self.vit, self.normed(run.stream), run.tokens.sizes
        if vit.global_pool == "token" or sizes is None or not self.settings.counts_patches:
            return vit.forward_head(x)
        first = 0 if vit.pool_include_prefix else self.protected
        weights = sizes[:, first:, None]
        pooled = ((x[:, first:] * weights).sum(1) / weights.sum(1)).to(x.dtype)
        return vit.head(vit.head_drop(vit.fc_norm(pooled)))

    def _block(self, block: Block, x: Tensor, tokens: Tokens, reduction: Reduction | None) -> tuple[Tensor, Tokens]:
        def halves(x: Tensor) -> Tensor:
            nonlocal tokens
            assert isinstance(block.attn, Attention)
            normed = block.norm1(x)
            attended, keys = attend(block.attn, normed, tokens.sizes if self.settings.proportional else None)
            x = x + block.drop_path1(block.ls1(attended))
            if reduction is not None:
                (x,), tokens = reduction(tokens, [x], keys.mean(1), features=normed, mixed=attended, keys=keys)
            return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))

        return call_as(block, halves, x), tokens


def attend(
    attention: Attention, x: Float[Tensor, "b l d"], sizes: Float[Tensor, "b l"] | None
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b heads l head"]]:
    """Compute timm's self-attention, and its keys; with sizes, proportional to them (ToMe, section 3)."""
    keys = x

    def attended(x: Tensor) -> Tensor:
        nonlocal keys
        batch, length, _ = x.shape
        qkv = attention.qkv(x).reshape(batch, length, 3, attention.num_heads, attention.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = attention.q_norm(q), attention.k_norm(k)
        keys = k
        bias = None if sizes is None else sizes.log()[:, None, None, :].to(q.dtype)
        if attention.fused_attn:
            dropped = attention.attn_drop.p if attention.training else 0.0
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropped, scale=attention.scale)
        else:  # where timm is told to compute all weights
            scores = (q * attention.scale) @ k.transpose(-2, -1)
            out = attention.attn_drop((scores if bias is None else scores + bias).softmax(dim=-1)) @ v
        out = attention.norm(out.transpose(1, 2).flatten(2))
        if (gate := getattr(attention, "gate", None)) is not None:
            out = out * gate(x).sigmoid()
        return attention.proj_drop(attention.proj(out))

    return call_as(attention, attended, x), keys


def apply_tome(vit: VisionTransformer, schedule: Sequence[int] | str, **settings: Any) -> ToMe:
    """Let a timm vision transformer fuse tokens between attention and MLP, whether it was trained with fusion or not.

    The transformer is left as it was: the result holds it (`.vit`; `remove_tome` returns it) and shares its parameters,
    device and mode. Similarity is that of the keys, averaged over the heads. Hooks act as without fusion, and so do
    layers that replace others, but for the blocks and their attentions, which are computed here.

    Args:
        vit: ViT, DeiT and their kin, with a class token or without, a distillation token, registers, layer scale, norms
            of queries and keys; pooled by the class token or the mean.
        schedule: tokens removed in each block, or the name of a strategy, with its budget= and layers=: "all" with a
            budget of depth * r is ToMe's constant r, "decreasing" its decreasing one.
        settings: the fields order, weighting, mode, rule and proportional of `famba.fusion.Fusion`; as in ToMe unless
            given: "tome", "size", "fuse", "bipartite", and True, which adds the logarithm of a token's size to what it
            is attended by, as ToMe does in transformers that were trained without fusion.

    Raises:
        ConfigError: vit is not a transformer that can be fused, or the schedule does not fit it.
    """
    given: Any = schedule
    if not isinstance(given, Sequence):
        depth = len(vit.blocks) if isinstance(vit, VisionTransformer) else "depth"
        allowed = f"tokens to remove in each block, such as [8] * {depth}, or the name of a strategy"
        raise ConfigError(f"the schedule is {schedule!r}; allowed: {allowed}")
    return ToMe(vit, ToMe.fusion_of(schedule, settings)).train(vit.training)


def remove_tome(model: ToMe) -> VisionTransformer:
    """Return the transformer that `apply_tome` was given, as trained. Raises ConfigError for what it has not made."""
    if not isinstance(model, ToMe):
        raise ConfigError(f"a {type(model).__name__} was not made by apply_tome; there is nothing to remove")
    return model.vit


def _check_vit(vit: Any) -> None:
    """Raise ConfigError for what is no transformer of the kind that can be composed with fusion."""
    if not isinstance(vit, VisionTransformer):
        raise ConfigError(
            f"{type(vit).__name__} is no timm VisionTransformer; allowed: the ViT and DeiT models that "
            "timm.list_models(module='vision_transformer') and timm.list_models(module='deit') name"
        )
    kind, usual = type(vit), VisionTransformer
    if kind.forward is not usual.forward or kind.forward_features is not usual.forward_features:
        told = "which fusion would leave out; allowed: those of timm's VisionTransformer"
        raise ConfigError(f"{kind.__name__} has a forward or forward_features of its own, {told}")
    _check_forward("the transformer", vit)
    if vit.global_pool not in _POOLS:
        told = f"which counts tokens and not patches; allowed: {', '.join(_POOLS)}"
        raise ConfigError(f"the transformer pools by global_pool={vit.global_pool!r}, {told}")
    if not isinstance(vit.patch_drop, nn.Identity):
        raise ConfigError("the transformer drops patches (patch_drop_rate), which fusion does by its own schedule")
    if vit.dynamic_img_size:
        told = "a schedule is for one; create it with img_size instead"
        raise ConfigError(f"the transformer takes images of any size (dynamic_img_size), {told}")


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
    """Raise ConfigError where someone put another forward into this one module, in place of its class's."""
    if "forward" in module.__dict__:
        allowed = "hooks, and other layers in the places of its layers. Undo it by: del module.forward"
        raise ConfigError(f"{name} had its forward replaced, which fusion would leave out; allowed: {allowed}")


def _without_prefix(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Name parameters as the transformer alone names them."""
    inner = prefix + _PREFIX
    for name in [name for name in state if name.startswith(inner)]:
        state[prefix + name[len(inner) :]] = state.pop(name)


def _with_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Undo `_without_prefix` on what is to be loaded."""
    for name in [name for name in state if name.startswith(prefix)]:
        state[prefix + _PREFIX + name[len(prefix) :]] = state.pop(name)


def call_as(module: nn.Module, forward: Callable[..., Any], *args: Any) -> Any:
    """Call `forward` in place of a module's own, so that torch runs the module's hooks around it."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if not any(hooks):
        return forward(*args)
    module.forward = forward
    try:
        return module(*args)
    finally:
        del module.forward


default_cfgs = generate_default_cfgs({"vit_micro_patch4_32": timm_cfg(32)})


@register_model
def vit_micro_patch4_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Build a vision transformer of vim_micro's depth, width and number of parameters, for 32 x 32 images."""
    shape = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 8, "num_heads": 4, "mlp_ratio": 3}
    return build_model_with_cfg(VisionTransformer, "vit_micro_patch4_32", pretrained, **{**shape, **kwargs})
