"""Define the residual addition and RMS norm as one torch custom op."""

from jaxtyping import Float
from torch import Tensor

from famba.ops.definition import check_shapes, define, fresh
from famba.ops.reference import compute_dtype
from famba.ops.registry import backend_of


def add_rms_norm(
    x: Float[Tensor, "b l d"], residual: Float[Tensor, "b l d"] | None, weight: Float[Tensor, " d"], eps: float
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
    check_shapes("add_rms_norm", x=(x, "b l d"), residual=(residual, "b l d"), weight=(weight, "d"))
    return _norm(x, residual, weight, eps, backend_of(x))


_norm = define(
    "add_rms_norm",
    "Tensor x, Tensor? residual, Tensor weight, float eps",
    "(Tensor, Tensor)",
    run=lambda kernels, *inputs: kernels.add_rms_norm(*inputs),
    fake=lambda kernels, x, *_: (fresh(x), fresh(x, compute_dtype(x))),
)
_norm_backward = define(
    "add_rms_norm_backward",
    "Tensor dnormed, Tensor dtotal, Tensor total, Tensor weight, float eps",
    "(Tensor, Tensor)",
    run=lambda kernels, *inputs: kernels.add_rms_norm_backward(*inputs),
    fake=lambda kernels, dnormed, dtotal, total, weight, eps: (fresh(total), fresh(weight)),
)


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
