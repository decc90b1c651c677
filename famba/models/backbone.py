"""Backbones: what a network offers so that it can be trained, fused, planned, evaluated and shown.

A backbone is one class and one YAML file. The class derives from `Backbone`, says in `names` by which timm names it is
built, and is registered by `@register_backbone`; that may stand in another package, which is imported with famba where
it has an entry point in the group "famba.plugins". `create_network` then builds it by name, and the YAML file in a
folder `model/` (of configs/, or of a folder given by --config-dir) makes it a choice of model=NAME.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple, TypeVar

import timm
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from famba.errors import ConfigError, check_choice, near_miss
from famba.fusion.config import Fusion
from famba.fusion.rules import RULES, LayerTokens, closest_cosines, mean_cosine
from famba.fusion.schedules import CUSTOM, Adapted, similar_pairs, spend
from famba.fusion.token_map import TokenMap, not_pruned, trace, unfuse

FORMATS = ("NCHW", "NLC")
CLS_POSITIONS = ("head", "middle", "none")
_FUSION = "fusion_"

Choose = Callable[[LayerTokens], int]
"""Callback (what a layer knows of its tokens) -> number of tokens to remove."""

Indices = int | Sequence[int] | None
"""Layers as timm counts them: the last n for a number, those listed for several, all for None."""

Intermediates = list[Tensor] | list[tuple[Tensor, Tensor]]
"""Of several layers each one's features, or pairs of the patches' and the other tokens'."""


class Tokens(NamedTuple):
    """What is known of a sequence besides its values.

    special: places of the special tokens, or per image a tensor (b, p). sizes: patches that each token holds (b, l),
    None while they are all 1 or do not matter.
    """

    special: Sequence[int] | Tensor
    sizes: Tensor | None


class Reduction(NamedTuple):
    """How one layer reduces its tokens: by r, or by as many as `choose` says. grid: rows and columns of patches."""

    fusion: Fusion
    r: int
    grid: tuple[int, int]
    choose: Choose | None

    def __call__(
        self, tokens: Tokens, streams: Sequence[Tensor], metric: Tensor, **known: Any
    ) -> tuple[list[Tensor], Tokens, TokenMap | None]:
        """Reduce the streams (b, l, c) of a layer by one map; return them, what is known of the tokens, and the map.

        metric and known: members of `famba.fusion.LayerTokens`, as far as the layer has them.
        """
        fusion = self.fusion
        weights = tokens.sizes if fusion.weighting == "size" else None
        seen = LayerTokens(
            metric,
            protected=tokens.special,
            grid=self.grid,
            sizes=weights,
            order=fusion.order,
            mode=fusion.mode,
            **known,
        )
        r = self.r if self.choose is None else self.choose(seen)
        if not r:
            return list(streams), tokens, None
        found = RULES[fusion.rule].choose(seen, r)
        special = tokens.special
        # At the head they stay where they are: places known beforehand are cheaper.
        if isinstance(special, Tensor) or tuple(special) != tuple(range(len(special))):
            moved = found.moved(special)
            assert moved is not None
            special = moved
        sizes = found.sizes(tokens.sizes) if fusion.keeps_sizes else None
        return [found.fuse(x, weights) for x in streams], Tokens(special, sizes), found


class Run(NamedTuple):
    """Images behind some layers.

    stream: what the last layer leaves, as the backbone passes it on. tokens: what is known of its tokens.
    maps: for each layer what it fused, None where nothing. taken: what those layers leave that were asked for.
    """

    stream: Any
    tokens: Tokens
    maps: list[TokenMap | None]
    taken: dict[int, Any]


class Similarity(NamedTuple):
    """Of one layer's tokens: cosine of each with its closest partner (b, a), as `closest_cosines` has it; mean of all.

    mean: (b,), over all pairs of different tokens that may fuse.
    """

    closest: Tensor
    mean: Tensor


