"""Rules: functions that choose which tokens of a layer are reduced.

`register_rule` adds one to `RULES`, from this package or another; fusion.rule=NAME chooses it. "bipartite" is ToMe's
bipartite soft matching (Bolya et al. 2023, arXiv 2210.09461, section 3), with a choice of the order of tokens; the
other rules stand in modules of their own. All are written from what the papers say, none from their code.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from famba.errors import ConfigError, check_choice
from famba.fusion.token_map import Free, Protected, Shares, TokenMap, split_protected, unit
from famba.ops import match_tokens
from famba.ops.reference import split_alternately, take

ORDERS = ("sequence", "tome")
MODES = ("fuse", "prune")
BIPARTITE = "bipartite"


@dataclass(frozen=True)
class LayerTokens:
    """Hold what a layer knows of its tokens at the place where it reduces them.

    metric: what similarity is measured on (b, l, c), as each backbone says. features: the normed tokens before the
    mixer or the attention (b, l, d). protected: places of the special tokens, which are never reduced. grid: rows and
    columns of the patches that enter the layer where the rule keeps a grid, else of those that enter the first layer.
    sizes: the weights that `TokenMap.fuse` will be given (b, l), None for equal ones. order, mode: as in `match`.
    guard: as in `Fusion`.

    The others are None where the backbone has none at this place; a rule that needs one says so when it is registered.
    hidden: what the layer before adds to the residual stream (b, l, d). mixed: output of the mixer or the attention
    (b, l, d_out). keys: of the attention (b, heads, l, c). step_sizes, outputs: of selective scans, the members of
    `famba.ops.TokenMeasures` (b, l, 2), for a scan in each direction, without gradient.
    """

    metric: Float[Tensor, "b l c"]
    features: Float[Tensor, "b l d"]
    protected: Protected
    grid: tuple[int, int]
    sizes: Float[Tensor, "b l"] | None = None
    order: str = "sequence"
    mode: str = "fuse"
    guard: int = 0
    hidden: Float[Tensor, "b l d"] | None = None
    mixed: Float[Tensor, "b l d_out"] | None = None
    keys: Float[Tensor, "b heads l k"] | None = None
    step_sizes: Float[Tensor, "b l 2"] | None = None
    outputs: Float[Tensor, "b l 2"] | None = None

    @property
    def free(self) -> Free:
        """The tokens that may be reduced."""
        return Free.of(self.protected, self.metric)


NEEDS = ("hidden", "mixed", "keys", "step_sizes", "outputs")
"""Members of `LayerTokens` that not every backbone has at every place."""

RuleFunction = Callable[[LayerTokens, int], TokenMap]


class Layout(NamedTuple):
    """Hold the shape of the sequence that enters the first layer, for rules that cannot spend every schedule.

    patches: tokens that may be reduced, special: those that may not. grid: rows and columns of patches, None where they
    are not known. guard: as in `Fusion`.
    """

    patches: int
    special: int
    grid: tuple[int, int] | None
    guard: int


Plan = Callable[[tuple[int, ...], Layout], tuple[int, ...]]
GridAfter = Callable[[tuple[int, int], int], tuple[int, int]]


class Rule(NamedTuple):
    """Hold a rule's function and what it can do, as `register_rule` says."""

    choose: RuleFunction
    needs: frozenset[str]
    measures: bool  # whether it reads what the scans did with each token
    orders: tuple[str, ...]
    modes: tuple[str, ...]
    guards: bool
    plan: Plan | None
    grid_after: GridAfter | None


RULES: dict[str, Rule] = {}
"""Rules by name."""


def register_rule(
    name: str,
    *,
    needs: Collection[str] = (),
    orders: Sequence[str] = ORDERS,
    modes: Sequence[str] = MODES,
    guards: bool = False,
    plan: Plan | None = None,
    grid_after: GridAfter | None = None,
) -> Callable[[RuleFunction], RuleFunction]:
    """Add a function to `RULES`: (tokens, r) -> map from the l tokens to l - r places.

    The function never reduces tokens at `protected`, and leaves those at the head of the sequence where they are. It is
    called without gradients. r is at most half of the tokens that are not protected.

    Args:
        name: the value of fusion.rule that chooses it.
        needs: those of `NEEDS` that it cannot do without.
        orders: those of `ORDERS` that it can keep.
        modes: those of `MODES` that it can do.
        guards: whether it leaves tokens beside special ones alone, as many as `LayerTokens.guard` says.
        plan: for a rule that cannot spend every schedule: (tokens to remove in each layer, layout) -> the nearest
            schedule of the same total that it can spend, the very same where it can spend that. It raises ConfigError,
            with "budget" as the argument, where there is none.
        grid_after: for a rule that keeps a grid: (rows and columns, r) -> rows and columns afterwards.

    Raises:
        ConfigError: the name is taken, or a need, order or mode does not exist.
    """
    if name in RULES:
        raise ConfigError(f"a rule named {name!r} is registered already; choose another name")
    for given, allowed in ((needs, NEEDS), (orders, ORDERS), (modes, MODES)):
        for one in given:
            check_choice("requirement of a rule", one, allowed)

    def register(choose: RuleFunction) -> RuleFunction:
        measures = not {"step_sizes", "outputs"}.isdisjoint(needs)
        RULES[name] = Rule(choose, frozenset(needs), measures, tuple(orders), tuple(modes), guards, plan, grid_after)
        return choose

    return register


