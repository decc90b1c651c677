"""Schedules: how many tokens fuse in which layer.

A schedule is a tuple with one entry per layer: the tokens that layer removes. A strategy names the layers that fuse
(Famba-V, arXiv 2409.09808, section 3), a budget the total, which is the same for every strategy.

The strategy "adaptive" spends the budget by how similar the tokens of each layer are: a token fuses where its cosine
with its closest partner reaches a threshold, the same threshold in every layer, and the threshold is the one at which
the budget is spent to the last token. Layers whose tokens are alike fuse many, others few or none. A layer removes the
mean over some training images, so every image of a batch loses as many and shapes stay fixed.
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
_PAPER_PER_LAYER = {"all": 7, "interleaved": 14, "lower": 9, "upper": 9}


STRATEGIES: dict[str, Callable[..., list[int]]] = {
    "all": lambda depth, _: list(range(depth)),
    "interleaved": lambda depth, _: list(range(1, depth, 2)),
    "lower": lambda depth, layers: list(range(_count(depth, layers))),
    "upper": lambda depth, layers: list(range(depth - _count(depth, layers), depth)),
    DECREASING: lambda depth, _: list(range(depth)),
    ADAPTIVE: lambda depth, _: list(range(depth)),
}
"""Each strategy's rule: (depth, layers) to the layers that fuse, ascending. A new strategy is one more entry.

"adaptive" begins as "all" does, until training measures where tokens are similar (`spend`).
"""

NONE, CUSTOM = "none", "custom"
COUNTED = ("lower", "upper")
"""Strategies that take how many layers fuse."""


def strategy_names() -> tuple[str, ...]:
    """Names that `schedule` takes."""
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
            last, as in ToMe), "adaptive" (as "all" until it is measured), or "custom".
        depth: number of layers.
        tokens: length of the sequence, protected tokens included.
        budget: tokens to remove in total; as a float in (0, 1) a share of the unprotected tokens, rounded;
            "paper" for the released per-layer counts (7, 14, 9, 9), whose totals are not matched; for "custom" also
            a list of what each layer removes. "none" removes nothing, whatever the budget.
        layers: for "lower" and "upper" how many layers fuse (three quarters of the depth where None);
            for "custom" the list of layers, counted from 0 at the input.
        protected: tokens that never fuse, such as a class token.

    Returns:
        Tokens removed in each layer, of length `depth`.

    Raises:
        ConfigError: (a ValueError) what does not fit, and what would.
    """
    if depth < 1:
        raise ConfigError(f"depth is {depth}; allowed: 1 or more", "depth")
    if protected < 0 or tokens <= protected:
        raise ConfigError(f"{tokens} tokens of which {protected} are protected leave none to fuse")
    check_choice("fusion strategy", strategy, strategy_names(), "strategy")
    if strategy == CUSTOM and _is_list(budget):
        if layers is not None:
            raise ConfigError(
                "fusion strategy 'custom' takes a list of layers, or a list of tokens per layer as budget, not both",
                "layers",
            )
        counts: list[int] = list(budget)  # type: ignore[arg-type]
    else:
        fusing, counts = fusing_layers(strategy, depth, layers), [0] * depth
        if budget == PAPER:
            shares = [_of_the_paper(strategy)] * len(fusing)
        else:
            total = _total(budget, tokens - protected)
            shares = [] if strategy == NONE else _spread(total, len(fusing), tokens - protected, strategy)
        for layer, share in zip(fusing, shares, strict=True):
            counts[layer] = share
    check_schedule(counts, depth, tokens, protected)
    return tuple(counts)


def check_schedule(counts: Sequence[int], depth: int, tokens: int, protected: int = 1) -> None:
    """Raise ConfigError where a schedule does not fit a model of `depth` layers on `tokens` tokens."""
    if len(counts) != depth:
        raise ConfigError(f"the schedule has {len(counts)} entries, but the model has {depth} layers", "budget")
    left = tokens - protected
    for layer, count in enumerate(counts):
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ConfigError(f"layer {layer} removes {count!r} tokens; allowed: whole numbers from 0", "budget")
        if count > left // 2:
            raise ConfigError(
                f"layer {layer} removes {count} tokens of the {left} that may fuse there; "
                f"at most half of them, {left // 2}, can go in one layer",
                "budget",
            )
        left -= count


