"""Define an op for torch: the checks of its arguments, its schema, its fake, and the call of a backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import CustomOpDef

from famba.errors import ConfigError
from famba.ops.registry import kernels

# Arguments that may be None.
_OPTIONAL = ("D", "z", "delta_bias", "bias", "residual", "sizes", "out_weight")


def check_shapes(op: str, **given: tuple[Tensor | None, str]) -> dict[str, int]:
    """Raise ConfigError where a tensor has another shape, or lies on another device than the first, or is dual.

    given: argument name to (tensor, names of its axes), such as "b l d": an axis has the size that it has in the first
    of these tensors. None is passed over where an argument may be left out. Returns the sizes of all axes.
    """
    sizes: dict[str, int] = {}
    first: tuple[str, torch.device] | None = None
    # A number that torch counts up where forward-mode begins; to ask every tensor at every call would take time.
    forward_mode = forward_ad._current_level >= 0
    for name, (tensor, named) in given.items():
        if tensor is None and name in _OPTIONAL:
            continue
        if not isinstance(tensor, Tensor):
            raise ConfigError(f"{op}: {name} is {tensor!r}, expected a tensor ({', '.join(named.split())})")
        axes, shape = named.split(), tuple(tensor.shape)
        if len(axes) == len(shape):
            for axis, size in zip(axes, shape, strict=True):
                sizes[axis] = sizes.get(axis, size)
        expected = tuple([sizes.get(axis, axis) for axis in axes])
        if shape != expected:
            raise ConfigError(f"{op}: {name} has shape {shape}, expected ({', '.join(map(str, expected))})")
        first = first or (name, tensor.device)
        if tensor.device != first[1]:
            raise ConfigError(f"{op}: {name} is on {tensor.device}, but {first[0]} on {first[1]}")
        if not tensor.is_floating_point():
            raise ConfigError(f"{op}: {name} has dtype {tensor.dtype}, expected a floating-point dtype")
        if forward_mode and forward_ad.unpack_dual(tensor).tangent is not None:
            raise ConfigError(
                f"{op}: {name} carries a tangent, and forward-mode differentiation (torch.func.jvp, jacfwd) is not "
                "supported, only reverse mode: use torch.autograd.grad, or torch.autograd.functional.jacobian"
            )
    return sizes


Results = Sequence[Any] | Tensor


def define(
    name: str, arguments: str, results: str, run: Callable[..., Results], fake: Callable[..., Results]
) -> CustomOpDef:
    """Define and return the custom op famba::name, whose last argument is the backend's name.

    arguments: all others, the first a tensor, and results: as a torch schema writes them. run: called with a backend's
    functions and the arguments, outside autocast. fake: called alike, for fresh tensors of the results' shapes and
    dtypes. Where one returns None for a tensor, as for the gradient of an input that is None, the op returns an empty
    tensor: it can return tensors only.
    """

    def on_backend(*given: Any) -> Results:
        *inputs, backend = given
        with torch.autocast(inputs[0].device.type, enabled=False):
            return _without_none(run(kernels(backend), *inputs), inputs[0])

    def without_values(*given: Any) -> Results:
        *inputs, backend = given
        return _without_none(fake(kernels(backend), *inputs), inputs[0])

    schema = f"({arguments}, str backend) -> {results}"
    op = torch.library.custom_op(f"famba::{name}", on_backend, mutates_args=(), schema=schema)
    op.register_fake(without_values)
    return op


def differentiate(op: CustomOpDef, backward: CustomOpDef, tensors: int) -> None:
    """Let another op give the gradients of an op's first inputs, `tensors` of them, which are tensors or None.

    It takes the gradient of the first result, the inputs, what else the op returned, and the backend.
    """

    def keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        others = () if isinstance(output, Tensor) else output[1:]
        *ctx.how, ctx.backend = inputs[tensors:]
        ctx.save_for_backward(*inputs[:tensors], *others)
        # Other results have no gradient, and none is to be filled with zeros for them in each backward.
        ctx.mark_non_differentiable(*others)
        ctx.set_materialize_grads(False)

    def gradients(ctx, dy, *_):  # type: ignore[no-untyped-def]
        saved, nothing = ctx.saved_tensors, [None] * (len(ctx.how) + 1)  # recomputed activations can be read once
        given, others = saved[:tensors], saved[tensors:]
        if dy is None:
            return *(None for _ in given), *nothing
        grads = backward(dy, *given, *ctx.how, *others, ctx.backend)
        return *(None if x is None else grad for x, grad in zip(given, grads, strict=True)), *nothing

    op.register_autograd(gradients, setup_context=keep)


def fresh(x: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """Return a new contiguous tensor of x's shape, and of its dtype unless another is given; None for None."""
    return None if x is None else x.new_empty(x.shape, dtype=dtype)


def _without_none(results: Results, like: Tensor) -> Results:
    if isinstance(results, Tensor):
        return results
    return tuple(like.new_empty(0) if result is None else result for result in results)
