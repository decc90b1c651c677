"""Hold the inputs of the larger ops, as an op hands them to a backend, and lay tensors out as kernels read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class ScanInputs(NamedTuple):
    """Hold the inputs of a selective scan, of the shapes that `famba.ops.selective_scan` lists."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    delta_softplus: bool
    reverse: bool


class ScanGradients(NamedTuple):
    """Hold the gradients of a scan's inputs, each in its input's dtype; None for an input of None."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None

    @classmethod
    def cast(cls, inputs: ScanInputs, *grads: Tensor | None) -> ScanGradients:
        """Take gradients of any dtypes, in the order of the fields; those of inputs that are None are left out."""
        pairs: Any = zip(inputs[: len(cls._fields)], grads, strict=True)
        found: list[Any] = [None if x is None or grad is None else grad.to(x.dtype) for x, grad in pairs]
        return cls(*found)


class Direction(NamedTuple):
    """Hold the weights of one of a mixer's two scans; d channels, n states, dt_rank r.

    conv_weight (d, width), conv_bias (d,), x_weight (r + 2 n, d), dt_weight (d, r), dt_bias (d,), A (d, n), D (d,).
    """

    conv_weight: Tensor
    conv_bias: Tensor
    x_weight: Tensor
    dt_weight: Tensor
    dt_bias: Tensor
    A: Tensor
    D: Tensor


class TokenMeasures(NamedTuple):
    """Hold what a mixer's scans did with each token, forward and backward, (b, l, 2) in float32 (float64).

    step: the mean over the channels of the step size softplus(delta + bias), by which Ma et al. 2025 (arXiv 2507.14042)
    rank tokens. output: the sum over the channels of max(0, y), y being the scan's result with its skip D u and before
    its gate, as Zhan et al. 2024 (arXiv 2409.18962) rank them.
    """

    step: Tensor
    output: Tensor

    @classmethod
    def of(cls, measures: Tensor) -> TokenMeasures:
        """Take them as an op has them: (2, 2, b, l), of each measure both directions."""
        return cls(*measures.movedim(1, -1))


class MixerInputs(NamedTuple):
    """Hold the inputs of a mixer: x (b, l, d_model), in_weight (2 d, d_model), out_weight (d_out, d) or None."""

    x: Tensor
    in_weight: Tensor
    forward: Direction
    backward: Direction
    out_weight: Tensor | None

    @classmethod
    def of(cls, given: Sequence[Any]) -> MixerInputs:
        """Take what `flat` returns."""
        x, in_weight, *sides, out_weight = given
        weights = len(Direction._fields)
        return cls(x, in_weight, Direction(*sides[:weights]), Direction(*sides[weights:]), out_weight)

    def flat(self) -> tuple[Tensor | None, ...]:
        """Return all tensors in their order, as an op takes and returns them."""
        return self.x, self.in_weight, *self.forward, *self.backward, self.out_weight

    @property
    def directions(self) -> tuple[Direction, Direction]:
        """Return the weights of the scan forward and of that backward."""
        return self.forward, self.backward


def even_rows(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return x (b, l, c) in a dtype, else in its own, with contiguous rows at equal distances, over images too."""
    x = x.to(x.dtype if dtype is None else dtype)
    rows = x.stride(1)
    even = x.stride(2) == 1 and x.stride(0) == x.shape[1] * rows and rows >= x.shape[2]
    # Not `contiguous`: where a size is 1 it may leave strides that are no distance between rows.
    return x if even else x.clone(memory_format=torch.contiguous_format)


def common_dtype(*activations: Tensor | None) -> torch.dtype:
    """Return the dtype of all of these, or float32 where they differ: nothing is rounded to the coarsest."""
    dtypes = {x.dtype for x in activations if x is not None}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def parameter(x: Tensor) -> Tensor:
    """Return what is no activation as kernels read it: float32 and contiguous."""
    return x.to(torch.float32).contiguous()


def optional_parameter(x: Tensor | None) -> Tensor | None:
    """Return the same, or None for None."""
    return None if x is None else parameter(x)


def flatten(x: Tensor) -> Tensor:
    """Return (b, l, c) as (b l, c), the rows of a product."""
    return x.reshape(x.shape[0] * x.shape[1], x.shape[2])


def as_tokens(rows: Tensor, like: Tensor) -> Tensor:
    """View (b l, c) as (b, l, c), for the b and l of another tensor."""
    return rows.view(like.shape[0], like.shape[1], rows.shape[1])