@register_rule(BIPARTITE)
def bipartite(tokens: LayerTokens, r: int) -> TokenMap:
    """Reduce the r tokens that are most similar to another, as `match` says."""
    return match(tokens.metric, r, tokens.protected, tokens.order, tokens.sizes, tokens.mode)


def match(
    metric: Float[Tensor, "b l c"],
    r: int,
    protected: Protected = None,
    order: str = "sequence",
    sizes: Float[Tensor, "b l"] | None = None,
    mode: str = "fuse",
) -> TokenMap:
    """Choose the r tokens that are most similar to another, and the token that each joins.

    The tokens that may fuse are split alternately into two sets, A and B, beginning as if the protected tokens stood
    first (so that a class token at the head gives ToMe's even and odd places). Each of A is paired with its most
    similar of B by cosine; the r most similar pairs fuse. Of equal similarities the first in the sequence wins.
    Computes in float32 (float64 for float64 input) even under autocast, draws no gradient, and never waits for a
    device unless `protected` is a tensor on another one.

    Args:
        metric: what similarity is measured on (b, l, c).
        r: tokens to remove, at most half of those that may fuse.
        protected: place of a token that never fuses (an int, or a tensor (b,) where it differs between images), or of
            several (ints, or a tensor (b, p)); None where all may fuse.
        order: "sequence", where a fused token stands at the place of its member of B and the order is kept; or "tome",
            where what is left of A, protected tokens with it, stands before B.
        sizes: weights that `TokenMap.fuse` will be given (b, l), if known: their sums are then worked out here. They
            do not change the matching.
        mode: "fuse", or "prune", where the same tokens are dropped instead: those of A among the r pairs.

    Raises:
        ConfigError: r, protected, order or mode does not fit.
    """
    check_choice("order", order, ORDERS)
    check_choice("mode", mode, MODES)
    batch, length, _ = metric.shape
    leading, others = split_protected(protected, batch, length, metric.device)
    free = length - (leading if others is None else others.shape[1])
    if type(r) is not int or not 0 <= r <= free // 2:
        allowed = f"of {free} tokens that may fuse, 0 to {free // 2} can be removed in one layer"
        raise ConfigError(f"r is {r!r}: {allowed}", "r")
    if r == 0:
        places = torch.arange(length, device=metric.device).expand(batch, length)
        return TokenMap(places, length, protected)
    # The gradient of sizes goes through the sums that `fuse` then works out itself.
    learned = sizes is not None and sizes.requires_grad
    weighed = None if learned or mode == "prune" else sizes
    matched = match_tokens(metric, leading, others, weighed, r, order)
    if mode == "prune":
        in_a, _ = split_alternately(leading, others, length, metric.device)
        of_a = torch.zeros_like(matched[0], dtype=torch.bool).scatter(1, in_a.expand(batch, -1), True)
        # By equal weights a share below 1 is that of a token which does not stand alone.
        return TokenMap(matched[0], length - r, protected, kept=1 - (of_a & (matched[1] < 1)).float())
    return TokenMap(matched[0], length - r, protected, Shares(weighed, *matched[1:]))


def in_full_precision(kind: str) -> AbstractContextManager[Any]:
    """Leave autocast, where a kind of device is in it: tracing would note it otherwise."""
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def closest_cosines(metric: Float[Tensor, "b l c"], protected: Protected) -> Float[Tensor, "b a"]:
    """Return the cosine of each token of set A with its closest of set B, descending in each row.

    Arguments and sets are those of `match`; a is half of the tokens that may fuse.
    """
    batch, length, _ = metric.shape
    split = split_protected(protected, batch, length, metric.device)
    units = unit(metric)
    a, b = (take(units, places) for places in split_alternately(*split, length, metric.device))
    with in_full_precision(metric.device.type):
        return (a @ b.transpose(1, 2)).amax(2).sort(dim=1, descending=True).values
