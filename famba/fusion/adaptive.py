"""Where to spend a budget, by how similar the tokens of each layer are.

The rule: a token fuses where its cosine with its closest partner reaches a threshold, the same threshold in every
layer, and the threshold is the one at which a budget is spent to the last token. Layers whose tokens are alike fuse
many, others few or none. What a layer removes is the mean over some training images, so every image of a batch loses
as many and shapes stay fixed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

from torch import Tensor

from famba.fusion.schedules import removals
from famba.fusion.similarity import closest_cosines

# A cosine is within these; halving a range of 2 twelve times tells thresholds 0.0005 apart.
_LOWEST, _HIGHEST, _HALVINGS = -1.0, 1.0, 12


class Adapted(NamedTuple):
    """A schedule, tokens to remove in each layer, and the cosine that its pairs reach."""

    schedule: tuple[int, ...]
    threshold: float


def similar_pairs(metric: Tensor, protected: int | Tensor | None, threshold: float) -> int:
    """How many pairs of (b, l, c) reach a cosine, the mean over images rounded half up; at most those that may fuse."""
    closest = closest_cosines(metric, protected)
    free = metric.shape[1] - (protected is not None)
    return min(math.floor((closest >= threshold).sum().item() / len(closest) + 0.5), free // 2)


def spend(counts_at: Callable[[float], Sequence[int]], free: int, budget: int) -> Adapted:
    """Find the threshold at which layers remove `budget` of `free` tokens in total, and what each removes.

    Args:
        counts_at: what each layer removes of the similar pairs at a threshold; more in total the lower it is.
        free: tokens of the sequence that may fuse.
        budget: tokens to remove, at most what is removed where every layer removes half.

    Returns:
        The schedule, whose total is exactly `budget`: between the two closest thresholds around it, in proportion.
    """
    low, high = _LOWEST, _HIGHEST
    many = list(counts_at(low))
    few = [0] * len(many)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        counts = list(counts_at(middle))
        if sum(counts) >= budget:
            low, many = middle, counts
        else:
            high, few = middle, counts
    between = (budget - sum(few)) / max(1, sum(many) - sum(few))
    removed = accumulate(a + between * (b - a) for a, b in zip(few, many, strict=True))
    left = [free, *(free - math.floor(total + 0.5) for total in removed)]
    left[-1] = free - budget
    return Adapted(tuple(removals(left)), low)