class Backbone(nn.Module):
    """Images to logits by layers that each remove a number of tokens.

    Attributes:
        fusion: tokens that each layer removes.
        settings: how they are removed.
        num_tokens: length of the sequence that enters the first layer.
        num_patches: how many of them may fuse.
        num_classes: width of the classifier.
        embed_dim: channels of a token.
        grad_checkpointing: whether layers are recomputed in the backward.
        cls_position: where the class token stands, one of `CLS_POSITIONS`, where that can be chosen; else None.

    For the class as a whole:
        kind: its name in sentences, with an article.
        layers_name: the beginning of its layers' parameter names.
        places: where a layer can reduce tokens, and for each place which `famba.fusion.rules.NEEDS` it can tell a rule.
        has_attention: whether tokens can be attended to in proportion to their sizes.
        keys: keys of the configuration's group `model` that it takes besides those that all take.
        usual: how it reduces tokens unless told otherwise.
        wraps_timm: whether its timm names build a network without fusion, which the class then wraps.
        papers: keys of the BibTeX entries in `famba.export.folder` that introduce it.
        printed_rate: multiply-adds forward that a GPU-hour of training came to in print; None where none is known.
    """

    fusion: tuple[int, ...]
    settings: Fusion
    num_tokens: int
    num_patches: int
    num_classes: int
    embed_dim: int
    grad_checkpointing: bool = False
    cls_position: str | None = None

    kind: ClassVar[str]
    layers_name: ClassVar[str]
    places: ClassVar[Mapping[str, frozenset[str]]]
    has_attention: ClassVar[bool] = False
    keys: ClassVar[frozenset[str]] = frozenset()
    usual: ClassVar[Fusion] = Fusion()
    wraps_timm: ClassVar[bool] = False
    papers: ClassVar[tuple[str, ...]] = ()
    printed_rate: ClassVar[float | None] = None

    @classmethod
    @abstractmethod
    def names(cls) -> list[str]:
        """List the timm names that it is built by."""

    @classmethod
    def create(cls, name: str, **arguments: Any) -> Backbone:
        """Build it by one of its names, as `create_network` does."""
        model = timm.create_model(name, **arguments)
        assert isinstance(model, cls)
        return model

    @classmethod
    def recognizes(cls, weights: Mapping[str, Any]) -> bool:
        """Return whether weights, by name, are those of such a network."""
        return any(str(name).startswith(f"{cls.layers_name}.") for name in weights)

    @classmethod
    def keys_of(cls, weights: Mapping[str, Any]) -> dict[str, object]:
        """Return what weights say of its own `keys`, by these; None where they do not say it."""
        return {}

    @classmethod
    def check_fusion(cls, fusion: Fusion) -> None:
        """Raise ConfigError, with the name of the field at fault, for what networks of this kind cannot do."""
        if fusion.place not in cls.places:
            raise ConfigError(
                f"place is {fusion.place!r}{near_miss(fusion.place, cls.places)}, where {cls.kind} reduces no tokens; "
                f"allowed: {', '.join(cls.places)}",
                "place",
            )
        if fusion.proportional and not cls.has_attention:
            raise ConfigError(
                f"proportional is about attention, and {cls.kind} has none; leave it out, or choose a transformer",
                "proportional",
            )
        if lacking := sorted(fusion.needs - cls.places[fusion.place]):
            able = [place for place, known in cls.places.items() if fusion.needs <= known]
            raise ConfigError(
                f"rule {fusion.rule!r} needs {', '.join(lacking)} of the tokens, which {cls.kind} does not have at "
                f"{fusion.place}; choose another rule{f', or place={able[0]}' if able else ', or another model'}",
                "rule",
            )

    @classmethod
    def fusion_of(cls, schedule: Sequence[int] | str | None, settings: Mapping[str, Any]) -> Fusion:
        """Return how a network is to reduce tokens.

        Args:
            schedule: tokens to remove in each layer, None for none; or the name of a strategy.
            settings: fields of `Fusion`, with or without "fusion_" before them; those that are missing are as usual.
        """
        fields = {name.removeprefix(_FUSION): value for name, value in settings.items()}
        if isinstance(schedule, str):
            fields["strategy"] = schedule
        fusion = cls.usual.changed(**fields)
        return fusion if schedule is None or isinstance(schedule, str) else with_schedule(fusion, schedule)

    @property
    @abstractmethod
    def depth(self) -> int:
        """Number of layers."""

    @property
    @abstractmethod
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images, in pixels."""

    @property
    @abstractmethod
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches."""

    @property
    @abstractmethod
    def in_chans(self) -> int:
        """Channels of the images."""

    @property
    @abstractmethod
    def special(self) -> tuple[int, ...]:
        """Places of the special tokens, which never fuse, in the sequence that enters the first layer."""

    @abstractmethod
    def get_classifier(self) -> nn.Module:
        """Return the classifier."""

    @abstractmethod
    def embed(self, x: Tensor) -> Any:
        """Turn images into the stream that enters the first layer."""

    @abstractmethod
    def layer(
        self, index: int, stream: Any, tokens: Tokens, reduction: Reduction | None
    ) -> tuple[Any, Tokens, TokenMap | None]:
        """Compute one layer, which calls `reduction`, where there is one, at its place.

        Returns the stream that it leaves, and what `Reduction` returned of tokens and map.
        """

    @abstractmethod
    def normed(self, stream: Any) -> Tensor:
        """Return what a layer leaves, behind the final norm (b, l, d)."""

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
    def set_fusion(self, fusion: Sequence[int] | Fusion, **changes: Any) -> None:
        """Reduce tokens in another way from now on.

        Args:
            fusion: tokens to remove in each layer; or all settings, with the schedule that they come to here.
            changes: fields of `Fusion` to change, such as order="tome"; None leaves one as it is.

        Raises:
            ConfigError: something does not fit; nothing has changed then.
        """
        settings = fusion if isinstance(fusion, Fusion) else with_schedule(self.settings, fusion)
        settings = settings.changed(**changes)
        self.check_fusion(settings)
        schedule = settings.schedule(self.depth, self.num_tokens, self.protected)
        self.settings, self.fusion = settings, schedule

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
        mark: Callable[[], None] | None = None,
    ) -> Run:
        """Pass images (b, in_chans, height, width) through the layers.

        Args:
            x: images.
            choose: says what each layer removes this once, instead of the schedule.
            taken: layers that keep what they leave.
            depth: layers to run; None for all.
            mark: called before the first layer and after each.
        """
        stream, tokens = self.embed(x), Tokens(self.special, None)
        maps, kept = [], {}
        if mark is not None:
            mark()
        for index, r in enumerate(self.fusion[:depth]):
            reduction = None
            if r or choose is not None:
                reduction = Reduction(self.settings, r, self.grid_size, choose)
            stream, tokens, token_map = self.layer(index, stream, tokens, reduction)
            maps.append(token_map)
            if index in taken:
                kept[index] = stream
            if mark is not None:
                mark()
        return Run(stream, tokens, maps, kept)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Any:
        """Classify images (b, in_chans, height, width): logits (b, num_classes)."""
        return self.classify(self.run(x))

    def forward_features(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b l d"]:
        """Compute normed features of the last layer for each token of the first one, (b, num_tokens, embed_dim).

        They lie as in a network that does not fuse: patches row by row, class token and the like where they are put.
        Each patch has the features of the token that holds it in the end (where tokens are pruned: of the one that it
        was most similar to when it was dropped).
        """
        run = self.run(x)
        return self._final(run, self._held(run.maps, x))

    def forward_intermediates(
        self,
        x: Float[Tensor, "b c h w"],
        indices: Indices = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Intermediates | tuple[Tensor, Intermediates]:
        """Compute features of several layers as maps over the image, as timm's models give them.

        Those of a layer are what the next one reads before it norms and fuses (a Vim's output with the residual stream
        that it is added to; in training without what drop_path drops of it). Each patch has the features of the token
        that holds it after that layer. They are of the dtype of the weights, normed ones as in `forward_features`.

        Args:
            x: images (b, in_chans, height, width).
            indices: layers from 0 (negative: from the end), a number of last layers, or None for all.
            return_prefix_tokens: give pairs, of the patches' features and of the other tokens', such as a class
                token's (b, 1, embed_dim); where there are no others as if this were False.
            norm: apply the final norm to each.
            stop_early: do not run the layers behind the last that is asked for.
            output_fmt: "NCHW": (b, embed_dim, rows, columns); "NLC": (b, patches, embed_dim), row by row.
            intermediates_only: leave out the final features.

        Returns:
            The final features, as `forward_features` has them (with `stop_early` of the layer that was run last), and
            the features of the layers, in the order of the layers.

        Raises:
            ConfigError: there is no such layer, or no such format.
        """
        check_choice("output_fmt", output_fmt, FORMATS)
        layers = chosen_layers(self.depth, indices)
        run = self.run(x, taken=layers, depth=max(layers) + 1 if stop_early else None)
        held = self._held(run.maps, x)
        found: list = []
        for layer, stream in run.taken.items():
            features = _unfused(self.normed(stream) if norm else self.features_of(stream), held[layer])
            patches = features[:, self.patch_places(x.device)] if self.special else features
            spread = as_map(patches, self.grid_size) if output_fmt == "NCHW" else patches
            found.append((spread, features[:, list(self.special)]) if return_prefix_tokens and self.special else spread)
        if intermediates_only:
            return found
        return self._final(run, held), found

    def patch_places(self, device: torch.device) -> Int[Tensor, " n"]:
        """Return the places of the patches in the sequence that enters the first layer."""
        places = torch.arange(self.num_patches, device=device)
        for special in sorted(self.special):
            places = places + (places >= special)
        return places

    @torch.no_grad()
    def trace(self, x: Float[Tensor, "b c h w"]) -> tuple[Int[Tensor, "b n"], ...]:
        """Return which token holds each patch: for each layer, places (b, patches) in the sequence after its fusion.

        A pruned patch is held by the token that it was most similar to.
        """
        return trace(self.run(x).maps, self.patch_places(x.device).expand(x.shape[0], -1))

    @torch.no_grad()
    def not_pruned(self, x: Float[Tensor, "b c h w"]) -> tuple[Bool[Tensor, "b n"], ...]:
        """Return whether each patch has not been pruned: for each layer (b, patches), after its fusion."""
        return not_pruned(self.run(x).maps, self.patch_places(x.device).expand(x.shape[0], -1))

    @torch.no_grad()
    def similarities(self, x: Float[Tensor, "b c h w"]) -> list[Similarity]:
        """Measure how similar the tokens are that enter each layer's fusion, on what the layer measures it on."""
        found: list[Similarity] = []

        def choose(seen: LayerTokens) -> int:
            found.append(
                Similarity(closest_cosines(seen.metric, seen.protected), mean_cosine(seen.metric, seen.protected))
            )
            return self.fusion[len(found) - 1]

        self.run(x, choose)
        return found

    @torch.no_grad()
    def adapted_fusion(self, x: Float[Tensor, "b c h w"], budget: int) -> Adapted:
        """Work out where these images would spend a budget of tokens, as `famba.fusion.schedules` says; change nothing.

        In the mode that the model is in, which should be eval.
        """

        def counts_at(threshold: float) -> list[int]:
            counts = []

            def choose(seen: LayerTokens) -> int:
                counts.append(similar_pairs(seen.metric, seen.protected, threshold))
                return counts[-1]

            self.run(x, choose)
            return counts

        return spend(counts_at, self.num_patches, budget)

    def special_rows(self, rows: int, cls_position: str | None) -> tuple[int, ...]:
        """Return which of the rows of a position embedding are of special tokens; the others are of patches.

        Args:
            rows: of a file, whose network may have had more patches or fewer.
            cls_position: where its class token stood; None as here.
        """
        return self.special

    def timm_arguments(self) -> dict[str, Any]:
        """Return the arguments of timm.create_model that make its shape, as far as its configuration does not."""
        return {"img_size": one_number(self.image_size)}

    def check_num_tokens(self, x: Tensor) -> None:
        """Raise ConfigError where x (b, l, d) is not shaped as `forward_features` returns it."""
        if x.shape[1] != self.num_tokens:
            raise ConfigError(
                f"forward_head was given {x.shape[1]} tokens per image; allowed: what forward_features returns, "
                f"{self.num_tokens} tokens per image"
            )

    def check_mean(self) -> None:
        """Raise ConfigError where the mean over tokens counts them, which features of patches do not tell."""
        if any(self.fusion) and not self.settings.counts_patches:
            raise ConfigError(
                "this model takes the mean over its tokens, however many patches each holds, which the features of "
                "patches do not tell; call the model itself for logits, or fuse with weighting='size', or choose a "
                "model that reads a class token"
            )

    def _held(self, maps: list[TokenMap | None], x: Tensor) -> list[Tensor | None]:
        """Return which token holds each of the first layer's, (b, num_tokens) a layer; None while none has fused."""
        first = torch.arange(self.num_tokens, device=x.device).expand(x.shape[0], -1)
        held: list[Tensor | None] = []
        has_fused = False
        for token_map, places in zip(maps, trace(maps, first), strict=True):
            has_fused = has_fused or token_map is not None
            held.append(places if has_fused else None)
        return held

    def _final(self, run: Run, held: list[Tensor | None]) -> Tensor:
        return _unfused(self.normed(run.stream), held[-1] if held else None)


def _unfused(features: Tensor, held: Tensor | None) -> Tensor:
    return features if held is None else unfuse(features, held)


def one_number(size: tuple[int, int]) -> int | list[int]:
    """Return one number for a square, else height and width."""
    return size[0] if size[0] == size[1] else list(size)


def with_schedule(settings: Fusion, schedule: Sequence[int]) -> Fusion:
    """Return settings that remove these numbers of tokens in the layers."""
    return replace(settings, strategy=CUSTOM, budget=tuple(schedule), layers=None, adapt_at=None, adapt_images=None)


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
    """Return the kind of network that a timm name is of, with or without a tag of pretrained weights.

    Raises ConfigError for a name that none has.
    """
    for kind in BACKBONES:
        if name.split(".")[0] in kind.names():
            return kind
    raise ConfigError(
        f"unknown model.name {name!r}{near_miss(name, network_names())}; allowed: "
        + "; ".join(f"{kind.kind}: {_listed(kind.names())}" for kind in BACKBONES),
        "name",
    )


def _listed(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def create_network(name: str, **arguments: Any) -> Backbone:
    """Build a network by its timm name.

    Args:
        name: one of `network_names`, with or without a tag of pretrained weights. A kind of network is found here once
            its class is registered by `register_backbone`.
        arguments: as timm.create_model takes them. fusion is the schedule (None for no fusion) or the name of a
            strategy, and every other field of `famba.fusion.Fusion` can be given with "fusion_" before it.

    Raises:
        ConfigError: what does not fit.
    """
    return backbone_of(name).create(name, **arguments)


def chosen_layers(depth: int, indices: Indices) -> list[int]:
    """Return the layers, counted from 0, that `indices` mean in a model of `depth` layers.

    Negative ones count from the end; the order is that of `indices`.

    Raises:
        ConfigError: there is no such layer, or none is asked for.
    """
    if indices is None:
        return list(range(depth))
    if isinstance(indices, int) and not isinstance(indices, bool):
        if not 1 <= indices <= depth:
            raise ConfigError(f"indices is {indices}, a number of last layers; allowed: 1 to {depth}", "indices")
        return list(range(depth - indices, depth))
    listed = list(indices) if isinstance(indices, Sequence) else [indices]
    known = [i for i in listed if isinstance(i, int) and not isinstance(i, bool) and -depth <= i < depth]
    if not listed or known != listed:
        raise ConfigError(
            f"indices is {indices!r}; allowed: a list of layers from 0 to {depth - 1} (or from -{depth} to -1, counted "
            f"from the end), how many of the last ones, 1 to {depth}, or None for all",
            "indices",
        )
    return [i % depth for i in known]


def as_map(patches: Float[Tensor, "b n d"], grid: tuple[int, int]) -> Float[Tensor, "b d h w"]:
    """Lay patches out over the image: (b, h * w, d), row by row, to (b, d, h, w), contiguous."""
    return patches.transpose(1, 2).reshape(patches.shape[0], patches.shape[2], *grid).contiguous()
