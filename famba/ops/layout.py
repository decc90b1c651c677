"""Lay tensors out as kernels and matrix products read them."""

from __future__ import annotations

import torch
from torch import Tensor


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
