"""Which layers' features are asked for, and features as maps over the image."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from famba.errors import ConfigError

FORMATS = ("NCHW", "NLC")

Indices = int | Sequence[int] | None
"""Layers as timm counts them: the last n for a number, those listed for several, all for None."""


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
