"""Map the tokens of a sequence to those that are left, and patches to the tokens that hold them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from famba.errors import ConfigError
from famba.ops import fuse_tokens
from famba.ops.reference import compute_dtype, free_places, group_shares, take

Protected = int | Sequence[int] | Tensor | None
"""Places of tokens that are never reduced: one, several, or per image a tensor (b,) or (b, p)."""


def protected_count(places: Protected) -> int:
    """Return how many tokens stand at some places."""
    if isinstance(places, Tensor):
        return 1 if places.ndim == 1 else places.shape[1]
    return len(places) if isinstance(places, Sequence) else int(places is not None)


class Shares(NamedTuple):
    """Hold sizes (b, l), each token's share of its place (b, l), and the places' sums of sizes (b, fused)."""

    sizes: Tensor | None
    weights: Tensor
    totals: Tensor


@dataclass(frozen=True)
class TokenMap:
    """Map each token of a sequence to its place in the fused sequence.

    places: (b, l), int64, in [0, length); tokens of equal place are fused. length: tokens left, l - r.
    before: places of the protected tokens in the sequence before. shares: of the sizes that the tokens were matched
    with, where they are known already. kept: where tokens are pruned, 1 for each that stays and 0 for each that is
    dropped (b, l), which adds nothing to the token at its place, its most similar one. None where all fuse.
    """

    places: Int[Tensor, "b l"]
    length: int
    before: Int[Tensor, "b ..."] | Sequence[int] | int | None = None
    shares: Shares | None = None
    kept: Float[Tensor, "b l"] | None = None

    @property
    def protected(self) -> Int[Tensor, "b ..."] | None:
        """The protected tokens' places in the fused sequence, (b,), or (b, p) where there are several."""
        return self.moved(self.before)

    def moved(self, places: Protected) -> Int[Tensor, "b ..."] | None:
        """Return where the tokens at some places stand in the fused sequence, (b,), or (b, p) for several."""
        if places is None or (isinstance(places, Sequence) and not places):
            return None
        if isinstance(places, int):
            return self.places[:, places]
        if isinstance(places, Sequence):
            return torch.stack([self.places[:, place] for place in places], dim=1)
        places = places.to(self.places.device)
        return self.places.gather(1, places) if places.ndim == 2 else self.places.gather(1, places[:, None])[:, 0]

    def fuse(self, x: Float[Tensor, "b l c"], sizes: Float[Tensor, "b l"] | None = None) -> Float[Tensor, "b fused c"]:
        """Average the tokens of each place; where tokens are pruned, pass on the others as they are.

        Args:
            x: tokens (b, l, c), of any floating dtype; summed in float32 at least.
            sizes: weight of each token (b, l); equal weights where None.

        Returns:
            (b, length, c) in x's dtype. A token that stands alone is passed on bit for bit.
        """
        if self.kept is not None:
            return fuse_tokens(x, self.places, self.kept.to(compute_dtype(x)), self.length)
        weights = self._shares(sizes, compute_dtype(x)).weights.to(compute_dtype(x))
        if weights.requires_grad:
            ones = torch.ones_like(weights)
            return fuse_tokens(x * weights.unsqueeze(2), self.places, ones, self.length).to(x.dtype)
        return fuse_tokens(x, self.places, weights, self.length)

    def sizes(self, sizes: Float[Tensor, "b l"] | None = None) -> Float[Tensor, "b fused"]:
        """Sum the sizes (b, l) of the tokens of each place, pruned ones left out; each counts one where None."""
        if self.kept is not None:
            kept = self.kept if sizes is None else sizes * self.kept
            return kept.new_zeros(kept.shape[0], self.length).scatter_add(1, self.places, kept)
        return self._shares(sizes, torch.float32 if sizes is None else sizes.dtype).totals

    def _shares(self, sizes: Tensor | None, dtype: torch.dtype) -> Shares:
        shares = self.shares
        # Shares worked out in float32 alone are too coarse for tokens in float64.
        if shares is not None and sizes is shares.sizes and (shares.weights.dtype == dtype or dtype != torch.float64):
            return shares
        return Shares(sizes, *group_shares(self.places, sizes, self.length, dtype))


def trace(maps: Sequence[TokenMap | None], patches: Int[Tensor, "b n"]) -> tuple[Int[Tensor, "b n"], ...]:
    """Follow patches through the maps of a model's layers, which are None where a layer fused nothing.

    patches are places (b, n) in the sequence that enters the first layer. Returns for each layer the places (b, n) of
    the tokens that hold them after its fusion. A pruned patch is held by the token that it was most similar to.
    """
    held = []
    for token_map in maps:
        patches = patches if token_map is None else token_map.places.gather(1, patches)
        held.append(patches)
    return tuple(held)


def not_pruned(maps: Sequence[TokenMap | None], patches: Int[Tensor, "b n"]) -> tuple[Bool[Tensor, "b n"], ...]:
    """Return whether patches are still in the sequence after each layer: all where tokens fuse, some where pruned."""
    is_left, found = torch.ones_like(patches, dtype=torch.bool), []
    for token_map, before in zip(maps, (patches, *trace(maps, patches)), strict=False):
        if token_map is not None and token_map.kept is not None:
            # A dropped patch lies at the place of a token that may stay: it does not come back with it.
            is_left = is_left & token_map.kept.gather(1, before).bool()
        found.append(is_left)
    return tuple(found)


