"""What every network that fuses tokens can tell of itself, whatever its layers are made of."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from famba.errors import ConfigError, near_miss
from famba.fusion import TokenMap, still_there, trace, unfuse
from famba.fusion.adaptive import Adapted, similar_pairs, spend
from famba.fusion.schedules import check_schedule
from famba.fusion.similarity import closest_cosines, mean_cosine
from famba.models.dense import FORMATS, Indices, as_map, chosen_layers

Choose = Callable[[Tensor, int | Tensor | None], int]
"""From what a layer measures similarity on (b, l, c), and the class token's place, to the tokens that it removes."""

Intermediates = list[Tensor] | list[tuple[Tensor, Tensor]]
"""Of several layers each one's features, or pairs of the patches' and the other tokens'."""

Left = TypeVar("Left")
Known = TypeVar("Known")


@dataclass(frozen=True)
class Passed(Generic[Left, Known]):
    """Images behind some layers: what the last one leaves, and what is known of its tokens besides.

    maps: what each layer fused, None where nothing. taken: what those layers leave that were asked for.
    """

    leaving: Left
    tokens: Known
    maps: list[TokenMap | None]
    taken: dict[int, Left]


class Similarity(NamedTuple):
    """Of one layer's tokens: cosine of each with its closest partner (b, a), as `closest_cosines` has it; mean of all.

    mean: (b,), over all pairs of different tokens that may fuse.
    """

    closest: Tensor
    mean: Tensor


class Way(NamedTuple):
    """How a network fuses besides where: order, weighting, place and mode as in `famba.models.Vim`.

    proportional: whether attention is, as in `famba.models.apply_tome`; False where there is none.
    """

    order: str
    weighting: str
    place: str
    mode: str
    proportional: bool


