"""Lay out the weights of a mixer's matrix products as one batched product for both directions takes them.

They are cast to the dtype of the products, stacked, and padded so that rows of 16-bit numbers begin at multiples of
16 bytes: products read such rows about twice as fast. All of a mixer's weights are copied at once, into one piece of
memory that the forward keeps for the backward, so that a step casts each weight once.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from famba.ops.inputs import MixerInputs, MixerSizes

_MULTIPLE = 8


@dataclass(frozen=True)
class Columns:
    """Lay out dt, B and C among the columns that a token is projected to, for dt_rank `rank` and `states` states.

    [dt | zeros | B | C | zeros]: the zeros make the columns of dt, and all of them, a multiple of 8.
    """

    rank: int
    states: int

    @classmethod
    def of(cls, sizes: MixerSizes) -> Columns:
        """Read off a mixer's sizes."""
        return cls(sizes.rank, sizes.states)

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

    @staticmethod
    def kept_shape(sizes: MixerSizes) -> tuple[int, ...]:
        """Return the shape of what `copied` keeps."""
        return (flat_size(_shapes(sizes)),)

    @classmethod
    def copied(cls, inputs: MixerInputs) -> tuple[ProductWeights, Tensor]:
        """Copy a mixer's weights, of any dtypes, for products in x's dtype.

        Returns them, and the memory that `kept` finds them in. Without a cast `into` and `out` are not copied.
        """
        sizes = inputs.sizes
        flat = inputs.x.new_zeros(ProductWeights.kept_shape(sizes))
        stacked = cls.kept(flat, inputs)
        narrow = stacked.dt
        if narrow.shape[2] > sizes.rank:
            narrow = flat.new_empty(2, sizes.channels, sizes.rank)
        copy_each((ours, theirs) for ours, theirs in stacked._pairs(narrow, inputs) if ours is not theirs)
        if narrow is not stacked.dt:
            stacked.dt[..., : sizes.rank].copy_(narrow)
        return stacked, flat

    @classmethod
    def kept(cls, flat: Tensor, inputs: MixerInputs) -> ProductWeights:
        """Find the weights that `copied` has left in its memory."""
        sizes = inputs.sizes
        x, dt, *others = split_flat(flat, _shapes(sizes))
        if sizes.cast:
            return cls(others[0], x, dt, None if sizes.out is None else others[1])
        return cls(inputs.in_weight, x, dt, inputs.out_weight)

    def as_given(self, inputs: MixerInputs) -> MixerInputs:
        """Take these gradients apart: new tensors of the weights' shapes and dtypes, in the weights' places."""
        # All are copied at once only where their numbers are adjacent, so those of dt without the zeros first.
        narrow = self.dt[..., : inputs.sizes.rank].contiguous()
        forward, backward = (
            side._replace(x_weight=_empty(side.x_weight), dt_weight=_empty(side.dt_weight))
            for side in inputs.directions
        )
        out = None if inputs.out_weight is None else _empty(inputs.out_weight)
        found = MixerInputs(inputs.x, _empty(inputs.in_weight), forward, backward, out)
        copy_each((theirs, ours) for ours, theirs in self._pairs(narrow, found))
        return found

    def _pairs(self, narrow: Tensor, inputs: MixerInputs) -> Iterator[tuple[Tensor, Tensor]]:
        """Pair each part of these with the part of a mixer's weights that belongs there; narrow is dt, unpadded."""
        yield self.into, inputs.in_weight
        for x, dt, side in zip(self.x, narrow, inputs.directions, strict=True):
            rank, behind = side.dt_weight.shape[1], side.x_weight.shape[0] - side.dt_weight.shape[1]
            yield x[:rank], side.x_weight[:rank]
            yield x[self.dt.shape[2] :][:behind], side.x_weight[rank:]
            yield dt, side.dt_weight
        if self.out is not None and inputs.out_weight is not None:
            yield self.out, inputs.out_weight


def _shapes(sizes: MixerSizes) -> list[tuple[int, ...]]:
    """Return the shapes of what is copied: x, dt, and where the products' dtype is another also into and out."""
    d, columns = sizes.channels, Columns.of(sizes)
    shapes: list[tuple[int, ...]] = [(2, columns.width, d), (2, d, columns.dt)]
    if sizes.cast:
        shapes += [(2 * d, sizes.d_model), *([] if sizes.out is None else [(sizes.out, d)])]
    return shapes


def flat_size(shapes: Sequence[tuple[int, ...]]) -> int:
    """Count the numbers of a piece of memory for tensors of these shapes, each at a multiple of 8 numbers."""
    return sum(_rounded_up(math.prod(shape)) for shape in shapes)


def split_flat(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Return views of such memory, one of each shape."""
    parts = flat.split([_rounded_up(math.prod(shape)) for shape in shapes])
    return [part[: math.prod(shape)].view(shape) for part, shape in zip(parts, shapes, strict=True)]


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


def _empty(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _rounded_up(count: int) -> int:
    return -(-count // _MULTIPLE) * _MULTIPLE
