"""Which tokens fuse, and what fusing does to a sequence.

Bipartite soft matching is ToMe's (Bolya et al. 2023, arXiv 2210.09461, section 3), with a choice of what order the
fused sequence keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from famba.errors import ConfigError, near_miss
from famba.ops import fuse_tokens, match_tokens
from famba.ops.reference import deal, group_shares

ORDERS = ("sequence", "tome")
MODES = ("fuse", "prune")

Protected = int | Sequence[int] | Tensor | None
"""Places of tokens that never fuse: one, several, or per image a tensor (b,) or (b, p)."""


class Shares(NamedTuple):
    """Of sizes (b, l), None for all 1: each token's share of its place (b, l), and the places' sums (b, fused)."""

    of: Tensor | None
    weights: Tensor
    totals: Tensor


@dataclass(frozen=True)
class TokenMap:
    """For each token of a sequence, its place in the fused sequence.

    places: (b, l), int64, in [0, length); tokens of equal place are fused. length: tokens left, l - r.
    guarded: places of the protected tokens before, (b,), or (b, p) where there are several.
    known: shares and sums of the sizes that the tokens were matched with.
    kept: where tokens are pruned, 1 for each that stays and 0 for each that is dropped (b, l): it adds nothing to the
    token at its place, the one that it is most similar to. None where all fuse.
    """

    places: Int[Tensor, "b l"]
    length: int
    guarded: Int[Tensor, "b ..."] | Sequence[int] | int | None = None
    known: Shares | None = None
    kept: Float[Tensor, "b l"] | None = None

    @property
    def protected(self) -> Int[Tensor, "b ..."] | None:
        """The protected tokens' places in the fused sequence, (b,), or (b, p) where there are several."""
        if self.guarded is None or (isinstance(self.guarded, Sequence) and not self.guarded):
            return None
        if isinstance(self.guarded, int):
            return self.places[:, self.guarded]
        if isinstance(self.guarded, Sequence):
            return torch.stack([self.places[:, place] for place in self.guarded], dim=1)
        before = self.guarded.to(self.places.device)
        return self.places.gather(1, before) if before.ndim == 2 else self.places.gather(1, before[:, None])[:, 0]

    def fuse(self, x: Float[Tensor, "b l c"], sizes: Float[Tensor, "b l"] | None = None) -> Float[Tensor, "b fused c"]:
        """Average the tokens of each place; where tokens are pruned, pass on the others as they are.

        Args:
            x: tokens (b, l, c), of any floating dtype; summed in float32 at least.
            sizes: weight of each token (b, l); equal weights where None.

        Returns:
            (b, length, c) in x's dtype. A token that stands alone is passed on bit for bit.
        """
        if self.kept is not None:
            return fuse_tokens(x, self.places, self.kept.to(_sum_dtype(x)), self.length)
        weights = self._shares(sizes, _sum_dtype(x)).weights.to(_sum_dtype(x))
        if not weights.requires_grad:
            return fuse_tokens(x, self.places, weights, self.length)
        weighted = x * weights.unsqueeze(2)
        return fuse_tokens(weighted, self.places, torch.ones_like(weights), self.length).to(x.dtype)

    def sizes(self, sizes: Float[Tensor, "b l"] | None = None) -> Float[Tensor, "b fused"]:
        """Sum the sizes (b, l) of the tokens of each place, pruned ones left out; each counts one where None."""
        if self.kept is not None:
            kept = self.kept if sizes is None else sizes * self.kept
            return kept.new_zeros(kept.shape[0], self.length).scatter_add(1, self.places, kept)
        return self._shares(sizes, torch.float32 if sizes is None else sizes.dtype).totals

    def _shares(self, sizes: Tensor | None, dtype: torch.dtype) -> Shares:
        known = self.known
        # Shares known in float32 alone are too coarse for tokens in float64.
        if known is not None and sizes is known.of and (known.weights.dtype == dtype or dtype != torch.float64):
            return known
        return Shares(sizes, *group_shares(self.places, sizes, self.length, dtype))


def check_order(order: str) -> None:
    """Raise ConfigError for an order that `match` does not know."""
    if order not in ORDERS:
        raise ConfigError(f"unknown order {order!r}{near_miss(order, ORDERS)}; allowed: {', '.join(ORDERS)}")


