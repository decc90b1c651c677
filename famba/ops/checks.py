"""Check shapes and devices of an op's arguments, before a backend sees them."""

from __future__ import annotations

from torch import Tensor
from torch.autograd import forward_ad

from famba.errors import ConfigError

# Arguments that may be None.
_OPTIONAL = ("D", "z", "delta_bias", "bias", "residual", "sizes")


def check_shapes(op: str, device_of: str, **expected: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Raise ConfigError where a tensor has another shape, or lies on another device than `device_of`, or is dual.

    expected: argument name to (tensor, shape); None is passed over where an argument may be left out.
    """
    first = expected[device_of][0]
    assert first is not None
    # A number that torch counts up where forward-mode begins; to ask every tensor at every call would take time.
    forward_mode = forward_ad._current_level >= 0
    for name, (tensor, shape) in expected.items():
        if tensor is None and name in _OPTIONAL:
            continue
        if not isinstance(tensor, Tensor):
            raise ConfigError(f"{op}: {name} is {tensor!r}, expected a tensor of shape {tuple(shape)}")
        if tuple(tensor.shape) != tuple(shape):
            raise ConfigError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
        if tensor.device != first.device:
            raise ConfigError(f"{op}: {name} is on {tensor.device}, but {device_of} on {first.device}")
        if not tensor.is_floating_point():
            raise ConfigError(f"{op}: {name} has dtype {tensor.dtype}, expected a floating-point dtype")
        if forward_mode and forward_ad.unpack_dual(tensor).tangent is not None:
            raise ConfigError(
                f"{op}: {name} carries a tangent, and forward-mode differentiation (torch.func.jvp, jacfwd) is not "
                "supported, only reverse mode: use torch.autograd.grad, or torch.autograd.functional.jacobian"
            )


def check_rank(op: str, name: str, tensor: Tensor, axes: str) -> None:
    """Raise ConfigError where a tensor has not as many axes as `axes` names, such as "(b, l, d)"."""
    if tensor.ndim != axes.count(",") + 1:
        raise ConfigError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {axes}")
