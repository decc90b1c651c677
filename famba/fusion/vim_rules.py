"""Choose tokens by what only a Vim has: hidden states, step sizes and outputs of its scans."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from famba.fusion.joining import Free
from famba.fusion.rules import LayerTokens, register_rule
from famba.fusion.token_map import TokenMap
from famba.ops import match_tokens
from famba.ops.reference import compute_dtype


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
    cosine. As many tokens stay as they are as there are sources, fewer where fewer than r targets would be left: how
    many do in the paper is not known to us.
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
    with _in_full_precision(x.device.type):
        cosines = (rows @ x.transpose(1, 2)) * scale.unsqueeze(1)
    return cosines.nan_to_num().masked_fill(~is_target.unsqueeze(1), -torch.inf).argmax(dim=2)


def _in_full_precision(kind: str) -> AbstractContextManager[Any]:
    """Leave autocast, where a kind of device is in it: tracing would note it otherwise."""
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