def check_mode(mode: str) -> None:
    """Raise ConfigError for a mode that `match` does not know."""
    if mode not in MODES:
        raise ConfigError(f"unknown fusion mode {mode!r}{near_miss(mode, MODES)}; allowed: {', '.join(MODES)}", "mode")


def match(
    metric: Float[Tensor, "b l c"],
    r: int,
    protected: Protected = None,
    order: str = "sequence",
    sizes: Float[Tensor, "b l"] | None = None,
    mode: str = "fuse",
) -> TokenMap:
    """Choose the r tokens that are most similar to another, and whom each joins.

    The tokens that may fuse are dealt out in turn to two sets, A and B, beginning as if the protected tokens stood
    first (so that a class token at the head gives ToMe's even and odd places). Each of A is drawn to its most similar
    of B by cosine; the r most similar pairs fuse. Of equal similarities the first in the sequence wins.
    Works in float32 (float64 for float64 input) even under autocast, draws no gradient, never waits for a device, as
    long as `protected` is no tensor on another one.

    Args:
        metric: what similarity is measured on (b, l, c).
        r: tokens to remove, at most half of those that may fuse.
        protected: the place of a token that never fuses (an int, or a tensor (b,) where it differs between images),
            or several (ints, or a tensor (b, p)); None where all may fuse.
        order: "sequence", where a fused token stands at the place of its member of B and the order is kept; or "tome",
            where what is left of A, protected tokens with it, stands before B.
        sizes: what `TokenMap.fuse` will weigh the tokens by (b, l), if known by now: their sums are then worked out
            along with the matching, which they do not change.
        mode: "fuse", or "prune", where the same tokens are dropped instead: those of A among the r pairs.

    Returns:
        The map from the l tokens to l - r places.

    Raises:
        ConfigError: r, protected, order or mode does not fit.
    """
    check_order(order)
    check_mode(mode)
    batch, length, _ = metric.shape
    leading, guarded = _guards(protected, batch, length, metric.device)
    guards = leading if guarded is None else guarded.shape[1]
    _check_r(r, length - guards)
    if r == 0:
        places = torch.arange(length, device=metric.device).expand(batch, length)
        return TokenMap(places, length, protected)
    # The gradient of sizes goes through the sums that `fuse` then works out itself.
    learned = sizes is not None and sizes.requires_grad
    weighed = None if learned or mode == "prune" else sizes
    matched = match_tokens(metric, leading, guarded, weighed, r, order)
    if mode == "prune":
        in_a, _ = deal(leading, guarded, length, metric.device)
        of_a = torch.zeros_like(matched[0], dtype=torch.bool).scatter(1, in_a.expand(batch, -1), True)
        # By equal weights a share below 1 is that of a token which does not stand alone.
        return TokenMap(matched[0], length - r, protected, kept=1 - (of_a & (matched[1] < 1)).float())
    return TokenMap(matched[0], length - r, protected, Shares(weighed, *matched[1:]))


def _guards(protected: Protected, batch: int, length: int, device: torch.device) -> tuple[int, Tensor | None]:
    """Of the protected tokens how many stand at the head, or else their places, (1, p) if equal for all or (b, p)."""
    if protected is None:
        return 0, None
    if isinstance(protected, Tensor):
        # Whether the places lie in the sequence is not looked at: that would make a device wait.
        if protected.ndim not in (1, 2) or protected.shape[0] != batch or protected.is_floating_point():
            raise ConfigError(
                f"protected is a {protected.dtype} tensor of shape {tuple(protected.shape)}; "
                f"expected whole numbers of shape ({batch},) or ({batch}, p)"
            )
        return 0, protected.to(device).reshape(batch, protected.shape[1] if protected.ndim == 2 else 1)
    places = [protected] if isinstance(protected, int) else list(protected)
    wrong = any(isinstance(p, bool) or not 0 <= p < length for p in places)
    if wrong or len(set(places)) != len(places):
        raise ConfigError(f"protected places {places} are not distinct places of a sequence of {length} tokens")
    if all(place < len(places) for place in places):
        return len(places), None
    # Built on the device: a copy from the host would make it wait.
    return 0, torch.stack([torch.full((1,), p, device=device) for p in places], dim=1)


def _check_r(r: int, free: int) -> None:
    if isinstance(r, bool) or not isinstance(r, int) or not 0 <= r <= free // 2:
        raise ConfigError(f"r is {r!r}: of {free} tokens that may fuse, 0 to {free // 2} can be removed in one layer")


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
