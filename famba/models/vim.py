"""Vision Mamba (Zhu et al. 2024, arXiv 2401.09417) with token fusion (Shen et al. 2024, arXiv 2409.09808)."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any, ClassVar, NamedTuple

import timm
import torch
from jaxtyping import Float
from timm.layers import DropPath, PatchEmbed, lecun_normal_, to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, get_pretrained_cfg, register_model
from torch import Tensor, nn

from famba.errors import ConfigError, check_choice, near_miss
from famba.fusion import RULES, SETTINGS
from famba.models import backbone
from famba.models.backbone import CLS_POSITIONS, Backbone, Reduction, Run, Tokens, one_number, timm_cfg
from famba.models.mixer import VimMixer
from famba.models.weights import WEIGHTS, Fit, Origin, arguments_of_training, fit_pos_embed, fitting_weights
from famba.ops import TokenMeasures, add_rms_norm

BEFORE_MIXER, AFTER_SCAN = "before_mixer", "after_scan"
Size = int | tuple[int, int]  # of a square, or height and width


class Stream(NamedTuple):
    """Hold what a layer adds (b, l, d), as far as drop_path lets it, and the residual stream before that."""

    hidden: Tensor
    residual: Tensor | None


class RMSNorm(nn.Module):
    """Add to the residual stream, and apply an RMS norm over its channels."""

    def __init__(self, d_model: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the normed sum in x's dtype and the sum in float32, each (b, l, d_model)."""
        return add_rms_norm(x, residual, self.weight, self.eps)


class VimBlock(nn.Module):
    """Add, norm, fuse, mix: one pre-norm layer. The model applies `drop_path`, to what the layer before adds."""

    def __init__(self, mixer: VimMixer, d_model: int, drop_path: float) -> None:
        super().__init__()
        self.norm = RMSNorm(d_model)
        self.mixer = mixer
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(
        self, hidden: Tensor, residual: Tensor | None, tokens: Tokens, reduction: Reduction | None = None
    ) -> tuple[Tensor, Tensor, Tokens]:
        """Take the last layer's output (b, l, d) and the residual stream; return those of this layer, (b, l - r, d)."""
        normed, stream = self.norm(hidden, residual)
        if reduction is None:
            return self.mixer(normed), stream, tokens
        known = {"features": normed, "hidden": hidden}
        if reduction.fusion.place == BEFORE_MIXER:
            (normed, stream), tokens = reduction(tokens, [normed, stream], normed, **known)
            return self.mixer(normed), stream, tokens

        def reduce_mixed(mixed: Tensor, measures: TokenMeasures | None) -> Tensor:
            nonlocal stream, tokens
            known["mixed"] = mixed
            if measures is not None:
                known["step_sizes"], known["outputs"] = measures
            (mixed, stream), tokens = reduction(tokens, [mixed, stream], mixed, **known)
            return mixed

        return self.mixer(normed, reduce_mixed, RULES[reduction.fusion.rule].measures), stream, tokens


