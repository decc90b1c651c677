"""How similar tokens are: what fusing goes by, as a number."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from famba.ops.reference import deal


def cosines(metric: Float[Tensor, "b l c"]) -> Float[Tensor, "b l l"]:
    """Cosine of every token with every other, in float32 at least."""
    unit = F.normalize(metric.to(torch.promote_types(metric.dtype, torch.float32)), dim=-1)
    return unit @ unit.transpose(1, 2)


def closest_cosines(metric: Float[Tensor, "b l c"], protected: int | Tensor | None) -> Float[Tensor, "b a"]:
    """Cosine of each token of set A with its closest of set B, the sets dealt as in `famba.fusion.match`.

    Args:
        metric: what similarity is measured on (b, l, c).
        protected: place of a token that never fuses, an int or per image (b,); None where all may fuse.

    Returns:
        (b, a), descending in each row: the similarity of the pairs in the order in which they would fuse. a is half of
        the tokens that may fuse.
    """
    batch, length, _ = metric.shape
    in_a, in_b = (places.expand(batch, -1) for places in deal(0, _guarded(protected, metric), length, metric.device))
    between = cosines(metric).gather(1, in_a.unsqueeze(2).expand(-1, -1, length))
    between = between.gather(2, in_b.unsqueeze(1).expand(-1, in_a.shape[1], -1))
    return between.amax(2).sort(dim=1, descending=True).values


def mean_cosine(metric: Float[Tensor, "b l c"], protected: int | Tensor | None) -> Float[Tensor, " b"]:
    """Mean cosine of all pairs of different tokens that may fuse, (b,); NaN where there is but one.

    Arguments as of `closest_cosines`.
    """
    unit = F.normalize(metric.to(torch.promote_types(metric.dtype, torch.float32)), dim=-1)
    summed, count = unit.sum(1), metric.shape[1]
    if (guarded := _guarded(protected, metric)) is not None:
        places = guarded.expand(metric.shape[0], 1).unsqueeze(2).expand(-1, -1, metric.shape[2])
        summed, count = summed - unit.gather(1, places)[:, 0], count - 1
    # The square of the sum holds every pair twice, and each token with itself, which is 1.
    return (summed.square().sum(1) - count) / (count * (count - 1))


def _guarded(protected: int | Tensor | None, metric: Tensor) -> Tensor | None:
    return None if protected is None else torch.as_tensor(protected, device=metric.device).reshape(-1, 1)
