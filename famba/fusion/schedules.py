"""How many tokens fuse in which layer.

A schedule is a tuple with one entry per layer: the tokens that layer removes. A strategy names the layers that fuse
(Famba-V, arXiv 2409.09808, section 3), a budget the total, which is the same for every strategy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

from famba.errors import ConfigError, near_miss

Budget = int | float | str | Sequence[int]
"""Tokens in total (int), a share of the patches (float in (0, 1)), "paper", or tokens for each layer (a list)."""

PAPER = "paper"
ADAPTIVE = "adaptive"
DECREASING = "decreasing"
# What the released code removes in each fusing layer. The totals (168, 168, 162, 162) are not matched.
_PAPER_PER_LAYER = {"all": 7, "interleaved": 14, "lower": 9, "upper": 9}


def _all(depth: int, layers: None) -> list[int]:
    return list(range(depth))


def _interleaved(depth: int, layers: None) -> list[int]:
    return list(range(1, depth, 2))


def _lower(depth: int, layers: int | None) -> list[int]:
    return list(range(_count(depth, layers)))


def _upper(depth: int, layers: int | None) -> list[int]:
    return list(range(depth - _count(depth, layers), depth))


STRATEGIES: dict[str, Callable[..., list[int]]] = {
    "all": _all,
    "interleaved": _interleaved,
    "lower": _lower,
    "upper": _upper,
    DECREASING: _all,
    ADAPTIVE: _all,
}
"""Each strategy's rule: (depth, layers) to the layers that fuse, ascending. A new strategy is one more entry.

"adaptive" begins as "all" does, until training measures where tokens are similar (`famba.fusion.adaptive`).
"""

_COUNTED = ("lower", "upper")


def _evenly(fusing: int) -> list[int]:
    return [1] * fusing


def _falling(fusing: int) -> list[int]:
    """From twice the mean in the first layer to nothing in the last, as ToMe's decreasing schedule."""
    return list(range(fusing - 1, -1, -1)) if fusing > 1 else [1]


_SPREADS = {DECREASING: _falling}


def strategy_names() -> tuple[str, ...]:
    """Names that `schedule` takes."""
    return ("none", *STRATEGIES, "custom")


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
    _check_sizes(depth, tokens, protected)
    names = strategy_names()
    if strategy not in names:
        raise ConfigError(
            f"unknown fusion strategy {strategy!r}{near_miss(strategy, names)}; allowed: {', '.join(names)}",
            "strategy",
        )
    patches = tokens - protected
    if strategy == "custom" and isinstance(budget, Sequence) and not isinstance(budget, str):
        if layers is not None:
            raise ConfigError(
                "fusion strategy 'custom' takes a list of layers, or a list of tokens per layer as budget, not both",
                "layers",
            )
        counts = tuple(budget)
        check_schedule(counts, depth, tokens, protected)
        return counts
    fusing = _fusing_layers(strategy, depth, layers)
    if budget == PAPER:
        counts = _paper_counts(strategy, depth, fusing)
        check_schedule(counts, depth, tokens, protected)
        return counts
    total = _total(budget, patches)
    shares = [] if strategy == "none" else _spread(total, len(fusing), patches, strategy)
    counts_by_layer = dict(zip(fusing, shares, strict=True))
    return tuple(counts_by_layer.get(layer, 0) for layer in range(depth))


def check_schedule(counts: Sequence[int], depth: int, tokens: int, protected: int = 1) -> None:
    """Raise ConfigError where a schedule does not fit a model of `depth` layers on `tokens` tokens."""
    if len(counts) != depth:
        raise ConfigError(f"the schedule has {len(counts)} entries, but the model has {depth} layers", "counts")
    left = tokens - protected
    for layer, count in enumerate(counts):
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ConfigError(f"layer {layer} removes {count!r} tokens; allowed: whole numbers from 0", "counts")
        if count > left // 2:
            raise ConfigError(
                f"layer {layer} removes {count} tokens of the {left} that may fuse there; "
                f"at most half of them, {left // 2}, can go in one layer",
                "counts",
            )
        left -= count


def tokens_per_layer(counts: Sequence[int], tokens: int) -> tuple[int, ...]:
    """Tokens left after each layer's fusion, of a sequence of `tokens`."""
    return tuple(tokens - removed for removed in accumulate(counts))


def _check_sizes(depth: int, tokens: int, protected: int) -> None:
    if depth < 1:
        raise ConfigError(f"depth is {depth}; allowed: 1 or more", "depth")
    if protected < 0 or tokens <= protected:
        raise ConfigError(f"{tokens} tokens of which {protected} are protected leave none to fuse")


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


def _fusing_layers(strategy: str, depth: int, layers: int | Sequence[int] | None) -> list[int]:
    if strategy == "custom":
        return _custom_layers(depth, layers)
    if strategy in _COUNTED:
        return STRATEGIES[strategy](depth, layers)
    if layers is not None:
        raise ConfigError(
            f"fusion strategy {strategy!r} takes no layers (given {layers!r}); 'lower' and 'upper' take how many, "
            "'custom' a list",
            "layers",
        )
    return [] if strategy == "none" else STRATEGIES[strategy](depth, layers)


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


def _paper_counts(strategy: str, depth: int, fusing: list[int]) -> tuple[int, ...]:
    if strategy == "none":
        return (0,) * depth
    if strategy not in _PAPER_PER_LAYER:
        raise ConfigError(
            f"budget 'paper' is known for {', '.join(_PAPER_PER_LAYER)}, not for {strategy!r}; give a number instead",
            "budget",
        )
    return tuple(_PAPER_PER_LAYER[strategy] if layer in fusing else 0 for layer in range(depth))


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
    weights = _SPREADS.get(strategy, _evenly)(fusing)
    return removals([patches, *(patches - total * part // sum(weights) for part in accumulate(weights))])


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