def unfuse(tokens: Float[Tensor, "b l c"], places: Int[Tensor, "b n"]) -> Float[Tensor, "b n c"]:
    """Give each patch the features of the token that holds it, (b, n, c) in the tokens' dtype, bit for bit.

    The gradient of a token is the sum of those of its patches.

    Args:
        tokens: features (b, l, c) of the tokens that a layer leaves, of any dtype.
        places: the place of each patch's token (b, n), in [0, l), as `trace` returns it for that layer.

    Raises:
        ConfigError: tokens and places are not of the same images.
    """
    if tokens.shape[0] != places.shape[0]:
        raise ConfigError(
            f"tokens of {tokens.shape[0]} images and places of {places.shape[0]}; give those of the same images"
        )
    return tokens.gather(1, places.unsqueeze(2).expand(-1, -1, tokens.shape[2]))


@dataclass(frozen=True)
class Free:
    """Hold which tokens of a sequence may be reduced; a rule numbers these m tokens from 0, in their order.

    protected: places of the others. leading: how many of these stand at the head, if all do; others: else their places
    (1 or b, p). places: of the tokens that may be reduced, ascending (1 or b, m).
    """

    protected: Protected
    batch: int
    length: int
    leading: int
    others: Tensor | None
    places: Int[Tensor, "images m"]

    @classmethod
    def of(cls, protected: Protected, x: Tensor) -> Free:
        """Find the tokens of a sequence (b, l, ...) that may be reduced; raise ConfigError for wrong places."""
        batch, length = x.shape[:2]
        split = split_protected(protected, batch, length, x.device)
        return cls(protected, batch, length, *split, free_places(*split, length, x.device))

    @property
    def count(self) -> int:
        """Number of tokens that may be reduced, m."""
        return self.places.shape[1]

    def special(self) -> Int[Tensor, "images p"]:
        """Return the places of the tokens that may not be reduced, ascending, (1 or b, p)."""
        if self.others is None:
            return torch.arange(self.leading, device=self.places.device).unsqueeze(0)
        return self.others.sort(dim=1).values

    def take(self, x: Float[Tensor, "b l *c"]) -> Float[Tensor, "b m *c"]:
        """Return what belongs to these tokens."""
        if self.others is None:
            return x[:, self.leading :]
        return take(x, self.places) if x.ndim == 3 else x.gather(1, self.places.expand(self.batch, -1))

    def put(self, free: Tensor, special: Tensor | int) -> Tensor:
        """Return values (b, l) of all tokens, given those of these tokens (b, m) and of the others (1 or b, p)."""
        if isinstance(special, int):
            special = free.new_full((1, self.length - self.count), special)
        special = special.to(free.dtype).expand(self.batch, -1)
        if self.others is None:
            return torch.cat([special, free], dim=1)
        places = torch.cat([self.special().expand(self.batch, -1), self.places.expand(self.batch, -1)], dim=1)
        values = torch.cat([special, free], dim=1)
        return torch.zeros_like(values).scatter(1, places, values)

    def join(self, joins: Bool[Tensor, "b m"], ranks: Int[Tensor, "b m"], r: int, mode: str) -> TokenMap:
        """Map r tokens to the places of others, and keep the order of all that stay.

        joins: which tokens join another, r of each image. ranks: for a token that stays its number among those that do,
        and for one that joins another that of the other. mode: "fuse", or "prune", where these r tokens are dropped.
        """
        if self.others is None:
            places = self.put(ranks + self.leading, self.special())
        else:
            order = self.put(~joins, 1).long().cumsum(1) - 1
            at = self.places.expand(self.batch, -1)
            staying = joins.int().argsort(dim=1, stable=True)[:, : self.count - r]
            stands = order.gather(1, at.gather(1, staying))
            places = self.put(stands.gather(1, ranks), order.gather(1, self.special().expand(self.batch, -1)))
        kept = self.put((~joins).float(), 1) if mode == "prune" else None
        return TokenMap(places, self.length - r, self.protected, kept=kept)


def unit(x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
    """Return vectors of length 1 in the same directions, in float32 at least."""
    return F.normalize(x.to(compute_dtype(x)), dim=-1)


def split_protected(protected: Protected, batch: int, length: int, device: torch.device) -> tuple[int, Tensor | None]:
    """Return how many protected tokens stand at the head, or else their places, (1, p) if equal for all or (b, p)."""
    if isinstance(protected, Tensor):
        # Whether the places lie in the sequence is not looked at: that would make a device wait.
        if protected.ndim not in (1, 2) or protected.shape[0] != batch or protected.is_floating_point():
            given, wanted = f"{protected.dtype} tensor of shape {tuple(protected.shape)}", f"({batch},) or ({batch}, p)"
            raise ConfigError(f"protected is a {given}; expected whole numbers of shape {wanted}")
        return 0, protected.to(device).reshape(batch, protected_count(protected))
    places = [protected] if isinstance(protected, int) else list(protected or ())
    wrong = any(isinstance(p, bool) or not 0 <= p < length for p in places)
    if wrong or len(set(places)) != len(places):
        raise ConfigError(f"protected places {places} are not distinct places of a sequence of {length} tokens")
    if all(place < len(places) for place in places):
        return len(places), None
    # Built on the device: a copy from the host would make it wait.
    return 0, torch.stack([torch.full((1,), p, device=device) for p in places], dim=1)
