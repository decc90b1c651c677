"""What every network that fuses tokens can tell of itself, whatever its layers are made of."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from famba.fusion import TokenMap, trace
from famba.fusion.adaptive import Adapted, similar_pairs, spend
from famba.fusion.schedules import check_schedule
from famba.fusion.similarity import closest_cosines, mean_cosine

Choose = Callable[[Tensor, int | Tensor | None], int]
"""From what a layer measures similarity on (b, l, c), and the class token's place, to the tokens that it removes."""


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
    def fused_by(self, x: Tensor, choose: Choose | None = None) -> list[TokenMap | None]:
        """Pass images through all layers; return what each fused, None where nothing.

        `choose`, where given, says what each layer removes this once.
        """

    @abstractmethod
    def patch_places(self, device: torch.device) -> Int[Tensor, " n"]:
        """Places of the patches in the sequence that enters the first layer."""

    @torch.no_grad()
    def trace(self, x: Float[Tensor, "b c h w"]) -> tuple[Int[Tensor, "b n"], ...]:
        """Which token holds each patch: for each layer, places (b, patches) in the sequence after its fusion.

        What is pruned is held by the token that it was most similar to.
        """
        return trace(self.fused_by(x), self.patch_places(x.device).expand(x.shape[0], -1))

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
