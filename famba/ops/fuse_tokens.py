"""Define the fusing of tokens as a torch custom op."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from famba.errors import ConfigError
from famba.ops.checks import check_rank, check_shapes
from famba.ops.definition import define
from famba.ops.registry import backend_of

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
    check_rank("fuse_tokens", "x", x, "(b, l, c)")
    batch, tokens, _ = x.shape
    check_shapes("fuse_tokens", "x", x=(x, tuple(x.shape)), weights=(weights, (batch, tokens)))
    if places.shape != weights.shape or places.dtype != torch.int64 or places.device != x.device:
        raise ConfigError(
            f"fuse_tokens: places is {places.dtype} of shape {tuple(places.shape)} on {places.device}, "
            f"expected torch.int64 of shape {(batch, tokens)} on {x.device}"
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
