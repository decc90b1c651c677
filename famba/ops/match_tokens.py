"""Define the matching of tokens as a torch custom op."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from famba.errors import ConfigError
from famba.ops.checks import check_rank, check_shapes
from famba.ops.definition import define
from famba.ops.reference import compute_dtype
from famba.ops.registry import Kernels, backend_of


@torch.no_grad()
def match_tokens(
    metric: Float[Tensor, "b l c"],
    leading: int,
    protected: Int[Tensor, "images p"] | None,
    sizes: Float[Tensor, "b l"] | None,
    r: int,
    order: str,
) -> tuple[Int[Tensor, "b l"], Float[Tensor, "b l"], Float[Tensor, "b fused"]]:
    """Choose r tokens that fuse with another; `famba.fusion.match` says how, and checks r and order.

    Args:
        metric: what similarity is measured on (b, l, c), of any floating dtype.
        leading: tokens at the head that never fuse.
        protected: instead of `leading`, which is 0 then, the places of tokens that never fuse, equal for all images
            (1, p) or not (b, p); None where there are no others.
        sizes: weight of each token in the token it becomes part of (b, l); equal weights where None.
        r: tokens to remove, from 1 to half of those that may fuse.
        order: "sequence" or "tome".

    Returns:
        Places (b, l) in the fused sequence, int64 in [0, l - r); each token's share of its place (b, l); the sums of
        sizes at each place (b, l - r). The latter two in float32, or float64 where metric is. No gradient is drawn.

    Raises:
        ConfigError: a shape, dtype or device does not fit.
        BackendError: the chosen backend does not serve metric's device.
    """
    check_rank("match_tokens", "metric", metric, "(b, l, c)")
    batch, length, _ = metric.shape
    check_shapes("match_tokens", "metric", metric=(metric, tuple(metric.shape)), sizes=(sizes, (batch, length)))
    if protected is not None and (protected.ndim != 2 or protected.shape[0] not in (1, batch)):
        shape = tuple(protected.shape)
        raise ConfigError(f"match_tokens: protected has shape {shape}, expected (1, p) or ({batch}, p)")
    if leading and protected is not None:
        raise ConfigError(f"match_tokens: leading is {leading} beside protected places; expected one of the two")
    return _match(metric, leading, protected, sizes, r, order, backend_of(metric))


def _shape(kernels: Kernels, metric: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    (batch, length, _), r, dtype = metric.shape, rest[3], compute_dtype(metric)
    places = metric.new_empty(batch, length, dtype=torch.int64)
    return places, metric.new_empty(batch, length, dtype=dtype), metric.new_empty(batch, length - r, dtype=dtype)


_match = define(
    "match_tokens",
    "Tensor metric, SymInt leading, Tensor? protected, Tensor? sizes, SymInt r, str order",
    "(Tensor, Tensor, Tensor)",
    run=lambda kernels, *inputs: kernels.match_tokens(*inputs),
    fake=_shape,
)


@register_flop_formula(torch.ops.famba.match_tokens)
def _match_flops(metric, leading, protected, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    batch, length, channels = metric
    return 2 * batch * match_macs(length, leading if protected is None else protected[1], channels)


def match_macs(tokens: int, protected: int, channels: int) -> int:
    """Count the multiply-adds of the similarities between the two halves of an image's tokens that may fuse."""
    free = tokens - protected
    return (free // 2) * (free - free // 2) * channels
