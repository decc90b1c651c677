"""Define the selective scan as a torch custom op."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from famba.ops.definition import check_shapes, define, differentiate, fresh
from famba.ops.inputs import ScanGradients, ScanInputs
from famba.ops.reference import compute_dtype
from famba.ops.registry import Kernels, backend_of


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
    """Run Mamba's selective scan over the length (Gu and Dao 2023, arXiv 2312.00752, Algorithm 2).

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
    tokens = {"u": (u, "b l d"), "delta": (delta, "b l d"), "z": (z, "b l d")}
    weights = {"A": (A, "d n"), "B": (B, "b l n"), "C": (C, "b l n"), "D": (D, "d"), "delta_bias": (delta_bias, "d")}
    check_shapes("selective_scan", **tokens, **weights)
    return _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, backend_of(u))[0]


_INPUTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "bool delta_softplus, bool reverse"
)


def _shape(kernels: Kernels, *given: Any) -> tuple[Tensor, Tensor]:
    inputs = ScanInputs(*given)
    batch, length, channels = inputs.u.shape
    state = kernels.scan_state_shape(batch, length, channels, inputs.A.shape[1])
    return inputs.u.new_empty(inputs.u.shape), inputs.u.new_empty(state, dtype=compute_dtype(inputs.u))


_scan = define(
    "selective_scan",
    _INPUTS,
    "(Tensor, Tensor)",
    run=lambda kernels, *inputs: kernels.selective_scan(ScanInputs(*inputs)),
    fake=_shape,
)
_scan_backward = define(
    "selective_scan_backward",
    f"Tensor dy, {_INPUTS}, Tensor state",
    f"({', '.join(['Tensor'] * len(ScanGradients._fields))})",
    run=lambda kernels, dy, *rest: kernels.selective_scan_backward(dy, ScanInputs(*rest[:-1]), rest[-1]),
    fake=lambda kernels, dy, *inputs: [fresh(x) for x in inputs[: len(ScanGradients._fields)]],
)
differentiate(_scan, _scan_backward, len(ScanGradients._fields))


def scan_macs(batch: int, length: int, channels: int, states: int, skip: bool, gate: bool) -> int:
    """Count the multiply-adds of a forward scan.

    Per token, channel and state four (delta A, the decayed state, the input's share, C h); per token and channel
    one for delta u, and one each for the skip and the gate. Exponentials are not counted.
    """
    return batch * length * channels * (4 * states + 1 + skip + gate)


@register_flop_formula(torch.ops.famba.selective_scan)
def _scan_flops(u, delta, A, B, C, D, z, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    batch, length, channels = u
    return 2 * scan_macs(batch, length, channels, A[1], D is not None, z is not None)