@backbone.register_backbone
class Vim(Backbone):
    """Classify images by patches, a class token, and `depth` pre-norm layers of bidirectional scans.

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
        drop_rate: dropout before the classifier.
        cls_position: "head" (Famba-V), "middle" (official Vim, at patches // 2), or "none".
        global_pool: "token" (the class token, usual where there is one), "avg" (the mean of the patches) or "" (each
            patch is classified, by the token that holds it), as in timm, but always behind the final norm.
        fusion: tokens removed in each layer, from `famba.fusion.schedule`; None for no fusion; or a strategy's name,
            with its budget= and layers=.
        settings: the fields of `famba.fusion.Fusion` with "fusion_" before them, such as fusion_order="tome". Its place
            is "before_mixer" (similarity of the normed tokens, as in the released code) or "after_scan" (of the gated
            scans' mean, before the output projection, as in the paper's figure).

    Raises:
        ConfigError: a value or the schedule does not fit.
    """

    kind = "a Vim"
    layers_name = "layers"
    places: ClassVar = {
        BEFORE_MIXER: frozenset({"hidden"}),
        AFTER_SCAN: frozenset({"hidden", "mixed", "step_sizes", "outputs"}),
    }
    keys = frozenset({"d_state", "cls_position"})
    papers = ("zhu2024vision", "shen2024famba")

    def __init__(
        self,
        img_size: Size = 224,
        patch_size: Size = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 192,
        depth: int = 24,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        drop_path_rate: float = 0.0,
        cls_position: str = "head",
        drop_rate: float = 0.0,
        global_pool: str | None = None,
        fusion: Sequence[int] | str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        check_choice("cls_position", cls_position, CLS_POSITIONS)
        if unknown := [name for name in settings if not backbone.is_of_fusion(name)]:
            known = [*signature(Vim).parameters, *backbone.OF_A_STRATEGY, *(f"fusion_{name}" for name in SETTINGS)]
            raise TypeError(f"Vim takes no argument {unknown[0]!r}{near_miss(unknown[0], known)}")
        self.settings = self.fusion_of(fusion, settings)
        self.check_fusion(self.settings)
        image, patch = _check_patches(img_size, patch_size)
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.cls_position: str = cls_position
        usual = "avg" if cls_position == "none" else "token"
        self.global_pool = self._pool(usual if global_pool is None else global_pool)

        # timm's annotation says int, its code takes both.
        self.patch_embed = PatchEmbed(image, patch, in_chans, embed_dim)  # type: ignore[arg-type]
        self.num_patches = self.patch_embed.num_patches
        self.num_tokens = self.num_patches + (cls_position != "none")
        info = {"num_chs": embed_dim, "reduction": self.patch_embed.feat_ratio()}
        self.feature_info = [{"module": f"layers.{i}", **info} for i in range(depth)]
        if cls_position != "none":
            self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.num_tokens, embed_dim))

        self.fusion = self.settings.schedule(depth, self.num_tokens, self.protected, self.grid_size)
        # A layer drops what the layer before it adds, the final norm what the last layer adds.
        rates = [0.0, *(drop_path_rate * i / max(1, depth - 1) for i in range(depth))]
        self.layers = nn.ModuleList(
            VimBlock(VimMixer(embed_dim, d_state, d_conv, expand), embed_dim, rate) for rate in rates[:depth]
        )
        self.drop_path = DropPath(rates[-1]) if rates[-1] else nn.Identity()
        self.norm_f: nn.Module = RMSNorm(embed_dim)
        self.head_drop = nn.Dropout(drop_rate) if drop_rate else nn.Identity()
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self._init_weights()

    def _init_weights(self) -> None:
        lecun_normal_(self.patch_embed.proj.weight)
        assert self.patch_embed.proj.bias is not None
        nn.init.zeros_(self.patch_embed.proj.bias)
        trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_position != "none":
            trunc_normal_(self.cls_token, std=0.02)
        for layer in self.layers:
            layer.mixer.init_weights(self.depth)  # type: ignore[operator, union-attr]
        self._init_head()

    def _init_head(self) -> None:
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    @classmethod
    def names(cls) -> list[str]:
        """List the timm names of Vims."""
        return timm.list_models("vim_*")

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Name the parameters that the released recipe does not decay, besides the one-dimensional ones."""
        return {"pos_embed", "cls_token"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns of parameter names, as timm's models do: the stem, then layer by layer, without stages."""
        layers = [(r"^layers\.(\d+)", None), (r"^norm_f", (99999,))]  # the final norm goes with the last layer
        return {"stem": r"^cls_token|^pos_embed|^patch_embed", "blocks": layers}

    def _pool(self, name: str) -> str:
        """Return how tokens are pooled, as timm names it. Raises ConfigError for what this network cannot do."""
        allowed = ["token", "avg", ""][self.cls_position == "none" :]
        if name not in allowed:
            told = f"global_pool is {name!r}; allowed with cls_position={self.cls_position!r}: {allowed}"
            raise ConfigError(told, "global_pool")
        return name

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one; 0 classes for none. global_pool: None leaves it as it is."""
        if global_pool is not None:
            self.global_pool = self._pool(global_pool)
        self.num_classes = num_classes
        self.head = nn.Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()
        self.head.to(device=self.pos_embed.device, dtype=self.pos_embed.dtype)
        self._init_head()

    def set_input_size(self, img_size: Size | None = None, patch_size: Size | None = None) -> None:
        """Take images, or patches, of another size from now on, in pixels: weights are resampled as from a file.

        A strategy is worked out again for the new number of patches. Raises ConfigError, and changes nothing, where the
        sizes or the schedule do not fit.
        """
        image = self.image_size if img_size is None else img_size
        image, patch = _check_patches(image, self.patch_embed.patch_size if patch_size is None else patch_size)
        rows, columns, grid = image[0] // patch[0], image[1] // patch[1], self.grid_size
        patches, tokens = rows * columns, rows * columns + self.protected
        schedule = self.settings.schedule(self.depth, tokens, self.protected, (rows, columns))
        self.patch_embed.set_input_size(image, patch)
        self.num_patches, self.num_tokens, self.fusion = patches, tokens, schedule
        embed = fit_pos_embed(Fit({}), self, self.pos_embed.detach(), Origin(self.cls_position, grid))
        self.pos_embed = nn.Parameter(embed, self.pos_embed.requires_grad)
        for info in self.feature_info:
            info["reduction"] = self.patch_embed.feat_ratio()

    @property
    def special(self) -> tuple[int, ...]:
        """Place of the class token, if there is one."""
        return self.special_rows(self.num_tokens, None)

    @property
    def cls_index(self) -> int | None:
        """The class token's place in the sequence that enters the first layer."""
        return self.special[0] if self.special else None

    def special_rows(self, rows: int, cls_position: str | None) -> tuple[int, ...]:
        """Return the class token's row, by its place in a file's network."""
        place = cls_position or self.cls_position
        return {"head": (0,), "middle": ((rows - 1) // 2,), "none": ()}[place]

    def timm_arguments(self) -> dict[str, Any]:
        """Return the arguments of `Vim` that make its shape."""
        mixer: Any = self.layers[0].mixer
        return {
            "img_size": one_number(self.image_size),
            "patch_size": one_number(self.patch_embed.patch_size),
            "in_chans": self.in_chans,
            "embed_dim": self.embed_dim,
            "depth": self.depth,
            "d_state": mixer.d_state,
            "d_conv": mixer.conv1d.kernel_size[0],
            "expand": mixer.d_inner // self.embed_dim,
            "cls_position": self.cls_position,
            "global_pool": self.global_pool,
        }

    def embed(self, x: Float[Tensor, "b c h w"]) -> Stream:
        """Turn images into patches with the class token in its place, and add the position embedding."""
        x = self.patch_embed(x)
        if self.cls_index is not None:
            cls = self.cls_token.expand(x.shape[0], -1, -1)
            x = torch.cat([x[:, : self.cls_index], cls, x[:, self.cls_index :]], dim=1)
        return Stream(x + self.pos_embed, None)

    def layer(self, index: int, stream: Stream, tokens: Tokens, reduction: Reduction | None) -> tuple[Stream, Tokens]:
        """Compute one layer."""
        hidden, residual, tokens = self.recomputed(self.layers[index], *stream, tokens, reduction)
        # Now, not in the next layer: what a layer leaves is known before the next one fuses.
        drop = self.layers[index + 1].drop_path if index + 1 < len(self.layers) else self.drop_path
        return Stream(drop(hidden), residual), tokens  # type: ignore[operator]

    def normed(self, stream: Stream) -> Tensor:
        """Add, and apply the final norm (b, l, d)."""
        if isinstance(self.norm_f, nn.Identity):  # pruned
            return self.features_of(stream).to(stream.hidden.dtype)
        return self.norm_f(stream.hidden, stream.residual)[0]

    def features_of(self, stream: Stream) -> Tensor:
        """Return the residual stream with what a layer adds (b, l, d), in the dtype of the weights."""
        assert stream.residual is not None
        return (stream.hidden + stream.residual).to(self.pos_embed.dtype)

    def classify(self, run: Run) -> Float[Tensor, "*b classes"]:
        """Read the class token, or the mean of the patches' tokens, weighted as they were fused; or every token."""
        x, tokens = self.normed(run.stream), run.tokens
        if not self.global_pool:
            pooled = self._unfused(x, self._held(run.maps, x)[-1])
        elif self.global_pool == "avg":
            pooled = self._mean(x, tokens)
        elif isinstance(tokens.special, Tensor):
            pooled = x.gather(1, tokens.special.unsqueeze(2).expand(-1, -1, x.shape[2])).squeeze(1)
        else:
            pooled = x[:, tokens.special[0]]
        return self.head(self.head_drop(pooled))

    def _mean(self, x: Tensor, tokens: Tokens) -> Tensor:
        """Return the mean of tokens (b, l, d) without the class token, by the patches that each holds."""
        weights, at = tokens.sizes, tokens.special
        if self.special:
            weights = x.new_ones(x.shape[:2], dtype=torch.float32) if weights is None else weights
            at = at if isinstance(at, Tensor) else x.new_full((x.shape[0], 1), at[0], dtype=torch.int64)
            weights = weights.scatter(1, at, 0.0)
        if weights is None:
            return x.mean(1)
        count = self.num_patches if tokens.sizes is not None else x.shape[1] - len(self.special)
        return ((x * weights.unsqueeze(2)).sum(1) / count).to(x.dtype)

    def forward_head(self, x: Float[Tensor, "b l d"], pre_logits: bool = False) -> Float[Tensor, "*b out"]:
        """Classify what `forward_features` returns: logits (b, num_classes), or with `pre_logits` what the head reads.

        Raises ConfigError for another number of tokens, or where the model takes the mean and fuses by equal weights or
        prunes: its mean over tokens is then not that over patches.
        """
        self.check_head(x, takes_mean=self.global_pool == "avg")
        pooled = x
        if self.global_pool:
            pooled = x[:, self.patch_places(x.device)].mean(1) if self.global_pool == "avg" else x[:, self.cls_index]
        pooled = self.head_drop(pooled)
        return pooled if pre_logits else self.head(pooled)

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: backbone.Indices = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the layers behind those of `indices`, as in `forward_intermediates`, and their part of the schedule.

        Also the final norm and the classifier, where asked for. Returns the chosen layers, counted from 0.
        """
        layers = backbone.chosen_layers(self.depth, indices)
        left = max(layers) + 1
        if left < self.depth:
            # It drops what the last layer that is left adds.
            self.drop_path = self.layers[left].drop_path  # type: ignore[assignment]
            self.settings = backbone.with_schedule(self.settings, self.fusion[:left])
        self.layers, self.fusion = self.layers[:left], self.fusion[:left]
        if prune_norm:
            self.norm_f = nn.Identity()
        if prune_head:
            self.reset_classifier(0)
        return layers


def _check_patches(image: Size, patch: Size) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return height and width of both. Raises ConfigError where images are not whole patches."""
    sizes = to_2tuple(image), to_2tuple(patch)
    for side, size, step in zip(("height", "width"), *sizes, strict=True):
        if step < 1 or size < step or size % step:
            low = max(step, size - size % step) if step >= 1 else 0
            told = f"divisible by patch size {step}; use {low} or {low + step}, or another patch size"
            raise ConfigError(f"image {side} {size} is not {told}", "img_size")
    return sizes


_SHIPPED = {"crop_pct": 1.0, "license": "apache-2.0", "file": str(WEIGHTS / "vim_micro_patch4_32/model.safetensors")}
default_cfgs = generate_default_cfgs(
    {
        "vim_micro_patch4_32.famba_cifar100": timm_cfg(32, num_classes=100, **_SHIPPED),
        "vim_tiny_patch16_224": timm_cfg(224),
        "vim_small_patch16_224": timm_cfg(224),
        "vim_base_patch16_224": timm_cfg(224),
    }
)


def create_vim(variant: str, pretrained: bool, shape: dict[str, Any], chosen: dict[str, Any]) -> nn.Module:
    """Build a registered variant: `shape` makes it, `chosen` has the arguments of timm.create_model.

    Pretrained weights that lie in their run's folder, such as the bundled ones, are fused as in training unless
    `chosen` says otherwise; fusion=[0] * depth is no fusion, since timm drops arguments that are None.

    Returns a Vim; with features_only=True timm's FeatureGetterNet of one, which returns maps of features. Raises
    ConfigError for what does not fit, such as the schedule of training on images of another size.
    """
    if chosen.get("pretrained_cfg") is None and get_pretrained_cfg(variant) is None:  # timm would warn
        chosen = {**chosen, "pretrained_cfg": timm_cfg(to_2tuple(shape.get("img_size", 224))[0])}
    trained = arguments_of_training(variant, shape, chosen) if pretrained else {}
    # With features_only=True: by forward_intermediates, of the last three layers as timm's ViTs do.
    features = {"out_indices": 3, "feature_cls": "getter"}
    arguments = {"pretrained_filter_fn": fitting_weights, "feature_cfg": features, **shape, **trained, **chosen}
    try:
        return build_model_with_cfg(Vim, variant, pretrained, **arguments)
    except ConfigError as error:
        if error.argument != "budget" or "fusion" not in trained or "fusion" in chosen:
            raise
        told = f"the weights of {variant} were trained to fuse by {trained['fusion']}, which does not fit here: {error}"
        fitting = f"give fusion= a schedule that does, such as [0] * {len(trained['fusion'])} for no fusion"
        raise ConfigError(f"{told}; {fitting}", "fusion") from error


@register_model
def vim_micro_patch4_32(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build a Vim for CPUs and tests, 0.3 M parameters, for 32 x 32 images; with weights of CIFAR-100."""
    shape = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 8}
    return create_vim("vim_micro_patch4_32", pretrained, shape, kwargs)


@register_model
def vim_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build Vim-Ti, 7 M parameters (arXiv 2401.09417)."""
    return create_vim("vim_tiny_patch16_224", pretrained, {"embed_dim": 192, "depth": 24}, kwargs)


@register_model
def vim_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build Vim-S, 26 M parameters (arXiv 2401.09417)."""
    return create_vim("vim_small_patch16_224", pretrained, {"embed_dim": 384, "depth": 24}, kwargs)


@register_model
def vim_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build Vim-B, 98 M parameters (arXiv 2401.09417)."""
    return create_vim("vim_base_patch16_224", pretrained, {"embed_dim": 768, "depth": 24}, kwargs)
