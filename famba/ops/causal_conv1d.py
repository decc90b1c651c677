"""Define the causal depthwise convolution as a torch custom op."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from famba.errors import ConfigError
from famba.ops.definition import check_shapes, define, differentiate, fresh
from famba.ops.registry import backend_of


def causal_conv1d(
    x: Float[Tensor, "b l d"],
    weight: Float[Tensor, "d width"],
    bias: Float[Tensor, " d"] | None = None,
    activation: str | None = None,
    reverse: bool = False,
) -> Float[Tensor, "b l d"]:
    """Convolve each channel over the length so that a position sees only itself and those before it.

    Args:
        x: input (b, l, d), of any floating dtype.
        weight: one kernel for each channel (d, width); the last tap meets the position itself.
        bias: (d,).
        activation: None, or "silu" on the result.
        reverse: see only itself and those after it, the kernel mirrored.

    Returns:
        (b, l, d) in x's dtype.

    Raises:
        ConfigError: a shape, dtype, device or the activation does not fit.
        BackendError: the chosen backend does not serve x's device.
    """
    sizes = check_shapes("causal_conv1d", x=(x, "b l d"), weight=(weight, "d width"), bias=(bias, "d"))
    if sizes["width"] == 0:
        raise ConfigError(f"causal_conv1d: weight has shape {tuple(weight.shape)}, expected a width of at least 1")
    if activation not in (None, "silu"):
        raise ConfigError(f"causal_conv1d: unknown activation {activation!r}; allowed: None, 'silu'")
    return _conv(x, weight, bias, activation == "silu", reverse, backend_of(x))


_INPUTS = "Tensor x, Tensor weight, Tensor? bias, bool silu, bool reverse"
_conv = define(
    "causal_conv1d",
    _INPUTS,
    "Tensor",
    run=lambda kernels, *inputs: kernels.causal_conv1d(*inputs),
    fake=lambda kernels, x, *_: x.new_empty(x.shape),
)
_conv_backward = define(
    "causal_conv1d_backward",
    f"Tensor dy, {_INPUTS}",
    "(Tensor, Tensor, Tensor)",
    run=lambda kernels, *inputs: kernels.causal_conv1d_backward(*inputs),
    fake=lambda kernels, dy, x, weight, bias, *_: (fresh(x), fresh(weight), fresh(bias)),
)
differentiate(_conv, _conv_backward, 3)


@register_flop_formula(torch.ops.famba.causal_conv1d)
def _conv_flops(x, weight, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    batch, length, channels = x
    return 2 * batch * length * channels * weight[1]
