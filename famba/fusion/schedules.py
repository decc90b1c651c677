"""Schedules: how many tokens fuse in which layer.

A schedule is a tuple with one entry per layer: the tokens that layer removes. A strategy names the layers that fuse
(Famba-V, arXiv 2409.09808, section 3), a budget the total, which is the same for every strategy.

The strategy "adaptive" fuses a token where its cosine with its closest partner reaches a threshold, the same in every
layer: the one at which the budget is spent to the last token. Each layer removes the mean over some training images,
so that all images lose equally many and shapes stay fixed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

from torch import Tensor

from famba.errors import ConfigError, check_choice
from famba.fusion.rules import closest_cosines
from famba.fusion.token_map import Protected, protected_count

Budget = int | float | str | Sequence[int]
"""Tokens in total (int), a share of the patches (float in (0, 1)), "paper", or tokens for each layer (a list)."""

PAPER = "paper"
ADAPTIVE = "adaptive"
DECREASING = "decreasing"
# What the released code removes in each fusing layer. The totals (168, 168, 162, 162) are not matched.
_PAPER_PER_LAYER = {"none": 0, "all": 7, "interleaved": 14, "lower": 9, "upper": 9}

STRATEGIES: dict[str, Callable[..., list[int]]] = {
    "all": lambda depth, _: list(range(depth)),
    "interleaved": lambda depth, _: list(range(1, depth, 2)),
    "lower": lambda depth, layers: list(range(_count(depth, layers))),
    "upper": lambda depth, layers: list(range(depth - _count(depth, layers), depth)),
    DECREASING: lambda depth, _: list(range(depth)),
    ADAPTIVE: lambda depth, _: list(range(depth)),
}
"""Each strategy's function: (depth, layers) -> the layers that fuse, ascending. "adaptive" begins as "all" does."""

NONE, CUSTOM = "none", "custom"
COUNTED = ("lower", "upper")
"""Strategies that take how many layers fuse."""


def strategy_names() -> tuple[str, ...]:
    """Return the names that `schedule` takes."""
    return (NONE, *STRATEGIES, CUSTOM)


def schedule(
    strategy: str,
    depth: int,
    tokens: int,
    budget: Budget,
    layers: int | Sequence[int] | None = None,
    protected: int = 1,
) -> tuple[int, ...]:
    """Work out how many tokens each layer removes.

    The i-th of k fusing layers takes floor((i + 1) b / k) - floor(i b / k) of a budget b; with "decreasing" shares fall
    linearly instead. Where that is more than half of the layer's unprotected tokens, the excess moves to earlier fusing
    layers, or later ones where these are full. So every strategy removes exactly b.

    Args:
        strategy: "none", "all", "interleaved" (every second layer, from the second), "lower" (nearest the input),
            "upper" (nearest the output), "decreasing" (every layer, from twice the mean in the first to none in the
            last, as in ToMe), "adaptive" (as "all" until training measures similarity), or "custom".
        depth: number of layers.
        tokens: length of the sequence, with the protected tokens.
        budget: tokens to remove in total; as a float in (0, 1) a share of the unprotected tokens, rounded; "paper" for
            the released per-layer counts (7, 14, 9, 9), whose totals are not matched; for "custom" also a list of what
            each layer removes. "none" removes nothing, whatever the budget.
        layers: for "lower" and "upper" how many layers fuse (three quarters of the depth where None); for "custom" the
            list of layers, counted from 0 at the input.
        protected: tokens that never fuse, such as a class token.

    Raises:
        ConfigError: (a ValueError) what does not fit, and what would.
    """
    if depth < 1:
        raise ConfigError(f"depth is {depth}; allowed: 1 or more", "depth")
    if protected < 0 or tokens <= protected:
        raise ConfigError(f"{tokens} tokens of which {protected} are protected leave none to fuse")
    check_choice("fusion strategy", strategy, strategy_names(), "strategy")
    if strategy == CUSTOM and isinstance(budget, Sequence) and not isinstance(budget, str):
        if layers is not None:
            told = "takes a list of layers, or a list of tokens per layer as budget, not both"
            raise ConfigError(f"fusion strategy 'custom' {told}", "layers")
        counts = list(budget)
    else:
        fusing = fusing_layers(strategy, depth, layers)
        shares = dict(zip(fusing, _shares(budget, strategy, len(fusing), tokens - protected), strict=True))
        counts = [shares.get(layer, 0) for layer in range(depth)]
    check_schedule(counts, depth, tokens, protected)
    return tuple(counts)


def check_schedule(counts: Sequence[int], depth: int, tokens: int, protected: int = 1) -> None:
    """Raise ConfigError where a schedule does not fit a model of `depth` layers on `tokens` tokens."""
    if len(counts) != depth:
        raise ConfigError(f"the schedule has {len(counts)} entries, but the model has {depth} layers", "budget")
    left = tokens - protected
    for layer, count in enumerate(counts):
        if type(count) is not int or count < 0:
            raise ConfigError(f"layer {layer} removes {count!r} tokens; allowed: whole numbers from 0", "budget")
        if count > left // 2:
            told = f"the {left} that may fuse there; at most half of them, {left // 2}, can go in one layer"
            raise ConfigError(f"layer {layer} removes {count} tokens of {told}", "budget")
        left -= count


def tokens_per_layer(counts: Sequence[int], tokens: int) -> tuple[int, ...]:
    """Return how many of `tokens` tokens are left after each layer's fusion."""
    return tuple(tokens - removed for removed in accumulate(counts))


