"""Residual addition and RMS norm in one torch custom op."""

# Annotations are evaluated here, not postponed: torch reads an op's schema from them.
import torch
from jaxtyping import Float
from torch import Tensor

from famba.ops.checks import check_rank, check_shapes
from famba.ops.registry import backend_of, kernels


def add_rms_norm(
    x: Float[Tensor, "b l d"],
    residual: Float[Tensor, "b l d"] | None,
    weight: Float[Tensor, " d"],
    eps: float,
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b l d"]]:
    """Add to the residual stream and RMS-normalise the sum (Zhang and Sennrich 2019, arXiv 1910.07467).

    Args:
        x: (b, l, d), of any floating dtype.
        residual: (b, l, d), the stream so far; None where it begins.
        weight: scale of the normed sum (d,).
        eps: added to the mean square.

    Returns:
        The normed sum (b, l, d) in x's dtype, and the sum in float32, or float64 where x is.

    Raises:
        ConfigError: a shape, dtype or device does not fit.
        BackendError: the chosen backend does not serve x's device.
    """
    check_rank("add_rms_norm", "x", x, "(b, l, d)")
    shape = tuple(x.shape)
    check_shapes("add_rms_norm", "x", x=(x, shape), residual=(residual, shape), weight=(weight, (shape[2],)))
    return _norm(x, residual, weight, eps, backend_of(x))


@torch.library.custom_op("famba::add_rms_norm", mutates_args=())
def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        return kernels(backend).add_rms_norm(x, residual, weight, eps)


@_norm.register_fake
def _norm_shape(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    total = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=total)


@torch.library.custom_op("famba::add_rms_norm_backward", mutates_args=())
def _norm_backward(
    dnormed: Tensor, dtotal: Tensor, total: Tensor, weight: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    with torch.autocast(total.device.type, enabled=False):
        return kernels(backend).add_rms_norm_backward(dnormed, dtotal, total, weight, eps)


@_norm_backward.register_fake
def _norm_backward_shape(
    dnormed: Tensor, dtotal: Tensor, total: Tensor, weight: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    return total.new_empty(total.shape), weight.new_empty(weight.shape)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, residual, weight, ctx.eps, ctx.backend = inputs
    ctx.dtypes = x.dtype, None if residual is None else residual.dtype
    ctx.save_for_backward(output[1], weight)


def _gradients(ctx, dnormed, dtotal):  # type: ignore[no-untyped-def]
    total, weight = ctx.saved_tensors
    grad, dweight = _norm_backward(dnormed, dtotal, total, weight, ctx.eps, ctx.backend)
    x_dtype, residual_dtype = ctx.dtypes
    dresidual = None if residual_dtype is None else grad.to(residual_dtype)
    return grad.to(x_dtype), dresidual, dweight, None, None


_norm.register_autograd(_gradients, setup_context=_keep)