class FusedNetwork(nn.Module):
    """Images to logits by layers that each remove a number of tokens.

    fusion: tokens that each layer removes. num_tokens: length of the sequence that enters the first layer; num_patches:
    how many of them may fuse. num_classes: width of the classifier. grad_checkpointing: whether layers are recomputed
    in the backward.
    """

    fusion: tuple[int, ...]
    num_tokens: int
    num_patches: int
    num_classes: int
    grad_checkpointing: bool

    @property
    def protected(self) -> int:
        """Tokens that never fuse."""
        return self.num_tokens - self.num_patches

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
    def way(self) -> Way:
        """How it fuses, in every layer alike."""

    @abstractmethod
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

        Raises ConfigError where something does not fit; nothing has changed then.
        """

    @abstractmethod
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each layer in the backward instead of keeping what it needs."""

    @abstractmethod
    def patch_places(self, device: torch.device) -> Int[Tensor, " n"]:
        """Places of the patches in the sequence that enters the first layer."""

    @abstractmethod
    def _run(
        self, x: Tensor, choose: Choose | None = None, taken: Sequence[int] = (), depth: int | None = None
    ) -> Passed[Any, Any]:
        """Pass images through the layers, or the first `depth` of them, and keep what those in `taken` leave.

        `choose`, where given, says what each layer removes this once.
        """

    @abstractmethod
    def _normed(self, leaving: Any) -> Tensor:
        """What a layer leaves, behind the final norm (b, l, d)."""

    @abstractmethod
    def _stream(self, leaving: Any) -> Tensor:
        """What a layer leaves as the next one reads it (b, l, d), in the dtype of the weights."""

    @abstractmethod
    def _parted(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of features (b, num_tokens, d) the patches' (b, patches, d), and the other tokens', None without any."""

    def forward_features(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b l d"]:
        """Normed features of the last layer for each token of the first one, (b, num_tokens, embed_dim).

        They lie as in a network that does not fuse: patches row by row, class token and the like where they are put.
        Each patch has the features of the token that holds it in the end (where tokens are pruned: of the one that it
        was most similar to when it was dropped).
        """
        passed = self._run(x)
        return self._final(passed, self._held(passed.maps, x))

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
        """Features of several layers as maps over the image, as timm's models give them.

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
        passed = self._run(x, taken=layers, depth=max(layers) + 1 if stop_early else None)
        held = self._held(passed.maps, x)
        found: list = []
        for layer, leaving in passed.taken.items():
            features = self._normed(leaving) if norm else self._stream(leaving)
            patches, others = self._parted(_unfused(features, held[layer]))
            spread = as_map(patches, self.grid_size) if output_fmt == "NCHW" else patches
            found.append((spread, others) if return_prefix_tokens and others is not None else spread)
        if intermediates_only:
            return found
        return self._final(passed, held), found

    def fused_by(self, x: Float[Tensor, "b c h w"], choose: Choose | None = None) -> list[TokenMap | None]:
        """Pass images through all layers; return what each fused, None where nothing.

        `choose`, where given, says what each layer removes this once.
        """
        return self._run(x, choose).maps

    @torch.no_grad()
    def trace(self, x: Float[Tensor, "b c h w"]) -> tuple[Int[Tensor, "b n"], ...]:
        """Which token holds each patch: for each layer, places (b, patches) in the sequence after its fusion.

        What is pruned is held by the token that it was most similar to.
        """
        return trace(self.fused_by(x), self.patch_places(x.device).expand(x.shape[0], -1))

    @torch.no_grad()
    def still_there(self, x: Float[Tensor, "b c h w"]) -> tuple[Bool[Tensor, "b n"], ...]:
        """Whether each patch has not been pruned: for each layer (b, patches), after its fusion."""
        return still_there(self.fused_by(x), self.patch_places(x.device).expand(x.shape[0], -1))

    @torch.no_grad()
    def similarities(self, x: Float[Tensor, "b c h w"]) -> list[Similarity]:
        """How similar the tokens are that enter each layer's fusion, on what the layer measures it on."""
        found: list[Similarity] = []

        def choose(metric: Tensor, cls: int | Tensor | None) -> int:
            found.append(Similarity(closest_cosines(metric, cls), mean_cosine(metric, cls)))
            return self.fusion[len(found) - 1]

        self.fused_by(x, choose)
        return found

    @torch.no_grad()
    def adapted_fusion(self, x: Float[Tensor, "b c h w"], budget: int) -> Adapted:
        """Work out where these images would spend a budget of tokens, as `famba.fusion.adaptive` says; change nothing.

        In the mode that the model is in, which should be eval.
        """

        def counts_at(threshold: float) -> list[int]:
            counts = []

            def choose(metric: Tensor, cls: int | Tensor | None) -> int:
                counts.append(similar_pairs(metric, cls, threshold))
                return counts[-1]

            self.fused_by(x, choose)
            return counts

        return spend(counts_at, self.num_patches, budget)

    def _check_fusion(self, fusion: Sequence[int], depth: int) -> None:
        check_schedule(fusion, depth, self.num_tokens, self.protected)

    def _held(self, maps: list[TokenMap | None], x: Tensor) -> list[Tensor | None]:
        """Which token holds each of the first layer's, (b, num_tokens) for each layer; None while none has fused."""
        first = torch.arange(self.num_tokens, device=x.device).expand(x.shape[0], -1)
        held: list[Tensor | None] = []
        has_fused = False
        for token_map, places in zip(maps, trace(maps, first), strict=True):
            has_fused = has_fused or token_map is not None
            held.append(places if has_fused else None)
        return held

    def _final(self, passed: Passed[Any, Any], held: list[Tensor | None]) -> Tensor:
        return _unfused(self._normed(passed.leaving), held[-1] if held else None)


def _unfused(features: Tensor, held: Tensor | None) -> Tensor:
    return features if held is None else unfuse(features, held)


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ConfigError where a named choice is none of those allowed."""
    if value not in allowed:
        raise ConfigError(f"unknown {name} {value!r}{near_miss(value, allowed)}; allowed: {', '.join(allowed)}", name)
