"""Define what a network must offer so that it can be trained, fused, planned, evaluated and shown.

A backbone is a class that derives from `Backbone` and is registered by `@register_backbone`; `create_network` then
builds it by its timm names. A YAML file in a folder `model/`, of configs/ or --config-dir, makes it a choice of
model=NAME. Both may stand in another package, imported with famba by an entry point in the group "famba.plugins".
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, TypeVar

import timm
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from famba.errors import ConfigError, check_choice, near_miss
from famba.fusion.config import Fusion
from famba.fusion.rules import RULES, LayerTokens
from famba.fusion.schedules import CUSTOM, Adapted, similar_pairs, spend
from famba.fusion.token_map import TokenMap, not_pruned, split_protected, trace, unfuse
from famba.ops.reference import free_places

CLS_POSITIONS = ("head", "middle", "none")
OF_A_STRATEGY = ("budget", "layers")  # fields of `Fusion` that networks also take without "fusion_" before them
_MOST_LISTED = 8  # names of a kind of network in an error

Choose = Callable[[LayerTokens, int], int]
"""Callback (what a layer knows of its tokens, r of the schedule) -> number of tokens to remove."""

Indices = int | Sequence[int] | None
"""Layers as timm counts them: the last n for a number, those listed for several, all for None."""


class Tokens(NamedTuple):
    """Hold what is known of a sequence besides its values."""

    special: Sequence[int] | Tensor  # places of the special tokens; (b, p) where they differ between images
    sizes: Tensor | None = None  # patches that each token holds (b, l); None while they are all 1 or do not matter
    map: TokenMap | None = None  # what the last layer fused


@dataclass
class Reduction:  # no NamedTuple, which torch.compile does not call in torch 2.6
    """Reduce the tokens of one layer, by r or by as many as `choose` says."""

    fusion: Fusion
    r: int
    grid: tuple[int, int]  # as in `LayerTokens`
    choose: Choose | None = None

    def __call__(
        self, tokens: Tokens, streams: Sequence[Tensor], metric: Tensor, **known: Any
    ) -> tuple[list[Tensor], Tokens]:
        """Reduce the streams (b, l, c) of a layer by one map; metric and known are members of `LayerTokens`."""
        fusion, special = self.fusion, tokens.special
        weights = tokens.sizes if fusion.weighting == "size" else None
        place: dict[str, Any] = {"protected": special, "grid": self.grid, "sizes": weights}
        seen = LayerTokens(metric, **known, **place, order=fusion.order, mode=fusion.mode, guard=fusion.guard)
        r = self.r if self.choose is None else self.choose(seen, self.r)
        if not r:
            return list(streams), tokens
        with torch.no_grad():
            found = RULES[fusion.rule].choose(seen, r)
        # At the head they stay where they are: places known beforehand are cheaper.
        if isinstance(special, Tensor) or tuple(special) != tuple(range(len(special))):
            special = found.moved(special)  # type: ignore[assignment]
        sizes = found.sizes(tokens.sizes) if fusion.keeps_sizes else None
        return [found.fuse(x, weights) for x in streams], Tokens(special, sizes, found)


class Run(NamedTuple):
    """Hold images behind some layers."""

    stream: Any  # what the last layer leaves, as the backbone passes it on
    tokens: Tokens
    maps: list[TokenMap | None]  # what each layer fused
    taken: dict[int, Any]  # the streams that layers leave, of those that were asked for


class Backbone(nn.Module):
    """Classify images by layers that each remove a number of tokens.

    `image_size`, `grid_size` and `in_chans` are read from timm's PatchEmbed, `depth` from the layers; a backbone that
    is built otherwise overrides them.
    """

    fusion: tuple[int, ...]  # tokens that each layer removes
    settings: Fusion  # how they are removed
    num_tokens: int  # length of the sequence that enters the first layer
    num_patches: int  # how many of them may fuse
    num_classes: int  # width of the classifier
    embed_dim: int  # channels of a token
    patch_embed: Any
    head: Any  # the classifier
    grad_checkpointing: bool = False  # whether layers are recomputed in the backward
    cls_position: str | None = None  # one of CLS_POSITIONS; None where the class token's place cannot be chosen

    kind: ClassVar[str]  # its name in sentences, with an article
    layers_name: ClassVar[str]  # the beginning of its layers' parameter names
    places: ClassVar[Mapping[str, frozenset[str]]]  # where a layer can reduce tokens, and the rules' NEEDS met there
    has_attention: ClassVar[bool] = False  # whether tokens can be attended to in proportion to their sizes
    keys: ClassVar[frozenset[str]] = frozenset()  # of the group `model`, besides those that all backbones take
    usual: ClassVar[Fusion] = Fusion()  # how it reduces tokens unless told otherwise
    wraps_timm: ClassVar[bool] = False  # whether its timm names build a network without fusion, which it wraps
    papers: ClassVar[tuple[str, ...]] = ()  # keys of the BibTeX entries in famba.export.folder that introduce it

    @classmethod
    @abstractmethod
    def names(cls) -> list[str]:
        """List its timm names."""

    @classmethod
    def create(cls, name: str, **arguments: Any) -> Backbone:
        """Build it by one of its names, as `create_network` does."""
        model = timm.create_model(name, **arguments)
        assert isinstance(model, cls)
        return model

    @classmethod
    def check_fusion(cls, fusion: Fusion) -> None:
        """Raise ConfigError, with the name of the field at fault, for what networks of this kind cannot do."""
        needs, anywhere = RULES[fusion.rule].needs, frozenset().union(*cls.places.values())
        # First of all: no other field makes up for a rule that the network cannot serve anywhere.
        known = cls.places.get(fusion.place, anywhere) if needs <= anywhere else anywhere
        if lacking := sorted(needs - known):
            serve = ", ".join(name for name, one in RULES.items() if one.needs <= known)
            able = [f"fusion.place={place}" for place, met in cls.places.items() if needs <= met]
            at = "" if known == anywhere else f" at {fusion.place}"
            told = f"needs {', '.join(lacking)} of the tokens, which {cls.kind} does not have{at}"
            told = f"{told}; choose one of {serve}, or {[*able, 'another model'][0]}"
            raise ConfigError(f"rule {fusion.rule!r} {told}", "rule")
        if fusion.place not in cls.places:
            told = f"where {cls.kind} reduces no tokens; allowed: {', '.join(cls.places)}"
            raise ConfigError(f"place is {fusion.place!r}{near_miss(fusion.place, cls.places)}, {told}", "place")
        if fusion.proportional and not cls.has_attention:
            told = f"proportional is about attention, and {cls.kind} has none; leave it out, or choose a transformer"
            raise ConfigError(told, "proportional")
        fusion.check_rule()

    @classmethod
    def fusion_of(cls, schedule: Sequence[int] | str | None, settings: Mapping[str, Any]) -> Fusion:
        """Return how a network is to reduce tokens, by a schedule (None for no fusion) or the name of a strategy.

        settings are fields of `Fusion`, with or without "fusion_" before them; those that are missing are as usual.
        """
        if twice := [name for name in settings if f"fusion_{name}" in settings]:
            raise ConfigError(f"{twice[0]} and fusion_{twice[0]} are the same; give one of them", twice[0])
        given = {name.removeprefix("fusion_"): value for name, value in settings.items() if value is not None}
        fusion = cls.usual.changed(**given)
        if not isinstance(given.get("strategy", schedule), str) and (lone := given.keys() & set(OF_A_STRATEGY)):
            told = f"{min(lone)} is of a strategy; give the name of one beside it, such as fusion='upper'"
            raise ConfigError(told, "strategy")
        if schedule is None or isinstance(schedule, str):
            return fusion.changed(strategy=schedule)
        return with_schedule(fusion, schedule)

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(getattr(self, self.layers_name))

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images, in pixels."""
        return tuple(self.patch_embed.img_size)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return tuple(self.patch_embed.grid_size)

    @property
    def in_chans(self) -> int:
        """Channels of the images."""
        return self.patch_embed.proj.in_channels

    @property
    @abstractmethod
    def special(self) -> tuple[int, ...]:
        """Places of the special tokens, which never fuse, in the sequence that enters the first layer."""

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        return self.head

    @abstractmethod
    def embed(self, x: Tensor) -> Any:
        """Turn images into the stream that enters the first layer."""

    @abstractmethod
    def layer(self, index: int, stream: Any, tokens: Tokens, reduction: Reduction | None) -> tuple[Any, Tokens]:
        """Compute one layer, which calls `reduction` at its place, and return the stream and tokens that it leaves."""

    @abstractmethod
    def normed(self, stream: Any) -> Tensor:
        """Apply the final norm to what a layer leaves (b, l, d)."""

    @abstractmethod
    def features_of(self, stream: Any) -> Tensor:
        """Return what a layer leaves as the next one reads it (b, l, d), in the dtype of the weights."""

    @abstractmethod
    def classify(self, run: Run) -> Any:
        """Return the logits (b, num_classes) of images behind all layers."""

    @property
    def protected(self) -> int:
        """Number of tokens that never fuse."""
        return self.num_tokens - self.num_patches

    @torch.jit.ignore
    def set_fusion(self, fusion: Sequence[int] | str | Fusion, **changes: Any) -> None:
        """Reduce tokens in another way from now on. Raises ConfigError, and changes nothing, where it does not fit.

        Args:
            fusion: tokens to remove in each layer; or a strategy's name, or all settings, which tell the schedule.
            changes: fields of `Fusion` to change, such as budget=0.5 or order="tome"; None leaves one as it is.
        """
        settings = fusion if isinstance(fusion, Fusion) else with_schedule(self.settings, fusion)
        settings = settings.changed(**changes)
        self.check_fusion(settings)
        self.settings, self.fusion = settings, self.schedule_of(settings)

    @torch.jit.ignore
    def schedule_of(self, fusion: Fusion) -> tuple[int, ...]:
        """Return the tokens that each layer is to remove. Raises ConfigError where they do not fit."""
        return fusion.schedule(self.depth, self.num_tokens, self.protected, self.grid_size)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each layer in the backward instead of keeping what it needs."""
        self.grad_checkpointing = enable

    def recomputed(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a layer's function; with `grad_checkpointing` it is computed again in the backward."""
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(function, *args, use_reentrant=False)
        return function(*args)

    def run(
        self,
        x: Tensor,
        choose: Choose | None = None,
        taken: Sequence[int] = (),
        depth: int | None = None,
        mark: Callable[[], None] = lambda: None,
    ) -> Run:
        """Pass images (b, in_chans, height, width) through the first `depth` layers, or all.

        choose says how many tokens each layer removes this once. taken lists layers whose streams are kept. mark is
        called before the first layer and after each.
        """
        stream, tokens = self.embed(x), Tokens(self.special)
        maps, kept = [], {}
        grid, grid_after = self.grid_size, RULES[self.settings.rule].grid_after
        mark()
        for index, r in enumerate(self.fusion[:depth]):
            reduction = Reduction(self.settings, r, grid, choose) if r or choose is not None else None
            if grid_after is not None and r:
                grid = grid_after(grid, r)
            stream, tokens = self.layer(index, stream, Tokens(tokens.special, tokens.sizes), reduction)
            maps.append(tokens.map)
            if index in taken:
                kept[index] = stream
            mark()
        return Run(stream, tokens, maps, kept)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Any:
        """Classify images (b, in_chans, height, width): logits (b, num_classes)."""
        return self.classify(self.run(x))

    def forward_features(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b l d"]:
        """Compute normed features of the last layer for each token of the first one, (b, num_tokens, embed_dim).

        Each patch has the features of the token that holds it after the last layer; a pruned patch those of the token
        that it was most similar to when it was dropped.
        """
        run = self.run(x)
        return self._unfused(self.normed(run.stream), self._held(run.maps, x)[-1])

    def forward_intermediates(
        self,
        x: Float[Tensor, "b c h w"],
        indices: Indices = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Any] | tuple[Tensor, list[Any]]:
        """Compute features of several layers as maps over the image, as timm's models do.

        They are what the next layer reads, before it norms and fuses (of a Vim the output plus the residual stream; in
        training without what drop_path drops), in the dtype of the weights; with `norm` in that of `forward_features`.
        Each patch has the features of the token that holds it after the layer.

        Args:
            x: images (b, in_chans, height, width).
            indices: layers from 0 (negative: from the end), a number of last layers, or None for all.
            return_prefix_tokens: return pairs, with the features of special tokens, if there are any (b, p, embed_dim).
            norm: apply the final norm to each.
            stop_early: do not run the layers behind the last that is asked for.
            output_fmt: "NCHW": (b, embed_dim, rows, columns); "NLC": (b, patches, embed_dim), row by row.
            intermediates_only: leave out the final features.

        Returns:
            The features of `forward_features`, for the last layer that ran; and those of the layers, in their order.
        """
        check_choice("output_fmt", output_fmt, ("NCHW", "NLC"))
        layers = chosen_layers(self.depth, indices)
        run = self.run(x, taken=layers, depth=max(layers) + 1 if stop_early else None)
        held = self._held(run.maps, x)
        found: list[Any] = []
        for layer, stream in run.taken.items():
            every = self._unfused(self.normed(stream) if norm else self.features_of(stream), held[layer])
            patches = every[:, self.patch_places(x.device)] if self.special else every
            if output_fmt == "NCHW":
                patches = patches.transpose(1, 2).unflatten(2, self.grid_size).contiguous()
            found.append((patches, every[:, list(self.special)]) if return_prefix_tokens and self.special else patches)
        return found if intermediates_only else (self._unfused(self.normed(run.stream), held[-1]), found)

    def patch_places(self, device: torch.device) -> Int[Tensor, " n"]:
        """Return the places of the patches in the sequence that enters the first layer."""
        return free_places(*split_protected(self.special, 1, self.num_tokens, device), self.num_tokens, device)[0]

    @torch.no_grad()
    def trace(self, x: Float[Tensor, "b c h w"]) -> tuple[Int[Tensor, "b n"], ...]:
        """Return for each layer the places (b, patches) of the tokens that hold the patches after its fusion."""
        return trace(self.run(x).maps, self.patch_places(x.device).expand(x.shape[0], -1))

    @torch.no_grad()
    def not_pruned(self, x: Float[Tensor, "b c h w"]) -> tuple[Bool[Tensor, "b n"], ...]:
        """Return for each layer whether each patch is still there after its fusion, (b, patches)."""
        return not_pruned(self.run(x).maps, self.patch_places(x.device).expand(x.shape[0], -1))

    @torch.no_grad()
    def adapted_fusion(self, x: Float[Tensor, "b c h w"], budget: int) -> Adapted:
        """Return the "adaptive" schedule of these images for a budget of tokens. The model should be in eval mode."""

        def counts_at(threshold: float) -> list[int]:
            maps = self.run(x, lambda seen, _: similar_pairs(seen.metric, seen.protected, threshold)).maps
            return [0 if found is None else found.places.shape[1] - found.length for found in maps]

        return spend(counts_at, self.num_patches, budget)

    def special_rows(self, rows: int, cls_position: str | None) -> tuple[int, ...]:
        """Return which rows of a position embedding belong to special tokens; cls_position as in its own network."""
        return self.special

    def timm_arguments(self) -> dict[str, Any]:
        """Return the arguments of timm.create_model that its name does not determine."""
        return {"img_size": one_number(self.image_size)}

    def check_head(self, x: Tensor, takes_mean: bool) -> None:
        """Raise ConfigError where `forward_head` cannot classify features x (b, l, d), by a token or by the mean."""
        if x.shape[1] != self.num_tokens:
            told = f"allowed: what forward_features returns, {self.num_tokens} tokens per image"
            raise ConfigError(f"forward_head was given {x.shape[1]} tokens per image; {told}")
        if takes_mean and any(self.fusion) and not self.settings.counts_patches:
            raise ConfigError(
                "this model takes the mean over its tokens, and the features of patches do not say which patches share "
                "a token; call the model itself for logits, or fuse with weighting='size', or choose a model that "
                "reads a class token"
            )

    def _held(self, maps: list[TokenMap | None], x: Tensor) -> tuple[Tensor, ...]:
        return trace(maps, torch.arange(self.num_tokens, device=x.device).expand(x.shape[0], -1))

    def _unfused(self, features: Tensor, held: Tensor) -> Tensor:
        return features if features.shape[1] == self.num_tokens else unfuse(features, held)


def one_number(size: tuple[int, int]) -> int | list[int]:
    """Return one number for a square, else height and width."""
    return size[0] if size[0] == size[1] else list(size)


def is_of_fusion(argument: str) -> bool:
    """Return whether an argument of a network is one of `Backbone.fusion_of`: fusion_order, or budget."""
    return argument.startswith("fusion_") or argument in OF_A_STRATEGY


def timm_cfg(size: int, **more: Any) -> dict[str, Any]:
    """Return what timm has to know of a model for images of a size, without weights unless `more` names them."""
    names = {"first_conv": "patch_embed.proj", "classifier": "head"}
    return {"url": "", "input_size": (3, size, size), **names, **more}


def with_schedule(settings: Fusion, schedule: Sequence[int] | str) -> Fusion:
    """Return settings that remove these numbers of tokens in the layers, or by a strategy with the usual budget."""
    strategy, budget = (schedule, Fusion.budget) if isinstance(schedule, str) else (CUSTOM, tuple(schedule))
    return replace(settings, strategy=strategy, budget=budget, layers=None, adapt_at=None, adapt_images=None)


BACKBONES: list[type[Backbone]] = []
"""Every kind of network that can be trained, in the order of their registration."""

_Kind = TypeVar("_Kind", bound=type[Backbone])


def register_backbone(kind: _Kind) -> _Kind:
    """Add a class to `BACKBONES`, and return it."""
    BACKBONES.append(kind)
    return kind


def network_names() -> list[str]:
    """List the timm names of all networks that can be trained."""
    return [name for kind in BACKBONES for name in kind.names()]


def backbone_of(name: str) -> type[Backbone]:
    """Return the kind of network that a timm name builds. Raises ConfigError for a name that none has."""
    allowed = []
    for kind in BACKBONES:
        names = kind.names()
        if name.split(".")[0] in names:
            return kind
        more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
        allowed.append(f"{kind.kind}: {', '.join(names[:_MOST_LISTED])}{more}")
    close = near_miss(name, network_names())
    raise ConfigError(f"unknown model.name {name!r}{close}; allowed: {'; '.join(allowed)}", "name")


def create_network(name: str, **arguments: Any) -> Backbone:
    """Build a network by its timm name, with or without a tag of pretrained weights.

    arguments are those of timm.create_model. fusion is the schedule (None for no fusion) or the name of a strategy, to
    which budget= and layers= belong; every field of `famba.fusion.Fusion` can be given with "fusion_" before it. Raises
    ConfigError where one does not fit.
    """
    return backbone_of(name).create(name, **arguments)


def chosen_layers(depth: int, indices: Indices) -> list[int]:
    """Return the layers, from 0, that `indices` name in their order. Raises ConfigError for none, or unknown ones."""
    if indices is None or (type(indices) is int and 1 <= indices <= depth):
        return list(range(depth))[-(indices or 0) :]
    listed = list(indices) if isinstance(indices, Sequence) else []
    if not listed or any(type(i) is not int or not -depth <= i < depth for i in listed):
        allowed = f"a list of layers from 0 to {depth - 1} (or from -{depth} to -1, counted from the end), how many of"
        raise ConfigError(f"indices is {indices!r}; allowed: {allowed} the last, 1 to {depth}, or None", "indices")
    return [i % depth for i in listed]
