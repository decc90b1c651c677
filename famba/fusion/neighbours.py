"""Fuse tokens that are neighbours in the scan."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from famba.errors import ConfigError
from famba.fusion.joining import Free, unit
from famba.fusion.rules import LayerTokens, Layout, register_rule
from famba.fusion.token_map import TokenMap

# Cosines are within [-1, 1]: what these are taken from comes behind all others, in this order.
_NOT_BEST, _PARTED, _GUARDED = 3.0, 8.0, 16.0


def check_guard(counts: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
    """Return a schedule, or raise ConfigError where too few tokens lie beyond those beside special ones."""
    guarded, left = 2 * layout.guard * layout.special, layout.patches
    for layer, count in enumerate(counts):
        most = max(0, (left - guarded) // 2) if guarded else left // 2
        if count > most:
            told = f"where up to {guarded} of the {left} tokens may stand beside special ones (guard={layout.guard})"
            told = f"{told}; at most half of the others, {most}, can go in one layer. Lower the budget, or the guard"
            raise ConfigError(f"layer {layer} removes {count} tokens {told}", "budget")
        left -= count
    return counts


@register_rule("neighbours", orders=["sequence"], guards=True, plan=check_guard)
def neighbours(tokens: LayerTokens, r: int) -> TokenMap:
    """Reduce neighbours in the scan, after STM (arXiv 2509.22691), of which we know the abstract alone.

    Each token is paired with the more similar of its two neighbours by cosine, in equal cases the one before it. The r
    most similar of these pairs fuse, of equal ones the first, so that tokens in a chain of pairs all become one, at the
    place of the first of them, which is the one that stays where tokens are pruned. Tokens that have fewer than `guard`
    others between themselves and a special token are left alone. Tokens that a special one parts are paired only where
    nothing else is left.
    """
    free = tokens.free
    units = unit(free.take(tokens.metric))
    similarity = (units[:, 1:] * units[:, :-1]).sum(2).nan_to_num(-1.0)
    if free.others is not None:
        similarity = similarity - _PARTED * (free.places.diff(dim=1) > 1)
    if tokens.guard and free.count < free.length:
        guarded = _is_guarded(free, tokens.guard)
        similarity = similarity - _GUARDED * (guarded[:, 1:] | guarded[:, :-1])
    chosen = (similarity - _NOT_BEST * ~_is_best(similarity)).argsort(dim=1, descending=True, stable=True)[:, :r]
    joins = torch.zeros(free.batch, free.count, dtype=torch.bool, device=chosen.device).scatter(1, chosen + 1, True)
    return free.join(joins, (~joins).long().cumsum(1) - 1, r, tokens.mode)


def _is_best(similarity: Float[Tensor, "b pairs"]) -> Bool[Tensor, "b pairs"]:
    """Return whether a pair of neighbours is the more similar one for either of the two."""
    before = F.pad(similarity, (1, 0), value=-torch.inf)[:, :-1]
    behind = F.pad(similarity, (0, 1), value=-torch.inf)[:, 1:]
    return (similarity > before) | (similarity >= behind)


def _is_guarded(free: Free, guard: int) -> Bool[Tensor, "images m"]:
    """Return whether a token has fewer than `guard` others between itself and a special one."""
    distances = (free.places.unsqueeze(2) - free.special().unsqueeze(1)).abs()
    return distances.amin(2) <= guard
