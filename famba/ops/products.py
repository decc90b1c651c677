"""The weights of a mixer's matrix products, as one batched product for both directions takes them.

They are cast to the dtype of the products, stacked, and padded so that rows of 16-bit numbers begin at multiples of
16 bytes: products read such rows about twice as fast. All of a mixer's weights take one multi-tensor copy, forward and
again in the backward, so that no second copy of the weights is kept in between.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_MULTIPLE = 8


@dataclass(frozen=True)
class Columns:
    """Lay out dt, B and C among the columns that a token is projected to, for dt_rank `rank` and `states` states.

    [dt | zeros | B | C | zeros]: the zeros make the columns of dt, and all of them, a multiple of 8.
    """

    rank: int
    states: int

    @classmethod
    def of(cls, direction: Sequence[Tensor]) -> Columns:
        """Read both sizes off a direction's weights, in the order of `Direction`."""
        return cls(direction[3].shape[1], direction[5].shape[1])

    @property
    def dt(self) -> int:
        """Count the columns of dt and the zeros behind it."""
        return _rounded_up(self.rank)

    @property
    def used(self) -> int:
        """Count the columns up to the last of C."""
        return self.dt + 2 * self.states

    @property
    def width(self) -> int:
        """Count all columns."""
        return _rounded_up(self.used)

    def split(self, projected: Tensor, dim: int = -1) -> tuple[Tensor, Tensor, Tensor]:
        """Return views of dt with its zeros, B and C, which lie along `dim`."""
        dt, B, C, _ = projected.split([self.dt, self.states, self.states, self.width - self.used], dim)
        return dt, B, C

    def clear_tail(self, projected: Tensor, dim: int = -1) -> None:
        """Write zeros behind C, where nothing else writes."""
        if self.width > self.used:
            projected.narrow(dim, self.used, self.width - self.used).zero_()


class ProductWeights(NamedTuple):
    """Hold the weights of a mixer's matrix products, or their gradients, in the dtype of the products.

    into (2 d, d_model); x (2, width, d) and dt (2, d, dt) of both directions, padded as `Columns` says; out (d_out, d)
    or None.
    """

    into: Tensor
    x: Tensor
    dt: Tensor
    out: Tensor | None

    @classmethod
    def of(
        cls,
        dtype: torch.dtype,
        in_weight: Tensor,
        forward: Sequence[Tensor],
        backward: Sequence[Tensor],
        out_weight: Tensor | None,
    ) -> ProductWeights:
        """Take a mixer's weights, of any dtypes; those that need no change are not copied."""
        columns, d = Columns.of(forward), in_weight.shape[0] // 2
        zeros = in_weight.new_zeros(2 * d * (columns.width + columns.dt), dtype=dtype)
        x, dt = zeros.split([2 * d * columns.width, 2 * d * columns.dt])
        stacked = cls(
            in_weight if in_weight.dtype == dtype else _empty(in_weight, dtype),
            x.view(2, columns.width, d),
            dt.view(2, d, columns.dt),
            out_weight if out_weight is None or out_weight.dtype == dtype else _empty(out_weight, dtype),
        )
        narrow = stacked.dt if columns.dt == columns.rank else zeros.new_empty(2, d, columns.rank)
        xs, dts = ([side[i] for side in (forward, backward)] for i in (2, 3))
        pairs = stacked._pairs(narrow, in_weight, xs, dts, out_weight)
        copy_each((ours, theirs) for ours, theirs in pairs if ours is not theirs)
        if narrow is not stacked.dt:
            stacked.dt[..., : columns.rank].copy_(narrow)
        return stacked

    def as_given(
        self, in_weight: Tensor, forward: Sequence[Tensor], backward: Sequence[Tensor], out_weight: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor | None]:
        """Take these gradients apart: new tensors of the given weights' shapes and dtypes.

        Returns in_weight's, x_weight's and dt_weight's of each direction, and out_weight's.
        """
        # All are copied at once only where their numbers are adjacent, so those of dt without the zeros first.
        narrow = self.dt[..., : forward[3].shape[1]].contiguous()
        into, out = _empty(in_weight), None if out_weight is None else _empty(out_weight)
        xs, dts = ([_empty(side[i]) for side in (forward, backward)] for i in (2, 3))
        copy_each((theirs, ours) for ours, theirs in self._pairs(narrow, into, xs, dts, out))
        return into, (xs[0], dts[0]), (xs[1], dts[1]), out

    def _pairs(
        self,
        narrow: Tensor,
        in_weight: Tensor,
        x_weights: Sequence[Tensor],
        dt_weights: Sequence[Tensor],
        out_weight: Tensor | None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Pair each part of these with the part of a mixer's weights that belongs there; narrow is dt, unpadded."""
        yield self.into, in_weight
        for x, dt, x_weight, dt_weight in zip(self.x, narrow, x_weights, dt_weights, strict=True):
            rank, behind = dt_weight.shape[1], x_weight.shape[0] - dt_weight.shape[1]
            yield x[:rank], x_weight[:rank]
            yield x[self.dt.shape[2] :][:behind], x_weight[rank:]
            yield dt, dt_weight
        if self.out is not None and out_weight is not None:
            yield self.out, out_weight


def copy_each(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy tensors, given as (into, from), by one launch for those of the same two dtypes.

    torch needs one launch for each where sizes or strides of a pair differ, or numbers of a tensor are not adjacent.
    """
    # In one call torch takes one dtype for all that it writes.
    kinds: dict[tuple[torch.dtype, torch.dtype], list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for into, source in pairs:
        kinds[into.dtype, source.dtype].append((into, source))
    for alike in kinds.values():
        torch._foreach_copy_([into for into, _ in alike], [source for _, source in alike])


def _empty(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)


def _rounded_up(columns: int) -> int:
    return -(-columns // _MULTIPLE) * _MULTIPLE
