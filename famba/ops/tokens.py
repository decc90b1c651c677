"""Define the matching and the fusing of tokens as torch custom ops."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from famba.errors import ConfigError
from famba.ops.definition import check_shapes, define
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
    batch = check_shapes("match_tokens", metric=(metric, "b l c"), sizes=(sizes, "b l"))["b"]
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


_MOST_PLACES = 2**31 - 1


def fuse_tokens(
    x: Float[Tensor, "b l c"], places: Int[Tensor, "b l"], weights: Float[Tensor, "b l"], length: int
) -> Float[Tensor, "b fused c"]:
    """Add up the tokens of each place, each times its weight.

    Args:
        x: tokens (b, l, c), of any floating dtype; summed in float32 at least.
        places: for each token its place in the result (b, l), int64 in [0, length); not looked at, since that would
            make a device wait.
        weights: (b, l); no gradient is drawn from them.
        length: places in the result.

    Returns:
        (b, length, c) in x's dtype. A token that stands alone with weight 1 is passed on bit for bit.

    Raises:
        ConfigError: a shape, dtype or device does not fit.
        BackendError: the chosen backend does not serve x's device.
    """
    check_shapes("fuse_tokens", x=(x, "b l c"), weights=(weights, "b l"))
    if places.shape != weights.shape or places.dtype != torch.int64 or places.device != x.device:
        raise ConfigError(
            f"fuse_tokens: places is {places.dtype} of shape {tuple(places.shape)} on {places.device}, "
            f"expected torch.int64 of shape {tuple(weights.shape)} on {x.device}"
        )
    if not 0 <= length <= _MOST_PLACES:
        raise ConfigError(f"fuse_tokens: length is {length}, expected 0 to {_MOST_PLACES}")
    return _fuse(x, places, weights.detach(), length, backend_of(x))


_fuse = define(
    "fuse_tokens",
    "Tensor x, Tensor places, Tensor weights, SymInt length",
    "Tensor",
    run=lambda kernels, *inputs: kernels.fuse_tokens(*inputs),
    fake=lambda kernels, x, places, weights, length: x.new_empty(x.shape[0], length, x.shape[2]),
)
_fuse_backward = define(
    "fuse_tokens_backward",
    "Tensor dy, Tensor places, Tensor weights",
    "Tensor",
    run=lambda kernels, *inputs: kernels.fuse_tokens_backward(*inputs),
    fake=lambda kernels, dy, places, weights: dy.new_empty(*places.shape, dy.shape[2]),
)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, places, weights, _, ctx.backend = inputs
    ctx.save_for_backward(places, weights)


def _gradients(ctx, dy):  # type: ignore[no-untyped-def]
    places, weights = ctx.saved_tensors
    return _fuse_backward(dy, places, weights, ctx.backend), None, None, None, None


_fuse.register_autograd(_gradients, setup_context=_keep)