def tokens_per_layer(counts: Sequence[int], tokens: int) -> tuple[int, ...]:
    """Tokens left after each layer's fusion, of a sequence of `tokens`."""
    return tuple(tokens - removed for removed in accumulate(counts))


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _count(depth: int, layers: int | None) -> int:
    """Three quarters of the depth, rounded half up, unless `layers` says otherwise."""
    if layers is None:
        return max(1, (3 * depth + 2) // 4)
    if isinstance(layers, bool) or not isinstance(layers, int):
        raise ConfigError(
            f"layers is {layers!r}; strategies 'lower' and 'upper' take how many layers fuse, a whole number", "layers"
        )
    if not 1 <= layers <= depth:
        raise ConfigError(f"layers is {layers}; allowed: 1 to {depth}, the model's depth", "layers")
    return layers


def fusing_layers(strategy: str, depth: int, layers: int | Sequence[int] | None) -> list[int]:
    """Return the layers that fuse by a strategy, ascending. Raises ConfigError for `layers` that it does not take."""
    if strategy == CUSTOM:
        return _custom_layers(depth, layers)
    if layers is not None and strategy not in COUNTED:
        raise ConfigError(
            f"fusion strategy {strategy!r} takes no layers (given {layers!r}); 'lower' and 'upper' take how many, "
            "'custom' a list",
            "layers",
        )
    return [] if strategy == NONE else STRATEGIES[strategy](depth, layers)


def _custom_layers(depth: int, layers: int | Sequence[int] | None) -> list[int]:
    if not _is_list(layers) or not layers:
        raise ConfigError(
            f"fusion strategy 'custom' needs a list of layers, such as [2, 5, 8] (given {layers!r}), "
            "or a list of tokens per layer as the budget",
            "layers",
        )
    assert isinstance(layers, Sequence)
    wrong = [n for n in layers if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n < depth]
    if wrong:
        raise ConfigError(f"layers holds {wrong[0]!r}; allowed: 0 to {depth - 1}, counted from the input", "layers")
    if len(set(layers)) != len(layers):
        raise ConfigError(f"layers names a layer twice: {list(layers)}", "layers")
    return sorted(layers)


def _of_the_paper(strategy: str) -> int:
    if strategy not in (NONE, *_PAPER_PER_LAYER):
        raise ConfigError(
            f"budget 'paper' is known for {', '.join(_PAPER_PER_LAYER)}, not for {strategy!r}; give a number instead",
            "budget",
        )
    return _PAPER_PER_LAYER.get(strategy, 0)


def _total(budget: Budget, patches: int) -> int:
    if isinstance(budget, bool) or not isinstance(budget, int | float):
        raise ConfigError(
            f"budget is {budget!r}; allowed: tokens in total (a whole number), a share of the patches "
            f"(between 0 and 1), 'paper', or for strategy 'custom' a list of tokens per layer",
            "budget",
        )
    if isinstance(budget, int):
        if budget < 0:
            raise ConfigError(f"budget is {budget}; allowed: 0 or more tokens", "budget")
        return budget
    if not 0 < budget < 1:
        raise ConfigError(
            f"budget is {budget}; as a share of the patches it lies between 0 and 1, as tokens it is whole", "budget"
        )
    return math.floor(budget * patches + 0.5)


def _spread(total: int, fusing: int, patches: int, strategy: str) -> list[int]:
    """Tokens removed in each of `fusing` layers: as the strategy and the rule of half have it, summing to `total`."""
    largest = patches - math.ceil(patches / 2**fusing)
    if total > largest:
        raise ConfigError(
            f"a budget of {total} tokens does not fit: strategy {strategy!r} fuses in {fusing} layers, of {patches} "
            f"patches, at most half in each layer; the largest that fits is {largest}",
            "budget",
        )
    parts = [1] * fusing
    if strategy == DECREASING and fusing > 1:
        # From twice the mean in the first layer to nothing in the last, as ToMe's decreasing schedule.
        parts = list(range(fusing - 1, -1, -1))
    return removals([patches, *(patches - total * part // sum(parts) for part in accumulate(parts))])


def removals(left: Sequence[int]) -> list[int]:
    """Tokens that each layer removes, so that `left` are left before the first and after each, which never ascend.

    Where more than half of a layer's tokens would go, the excess goes in the layers before it, and what these cannot
    take in those behind. These are tokens that may fuse, without the protected ones; the last of `left` holds exactly
    if it can be reached by halves.
    """
    # From the last layer back: what enters a layer is at most twice what leaves it.
    possible = [left[-1]]
    for wanted in reversed(left[:-1]):
        possible.append(min(wanted, 2 * possible[-1]))
    possible.reverse()
    # From the first layer on: what leaves it is at least half of what enters.
    possible[0] = left[0]
    for i in range(1, len(possible)):
        possible[i] = max(possible[i], math.ceil(possible[i - 1] / 2))
    return [before - after for before, after in pairwise(possible)]


# A cosine is within these; halving a range of 2 twelve times tells thresholds 0.0005 apart.
_LOWEST, _HIGHEST, _HALVINGS = -1.0, 1.0, 12


class Adapted(NamedTuple):
    """A schedule, tokens to remove in each layer, and the cosine that its pairs reach."""

    schedule: tuple[int, ...]
    threshold: float


def similar_pairs(metric: Tensor, protected: Protected, threshold: float) -> int:
    """Count the pairs of (b, l, c) that reach a cosine: the mean over images, rounded half up, as far as they fit."""
    closest = closest_cosines(metric, protected)
    free = metric.shape[1] - protected_count(protected)
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
