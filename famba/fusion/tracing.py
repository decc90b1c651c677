"""Which token holds each patch, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Int
from torch import Tensor

from famba.fusion.matching import TokenMap


def trace(maps: Sequence[TokenMap | None], patches: Int[Tensor, "b n"]) -> tuple[Int[Tensor, "b n"], ...]:
    """Follow patches through the maps of a model's layers.

    Args:
        maps: what each layer fused, in order; None where it fused nothing.
        patches: places (b, n) of the patches in the sequence that enters the first layer.

    Returns:
        For each layer the places (b, n) of the tokens that hold the patches after its fusion.
    """
    held = []
    for token_map in maps:
        if token_map is not None:
            patches = token_map.places.gather(1, patches)
        held.append(patches)
    return tuple(held)
