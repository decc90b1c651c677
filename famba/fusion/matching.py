"""Which tokens fuse, and what fusing does to a sequence.

Bipartite soft matching is ToMe's (Bolya et al. 2023, arXiv 2210.09461, section 3), with a choice of what order the
fused sequence keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from famba.errors import ConfigError, near_miss
from famba.ops import fuse_tokens

ORDERS = ("sequence", "tome")

Protected = int | Sequence[int] | Tensor | None
"""Places of tokens that never fuse: one, several, or per image a tensor (b,) or (b, p)."""


@dataclass(frozen=True)
class TokenMap:
    """For each token of a sequence, its place in the fused sequence.

    places: (b, l), int64, in [0, length); tokens of equal place are fused. length: tokens left, l - r.
    protected: the protected tokens' places in the fused sequence, (b,), or (b, p) where there are several.
    """

    places: Int[Tensor, "b l"]
    length: int
    protected: Int[Tensor, "b ..."] | None = None

    def fuse(self, x: Float[Tensor, "b l c"], sizes: Float[Tensor, "b l"] | None = None) -> Float[Tensor, "b fused c"]:
        """Average the tokens of each place.

        Args:
            x: tokens (b, l, c), of any floating dtype; summed in float32 at least.
            sizes: weight of each token (b, l); equal weights where None.

        Returns:
            (b, length, c) in x's dtype. A token that stands alone is passed on bit for bit.
        """
        if sizes is None:
            sizes = torch.ones(self.places.shape, dtype=_sum_dtype(x), device=x.device)
        sizes = sizes.to(_sum_dtype(x))
        # Exactly 1 for a token that stands alone.
        weights = sizes / self.sizes(sizes).gather(1, self.places)
        if not weights.requires_grad:
            return fuse_tokens(x, self.places, weights, self.length)
        weighted = x * weights.unsqueeze(2)
        return fuse_tokens(weighted, self.places, torch.ones_like(weights), self.length).to(x.dtype)

    def sizes(self, sizes: Float[Tensor, "b l"] | None = None) -> Float[Tensor, "b fused"]:
        """Sum the sizes (b, l) of the tokens of each place; each counts one where None."""
        if sizes is None:
            sizes = torch.ones(self.places.shape, device=self.places.device)
        return sizes.new_zeros(sizes.shape[0], self.length).scatter_add(1, self.places, sizes)


def check_order(order: str) -> None:
    """Raise ConfigError for an order that `match` does not know."""
    if order not in ORDERS:
        raise ConfigError(f"unknown order {order!r}{near_miss(order, ORDERS)}; allowed: {', '.join(ORDERS)}")


@torch.no_grad()
def match(metric: Float[Tensor, "b l c"], r: int, protected: Protected = None, order: str = "sequence") -> TokenMap:
    """Choose the r tokens that are most similar to another, and whom each joins.

    The tokens that may fuse are dealt out in turn to two sets, A and B, beginning as if the protected tokens stood
    first (so that a class token at the head gives ToMe's even and odd places). Each of A is drawn to its most similar
    of B by cosine; the r most similar pairs fuse. Of equal similarities the first in the sequence wins.
    Works in float32 (float64 for float64 input) even under autocast, draws no gradient, never waits for a device.

    Args:
        metric: what similarity is measured on (b, l, c).
        r: tokens to remove, at most half of those that may fuse.
        protected: the place of a token that never fuses (an int, or a tensor (b,) where it differs between images),
            or several (ints, or a tensor (b, p)); None where all may fuse.
        order: "sequence", where a fused token stands at the place of its member of B and the order is kept; or "tome",
            where what is left of A, protected tokens with it, stands before B.

    Returns:
        The map from the l tokens to l - r places.

    Raises:
        ConfigError: r, protected or order does not fit.
    """
    check_order(order)
    batch, length, _ = metric.shape
    guarded = _protected_places(protected, batch, length, metric.device)
    guards = 0 if guarded is None else guarded.shape[1]
    _check_r(r, length - guards)
    if r == 0:
        places = torch.arange(length, device=metric.device).expand(batch, length)
        return _token_map(places, length, guarded, protected)

    free = _free_places(guarded, length, metric.device)
    in_a, in_b = free[:, guards % 2 :: 2], free[:, 1 - guards % 2 :: 2]
    source, target = _closest_pairs(metric, in_a, in_b, r)

    kept = torch.ones(batch, length, dtype=torch.bool, device=metric.device).scatter_(1, source, False)
    if order == "sequence":
        places = kept.cumsum(1) - 1
    else:
        is_b = torch.zeros_like(kept).scatter_(1, in_b.expand(batch, -1), True)
        rest = length - in_b.shape[1] - r
        places = torch.where(is_b, rest + is_b.cumsum(1), (kept & ~is_b).cumsum(1)) - 1
    places = places.scatter(1, source, places.gather(1, target))
    return _token_map(places, length - r, guarded, protected)


def _closest_pairs(metric: Tensor, in_a: Tensor, in_b: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Places (b, r) of the tokens of A that fuse, and of the tokens of B that they join."""
    batch = metric.shape[0]
    with torch.autocast(metric.device.type, enabled=False):
        unit = torch.nn.functional.normalize(metric.to(_sum_dtype(metric)), dim=-1)
        similarity = _take(unit, in_a) @ _take(unit, in_b).transpose(1, 2)
    closest, partner = similarity.max(dim=2)  # of equal values the first, by torch's definition
    chosen = closest.argsort(dim=1, descending=True, stable=True)[:, :r]
    source = in_a.expand(batch, -1).gather(1, chosen)
    target = in_b.expand(batch, -1).gather(1, partner.gather(1, chosen))
    return source, target


def _token_map(places: Tensor, length: int, guarded: Tensor | None, protected: Protected) -> TokenMap:
    if guarded is None:
        return TokenMap(places, length)
    moved = places.gather(1, guarded.expand(places.shape[0], -1))
    single = isinstance(protected, int) or (isinstance(protected, Tensor) and protected.ndim == 1)
    return TokenMap(places, length, moved.squeeze(1) if single else moved)


def _protected_places(protected: Protected, batch: int, length: int, device: torch.device) -> Tensor | None:
    """Places of the protected tokens, (1, p) where equal for all images or (b, p)."""
    if protected is None:
        return None
    if isinstance(protected, Tensor):
        # Whether the places lie in the sequence is not looked at: that would make a device wait.
        if protected.ndim not in (1, 2) or protected.shape[0] != batch or protected.is_floating_point():
            raise ConfigError(
                f"protected is a {protected.dtype} tensor of shape {tuple(protected.shape)}; "
                f"expected whole numbers of shape ({batch},) or ({batch}, p)"
            )
        return protected.to(device).reshape(batch, protected.shape[1] if protected.ndim == 2 else 1)
    places = [protected] if isinstance(protected, int) else list(protected)
    if not places:
        return None
    wrong = any(isinstance(p, bool) or not 0 <= p < length for p in places)
    if wrong or len(set(places)) != len(places):
        raise ConfigError(f"protected places {places} are not distinct places of a sequence of {length} tokens")
    # Built on the device: a copy from the host would make it wait.
    return torch.stack([torch.full((1,), p, device=device) for p in places], dim=1)


def _free_places(guarded: Tensor | None, length: int, device: torch.device) -> Tensor:
    """Places of the tokens that may fuse, ascending, (1 or b, length - p)."""
    if guarded is None:
        return torch.arange(length, device=device).unsqueeze(0)
    free = torch.arange(length - guarded.shape[1], device=device).unsqueeze(0)
    for place in guarded.sort(dim=1).values.unbind(1):
        free = free + (free >= place.unsqueeze(1))
    return free


def _take(x: Tensor, places: Tensor) -> Tensor:
    """Rows of x (b, l, c) at places (1 or b, k)."""
    if places.shape[0] == 1:
        return x.index_select(1, places[0])
    return x.gather(1, places.unsqueeze(2).expand(-1, -1, x.shape[2]))


def _check_r(r: int, free: int) -> None:
    if isinstance(r, bool) or not isinstance(r, int) or not 0 <= r <= free // 2:
        raise ConfigError(f"r is {r!r}: of {free} tokens that may fuse, 0 to {free // 2} can be removed in one layer")


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