def _count(depth: int, layers: int | None) -> int:
    """Return how many layers fuse: three quarters of the depth, rounded half up, unless `layers` says otherwise."""
    if layers is None:
        return max(1, (3 * depth + 2) // 4)
    if type(layers) is not int or not 1 <= layers <= depth:
        raise ConfigError(f"layers is {layers!r}; allowed: 1 to {depth}, how many 'lower' and 'upper' fuse", "layers")
    return layers


def fusing_layers(strategy: str, depth: int, layers: int | Sequence[int] | None) -> list[int]:
    """Return the layers that fuse by a strategy, ascending. Raises ConfigError for `layers` that it does not take."""
    if strategy == CUSTOM:
        if not isinstance(layers, Sequence) or not layers:
            needed = f"a list of layers, such as [2, 5, 8] (given {layers!r}), or a list of tokens per layer as budget"
            raise ConfigError(f"fusion strategy 'custom' needs {needed}", "layers")
        for layer in layers:
            if type(layer) is not int or not 0 <= layer < depth or layers.count(layer) > 1:
                allowed = f"0 to {depth - 1}, counted from the input, each once"
                raise ConfigError(f"layers holds {layer!r}; allowed: {allowed}", "layers")
        return sorted(layers)
    if layers is not None and strategy not in COUNTED:
        told = f"takes no layers (given {layers!r}); 'lower' and 'upper' take how many, 'custom' a list"
        raise ConfigError(f"fusion strategy {strategy!r} {told}", "layers")
    return [] if strategy == NONE else STRATEGIES[strategy](depth, layers)


def _shares(budget: Budget, strategy: str, fusing: int, patches: int) -> list[int]:
    """Return how many of `patches` tokens each of `fusing` layers removes."""
    if budget == PAPER:
        if strategy not in _PAPER_PER_LAYER:
            known = ", ".join(name for name, count in _PAPER_PER_LAYER.items() if count)
            told = f"budget 'paper' is known for {known}, not for {strategy!r}; give a number instead"
            raise ConfigError(told, "budget")
        return [_PAPER_PER_LAYER[strategy]] * fusing
    if isinstance(budget, float) and 0 < budget < 1:
        budget = math.floor(budget * patches + 0.5)
    if type(budget) is not int or budget < 0:
        allowed = (
            "tokens in total (a whole number from 0), a share of the patches (between 0 and 1), 'paper', or for "
            "strategy 'custom' a list of tokens per layer"
        )
        raise ConfigError(f"budget is {budget!r}; allowed: {allowed}", "budget")
    largest = patches - math.ceil(patches / 2**fusing)
    if budget > largest and strategy != NONE:
        raise ConfigError(
            f"a budget of {budget} tokens does not fit: strategy {strategy!r} fuses in {fusing} layers, of {patches} "
            f"patches, at most half in each layer; the largest that fits is {largest}",
            "budget",
        )
    # "decreasing" falls from twice the mean in the first layer to nothing in the last, as in ToMe.
    falls = strategy == DECREASING and fusing > 1
    parts = range(fusing - 1, -1, -1) if falls else [1] * fusing
    return removals([patches, *(patches - budget * part // sum(parts) for part in accumulate(parts))])


def removals(left: Sequence[int]) -> list[int]:
    """Return what each layer removes, so that `left` tokens, without protected ones, are left before and after each.

    If more than half of a layer's tokens would go, the excess goes in the layers before it, and what these cannot take
    in those behind. The last of `left`, which never ascend, holds exactly if halves can reach it.
    """
    # From the last layer back: what enters a layer is at most twice what leaves it.
    possible: list[int] = []
    for wanted in reversed(left[1:]):
        possible.append(min(wanted, 2 * possible[-1]) if possible else wanted)
    # From the first layer on: what leaves it is at least half of what enters.
    reached = accumulate(reversed(possible), lambda before, n: max(n, math.ceil(before / 2)), initial=left[0])
    return [before - after for before, after in pairwise(reached)]


# A cosine is within these; halving a range of 2 twelve times tells thresholds 0.0005 apart.
_LOWEST, _HIGHEST, _HALVINGS = -1.0, 1.0, 12


class Adapted(NamedTuple):
    """Hold a schedule, tokens to remove in each layer, and the cosine that its pairs reach."""

    schedule: tuple[int, ...]
    threshold: float


def similar_pairs(metric: Tensor, protected: Protected, threshold: float) -> int:
    """Count the pairs of (b, l, c) that reach a cosine: the mean over images, rounded half up, as far as they fit."""
    closest, free = closest_cosines(metric, protected), metric.shape[1] - protected_count(protected)
    return min(math.floor((closest >= threshold).sum().item() / len(closest) + 0.5), free // 2)


def spend(counts_at: Callable[[float], Sequence[int]], free: int, budget: int) -> Adapted:
    """Find the schedule that removes exactly `budget` of `free` tokens, the pairs that are most similar.

    Args:
        counts_at: maps a threshold to what each layer removes of the pairs that reach it; more the lower it is.
        free: tokens of the sequence that may fuse.
        budget: tokens to remove, at most what is removed where every layer removes half.
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
    # Between the two closest thresholds around the budget, in proportion.
    between = (budget - sum(few)) / max(1, sum(many) - sum(few))
    removed = accumulate(a + between * (b - a) for a, b in zip(few, many, strict=True))
    left = [free, *(free - math.floor(total + 0.5) for total in removed)]
    return Adapted(tuple(removals([*left[:-1], free - budget])), low)
