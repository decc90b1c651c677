"""Lay out the weights of a mixer's matrix products as one batched product for both directions takes them.

They are cast to the dtype of the products, stacked, and padded so that rows of 16-bit numbers begin at multiples of
16 bytes: products read such rows about twice as fast. All of a mixer's weights are copied at once, into one piece of
memory that the forward keeps for the backward, so that a step casts each weight once.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from famba.ops.definition import fresh
from famba.ops.inputs import MixerInputs

_MULTIPLE = 8


class Columns(NamedTuple):
    """Lay out dt, B and C among the columns that a token is projected to: [dt | zeros | B | C | zeros].

    dt: columns of dt and the zeros behind it, states: of B, and of C, used: up to the last of C, width: all of them.
    The zeros make `dt` and `width` multiples of 8.
    """

    dt: int
    states: int
    used: int
    width: int

    @classmethod
    def of(cls, inputs: MixerInputs, padded: bool = True) -> Columns:
        """Read the sizes off a mixer's weights; padded: with the zeros, which a CPU's products are slower with."""
        dt, states = inputs.forward.dt_weight.shape[1], inputs.forward.A.shape[1]
        dt = _rounded_up(dt) if padded else dt
        used = dt + 2 * states
        return cls(dt, states, used, _rounded_up(used) if padded else used)

    def split(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return views of dt with its zeros, B and C."""
        dt, B, C, _ = projected.split([self.dt, self.states, self.states, self.width - self.used], dim=-1)
        return dt, B, C

    def clear_tail(self, projected: Tensor) -> None:
        """Write zeros behind C, where nothing else writes."""
        if self.width > self.used:
            projected[..., self.used :].zero_()


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
    def kept_shape(inputs: MixerInputs, padded: bool = True) -> tuple[int, ...]:
        """Return the shape of what `copied` keeps, each weight at a multiple of 8 numbers."""
        return (sum(_rounded_up(math.prod(shape)) for shape in _shapes(inputs, padded)),)

    @classmethod
    def copied(cls, inputs: MixerInputs, padded: bool = True) -> tuple[ProductWeights, Tensor]:
        """Copy a mixer's weights, of any dtypes, for products in x's dtype.

        Returns them, and the memory that `kept` finds them in. Without a cast `into` and `out` are not copied.
        """
        flat = inputs.x.new_zeros(ProductWeights.kept_shape(inputs, padded))
        stacked = cls.kept(flat, inputs, padded)
        narrow, shape = stacked.dt, inputs.forward.dt_weight.shape
        if narrow.shape[1:] != shape:
            narrow = flat.new_empty(2, *shape)
        _copy_each((ours, theirs) for ours, theirs in stacked._pairs(narrow, inputs) if ours is not theirs)
        if narrow is not stacked.dt:
            stacked.dt[..., : shape[1]].copy_(narrow)
        return stacked, flat

    @classmethod
    def kept(cls, flat: Tensor, inputs: MixerInputs, padded: bool = True) -> ProductWeights:
        """Find the weights that `copied` has left in its memory."""
        shapes = _shapes(inputs, padded)
        parts = flat.split([_rounded_up(math.prod(shape)) for shape in shapes])
        x, dt, *others = (part[: math.prod(shape)].view(shape) for part, shape in zip(parts, shapes, strict=True))
        if others:
            return cls(others[0], x, dt, others[1] if len(others) > 1 else None)
        return cls(inputs.in_weight, x, dt, inputs.out_weight)

    def with_others(self, dx: Tensor, others: Iterable[Sequence[Any]], inputs: MixerInputs) -> MixerInputs:
        """Take these gradients apart, and return a mixer's, new tensors each of its input's shape and dtype.

        dx: that of x. others: for each direction those of conv_weight, conv_bias, dt_bias, A and D, of any dtypes.
        """
        # All are copied at once only where their numbers are adjacent, so those of dt without the zeros first.
        narrow = self.dt[..., : inputs.forward.dt_weight.shape[1]].contiguous()
        flat: list[Any] = [dx, fresh(inputs.in_weight)]
        for (conv_weight, conv_bias, *rest), given in zip(others, inputs.directions, strict=True):
            grads = (conv_weight, conv_bias, fresh(given.x_weight), fresh(given.dt_weight), *rest)
            flat += [grad.to(weight.dtype) for grad, weight in zip(grads, given, strict=True)]
        found = MixerInputs.of([*flat, fresh(inputs.out_weight)])
        _copy_each((theirs, ours) for ours, theirs in self._pairs(narrow, found))
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


def _shapes(inputs: MixerInputs, padded: bool) -> list[tuple[int, ...]]:
    """Return the shapes of what is copied: x, dt, and where a weight has another dtype than x also into and out."""
    d, columns, out = inputs.forward.A.shape[0], Columns.of(inputs, padded), inputs.out_weight
    shapes: list[tuple[int, ...]] = [(2, columns.width, d), (2, d, columns.dt)]
    weights = [inputs.in_weight, *([] if out is None else [out])]
    of_directions = [weight for side in inputs.directions for weight in (side.x_weight, side.dt_weight)]
    if any(weight.dtype != inputs.x.dtype for weight in (*weights, *of_directions)):
        shapes += [tuple(weight.shape) for weight in weights]
    return shapes


def _copy_each(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy tensors, given as (into, from), by one launch for those of the same two dtypes.

    torch needs one launch for each where sizes or strides of a pair differ, or numbers of a tensor are not adjacent.
    """
    # In one call torch takes one dtype for all that it writes.
    kinds: dict[tuple[torch.dtype, torch.dtype], list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for into, source in pairs:
        kinds[into.dtype, source.dtype].append((into, source))
    for alike in kinds.values():
        torch._foreach_copy_([into for into, _ in alike], [source for _, source in alike])


def _rounded_up(count: int) -> int:
    return -(-count // _MULTIPLE) * _MULTIPLE
