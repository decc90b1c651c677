"""Which token holds each patch, layer by layer, and each patch's features from those of its token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from famba.errors import ConfigError
from famba.fusion.matching import TokenMap


def trace(maps: Sequence[TokenMap | None], patches: Int[Tensor, "b n"]) -> tuple[Int[Tensor, "b n"], ...]:
    """Follow patches through the maps of a model's layers.

    Args:
        maps: what each layer fused, in order; None where it fused nothing.
        patches: places (b, n) of the patches in the sequence that enters the first layer.

    Returns:
        For each layer the places (b, n) of the tokens that hold the patches after its fusion. What was pruned is held
        by the token that it was most similar to.
    """
    held = []
    for token_map in maps:
        if token_map is not None:
            patches = token_map.places.gather(1, patches)
        held.append(patches)
    return tuple(held)


def still_there(maps: Sequence[TokenMap | None], patches: Int[Tensor, "b n"]) -> tuple[Bool[Tensor, "b n"], ...]:
    """Whether patches are still in the sequence after each layer: all where tokens fuse, some where they are pruned.

    Arguments as of `trace`.
    """
    there = torch.ones_like(patches, dtype=torch.bool)
    found = []
    for token_map in maps:
        if token_map is not None:
            if token_map.kept is not None:
                # A dropped patch lies at the place of a token that may stay: it does not come back with it.
                there = there & token_map.kept.gather(1, patches).bool()
            patches = token_map.places.gather(1, patches)
        found.append(there)
    return tuple(found)


def unfuse(tokens: Float[Tensor, "b l c"], places: Int[Tensor, "b n"]) -> Float[Tensor, "b n c"]:
    """Give each patch the features of the token that holds it.

    Args:
        tokens: features (b, l, c) of the tokens that a layer leaves, of any dtype.
        places: for each patch the place of its token, (b, n), in [0, l), as `trace` has it for that layer.

    Returns:
        (b, n, c) in the tokens' dtype, bit for bit. Gradients flow to the tokens: that of a token is the sum of those
        of its patches. What was pruned gets the features of the token that it was most similar to.

    Raises:
        ConfigError: tokens and places are not of the same images.
    """
    if tokens.shape[0] != places.shape[0]:
        raise ConfigError(
            f"tokens of {tokens.shape[0]} images and places of {places.shape[0]}; give those of the same images"
        )
    return tokens.gather(1, places.unsqueeze(2).expand(-1, -1, tokens.shape[2]))
