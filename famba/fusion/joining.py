"""Tell apart the tokens that may be reduced, and make maps of which of them join which: what rules share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from famba.errors import ConfigError
from famba.fusion.token_map import Protected, TokenMap, protected_count
from famba.ops.reference import compute_dtype, free_places, take


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
        """Tell apart the tokens of a sequence (b, l, ...), or raise ConfigError for places that do not fit it."""
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
