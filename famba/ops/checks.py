"""Shapes and devices of an op's arguments, checked before a backend sees them."""

from __future__ import annotations

from torch import Tensor

from famba.errors import ConfigError


def check_shapes(op: str, device_of: str, **expected: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Raise ConfigError where a tensor has another shape, or lies on another device than `device_of`.

    expected: argument name to (tensor, shape); a tensor of None is passed over.
    """
    first = expected[device_of][0]
    assert first is not None
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != tuple(shape):
            raise ConfigError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
        if tensor.device != first.device:
            raise ConfigError(f"{op}: {name} is on {tensor.device}, but {device_of} on {first.device}")
        if not tensor.is_floating_point():
            raise ConfigError(f"{op}: {name} has dtype {tensor.dtype}, expected a floating-point dtype")


def check_rank(op: str, name: str, tensor: Tensor, axes: str) -> None:
    """Raise ConfigError where a tensor has not as many axes as `axes` names, such as "(b, l, d)"."""
    if tensor.ndim != axes.count(",") + 1:
        raise ConfigError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {axes}")
