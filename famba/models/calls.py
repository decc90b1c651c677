"""Modules whose computation stands elsewhere: whether that may take the place of a call, and calls with hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def has_hooks(module: nn.Module) -> bool:
    """Return whether a module has hooks of its own; torch's global ones do not count."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def has_own_forward(module: nn.Module) -> bool:
    """Return whether someone put another forward into this one module, in place of its class's."""
    return "forward" in module.__dict__


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether a call of a module is what its class computes and nothing more.

    A subclass is not plain: parametrizations, quantized layers and adapters are subclasses or wrappers.
    """
    # Written out: mixers ask this for each of their layers at every call.
    return type(module) is kind and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def call_as(module: nn.Module, forward: Callable[..., Any], *args: Any) -> Any:
    """Call `forward` in place of a module's own, so that torch runs the module's hooks around it."""
    if not has_hooks(module):
        return forward(*args)
    module.forward = forward
    try:
        return module(*args)
    finally:
        del module.forward
