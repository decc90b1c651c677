"""The selective scan as a torch custom op."""

# Annotations are evaluated here, not postponed: torch reads an op's schema from them.
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from famba.ops.checks import check_rank, check_shapes
from famba.ops.registry import backend_of, kernels


def selective_scan(
    u: Float[Tensor, "b l d"],
    delta: Float[Tensor, "b l d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b l n"],
    C: Float[Tensor, "b l n"],
    D: Float[Tensor, " d"] | None = None,
    z: Float[Tensor, "b l d"] | None = None,
    delta_bias: Float[Tensor, " d"] | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
) -> Float[Tensor, "b l d"]:
    """Mamba's selective scan over the length (Gu and Dao 2023, arXiv 2312.00752, Algorithm 2).

    With delta' = softplus(delta + delta_bias) where `delta_softplus`, else delta + delta_bias:
    h[t] = exp(delta'[t] A) h[t - 1] + delta'[t] u[t] B[t];  y[t] = (C[t] . h[t] + D u[t]) silu(z[t]).

    Args:
        u: input (b, l, d), of any floating dtype; batch b, length l, channels d.
        delta: step sizes (b, l, d).
        A: decay rates (d, n), negative for a stable scan; states n.
        B: input weights (b, l, n).
        C: output weights (b, l, n).
        D: skip weights (d,).
        z: gate (b, l, d).
        delta_bias: added to delta (d,).
        delta_softplus: apply softplus to delta after the bias.
        reverse: run from the last position to the first.

    Returns:
        (b, l, d) in u's dtype. States are float32, or float64 where u is.

    Raises:
        ConfigError: a shape, dtype or device does not fit.
        BackendError: the chosen backend does not serve u's device.
    """
    check_rank("selective_scan", "u", u, "(b, l, d)")
    check_rank("selective_scan", "A", A, "(d, n)")
    batch, length, channels = u.shape
    states = A.shape[1]
    check_shapes(
        "selective_scan",
        "u",
        u=(u, (batch, length, channels)),
        delta=(delta, (batch, length, channels)),
        A=(A, (channels, states)),
        B=(B, (batch, length, states)),
        C=(C, (batch, length, states)),
        D=(D, (channels,)),
        z=(z, (batch, length, channels)),
        delta_bias=(delta_bias, (channels,)),
    )
    return _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, backend_of(u))[0]


@torch.library.custom_op("famba::selective_scan", mutates_args=())
def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    with torch.autocast(u.device.type, enabled=False):
        return kernels(backend).selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)


@_scan.register_fake
def _scan_shape(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    batch, length, channels = u.shape
    state = kernels(backend).scan_state_shape(batch, length, channels, A.shape[1])
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    return u.new_empty(u.shape), u.new_empty(state, dtype=dtype)


@torch.library.custom_op("famba::selective_scan_backward", mutates_args=())
def _scan_backward(
    dy: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    state: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(u.device.type, enabled=False):
        du, ddelta, dA, dB, dC, dD, dz, dbias = kernels(backend).selective_scan_backward(
            dy, u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, state
        )
    # An op returns tensors only: an empty one stands for the gradient of an input that is None.
    none = u.new_empty(0)
    return (
        du,
        ddelta,
        dA,
        dB,
        dC,
        none if dD is None else dD,
        none.clone() if dz is None else dz,
        none.clone() if dbias is None else dbias,
    )


@_scan_backward.register_fake
def _scan_backward_shape(
    dy: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    state: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def like(x: Tensor | None) -> Tensor:
        return u.new_empty(0) if x is None else x.new_empty(x.shape)

    return like(u), like(delta), like(A), like(B), like(C), like(D), like(z), like(delta_bias)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.delta_softplus, ctx.reverse, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[1])
    # The state has no gradient, and none is to be filled with zeros for it in each backward.
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx, dy, _):  # type: ignore[no-untyped-def]
    *inputs, state = ctx.saved_tensors
    if dy is None:
        return (None,) * (len(inputs) + 3)
    grads = _scan_backward(dy, *inputs, ctx.delta_softplus, ctx.reverse, state, ctx.backend)
    return *(None if x is None else g for x, g in zip(inputs, grads, strict=True)), None, None, None


_scan.register_autograd(_gradients, setup_context=_keep)


def scan_macs(batch: int, length: int, channels: int, states: int, skip: bool, gate: bool) -> int:
    """Multiply-adds of a forward scan.

    Per token, channel and state four (delta A, the decayed state, the input's share, C h); per token and channel
    one for delta u, and one each for the skip and the gate. Exponentials are not counted.
    """
    return batch * length * channels * (4 * states + 1 + skip + gate)


@register_flop_formula(torch.ops.famba.selective_scan)
def _scan_flops(u, delta, A, B, C, D, z, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    batch, length, channels = u
    return 2 * scan_macs(batch, length, channels, A[1], D is not None, z is not None)
