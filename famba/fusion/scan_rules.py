"""Choose tokens by the scan: by who is next to whom in it, or by what only a Vim has, such as its step sizes."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from famba.errors import ConfigError
from famba.fusion.rules import LayerTokens, Layout, in_full_precision, register_rule
from famba.fusion.token_map import Free, TokenMap, unit
from famba.ops import match_tokens
from famba.ops.reference import compute_dtype

# Cosines are within [-1, 1]: what these are taken from comes behind all others, in this order.
_NOT_BEST, _PARTED, _GUARDED = 3.0, 8.0, 16.0


def check_guard(counts: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
    """Return a schedule, or raise ConfigError where too few tokens lie beyond those beside special ones."""
    guarded, left = 2 * layout.guard * layout.special, layout.patches
    for layer, count in enumerate(counts):
        # Guarded tokens part the others: of each part, one stays.
        others = left - guarded
        most = max(0, min(others // 2, others - layout.special - 1)) if guarded else left // 2
        if count > most:
            told = f"where up to {guarded} of the {left} tokens may stand beside special ones (guard={layout.guard})"
            told = f"{told}; at most {most} of the others can go in one layer. Lower the budget, or the guard"
            raise ConfigError(f"layer {layer} removes {count} tokens {told}", "budget")
        left -= count
    return counts


@register_rule("neighbours", orders=["sequence"], guards=True, plan=check_guard)
def neighbours(tokens: LayerTokens, r: int) -> TokenMap:
    """Reduce neighbours in the scan, after STM (arXiv 2509.22691), of which we know the abstract alone.

    Each token is paired with the more similar of its two neighbours by cosine, in equal cases the one before it. The r
    most similar of these pairs fuse, of equal ones the first. Tokens in a chain of pairs become one, at the place of
    the first of them; where tokens are pruned, this first one stays. Tokens that have fewer than `guard` others between
    themselves and a special token are left alone. Two tokens with a special one between them are paired only where
    nothing else is left.
    """
    free = tokens.free
    units = unit(free.take(tokens.metric))
    similarity = (units[:, 1:] * units[:, :-1]).sum(2).nan_to_num(-1.0)
    if free.others is not None:
        similarity = similarity - _PARTED * (free.places.diff(dim=1) > 1)
    if tokens.guard and free.count < free.length:
        guarded = (free.places.unsqueeze(2) - free.special().unsqueeze(1)).abs().amin(2) <= tokens.guard
        similarity = similarity - _GUARDED * (guarded[:, 1:] | guarded[:, :-1])
    before = F.pad(similarity, (1, 0), value=-torch.inf)[:, :-1]
    behind = F.pad(similarity, (0, 1), value=-torch.inf)[:, 1:]
    is_best = (similarity > before) | (similarity >= behind)  # for one of its two tokens, or both
    chosen = (similarity - _NOT_BEST * ~is_best).argsort(dim=1, descending=True, stable=True)[:, :r]
    joins = torch.zeros(free.batch, free.count, dtype=torch.bool, device=chosen.device).scatter(1, chosen + 1, True)
    return free.join(joins, (~joins).long().cumsum(1) - 1, r, tokens.mode)


@register_rule("r_meeto", needs=["hidden"], orders=["sequence"])
def r_meeto(tokens: LayerTokens, r: int) -> TokenMap:
    """Reduce as R-MeeTo does (Shi et al. 2024, arXiv 2412.12496).

    Without the special tokens, those at even places 0, 2, ... are A, the others B. Similarity is the cosine of the
    hidden states, before they are added to the residual stream and normed. Each of A is paired with its most similar of
    B; the r most similar pairs fuse at the place of their member of B. Of equal similarities the first wins. The paper
    weighs by size (weighting="size"), and fuses before the norm; here tokens fuse at the place that `Fusion` says.
    """
    free, hidden = tokens.free, tokens.hidden
    assert hidden is not None
    places, shares, _ = match_tokens(free.take(hidden), 0, None, None, r, "sequence")
    # A token of A that shares its place has joined the one of B there.
    in_a = torch.arange(free.count, device=places.device) % 2 == 0
    return free.join(in_a & (shares < 1), places, r, tokens.mode)


@register_rule("delta", needs=["step_sizes"], orders=["sequence"])
def delta(tokens: LayerTokens, r: int) -> TokenMap:
    """Reduce the tokens of the smallest step sizes, after MTR (Ma et al. 2025, arXiv 2507.14042).

    Importance is the mean over channels of the step size, both directions added. The r least important tokens are the
    sources; the most important stay as they are; the rest are the targets. Each source joins the target of the highest
    cosine. The number of tokens that stay is r, or less where fewer than r targets would be left; we do not know the
    number in the paper.
    """
    assert tokens.step_sizes is not None
    free = tokens.free
    return _by_importance(tokens, free, tokens.step_sizes, r, slice(r, free.count - min(r, free.count - 2 * r)))


@register_rule("output", needs=["outputs"], orders=["sequence"])
def output(tokens: LayerTokens, r: int) -> TokenMap:
    """Reduce the tokens of the smallest outputs of the scans.

    Importance is the sum over channels of max(0, y) of the scan's output y, both directions added at their own tokens
    (HSA in ToP-ViM, Zhan et al. 2024, arXiv 2409.18962, which prunes the r least important). To fuse, each of these
    joins the token of the highest cosine among the more important half (UTR, Zhan et al. 2024, arXiv 2410.14725).
    """
    assert tokens.outputs is not None
    free = tokens.free
    return _by_importance(tokens, free, tokens.outputs, r, slice(free.count // 2, None))


def _by_importance(
    tokens: LayerTokens, free: Free, measured: Float[Tensor, "b l 2"], r: int, targets: slice
) -> TokenMap:
    """Let the r least important tokens join those at `targets` of the ascending order.

    Of equal importance the first in the sequence is the least important; of equal cosines the first wins.
    """
    ascending = free.take(measured.sum(2)).argsort(dim=1, stable=True)
    sources, nothing = ascending[:, :r], torch.zeros_like(ascending, dtype=torch.bool)
    is_target = nothing.scatter(1, ascending[:, targets], True)
    joins = nothing.scatter(1, sources, True)
    chosen = _closest(free.take(tokens.metric), sources, is_target)
    ranks = (~joins).long().cumsum(1) - 1
    return free.join(joins, ranks.scatter(1, sources, ranks.gather(1, chosen)), r, tokens.mode)


def _closest(
    x: Float[Tensor, "b m c"], sources: Int[Tensor, "b r"], is_target: Bool[Tensor, "b m"]
) -> Int[Tensor, "b r"]:
    """Return for each source the target of the highest cosine."""
    x = x.to(compute_dtype(x))
    rows = x.gather(1, sources.unsqueeze(2).expand(-1, -1, x.shape[2]))
    # Of the lengths those of the targets alone matter; dividing the products is cheaper than the tokens.
    scale = x.norm(dim=2).clamp(min=torch.finfo(x.dtype).tiny).reciprocal()
    with in_full_precision(x.device.type):
        cosines = (rows @ x.transpose(1, 2)) * scale.unsqueeze(1)
    return cosines.nan_to_num().masked_fill(~is_target.unsqueeze(1), -torch.inf).argmax(dim=2)
