"""What the tests of the ops share: inputs, the comparison with an oracle, and the instruction sets of the kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from famba.ops import use_backend
from famba.ops.native import library

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}
LAYOUTS = ("contiguous", "transposed", "strided", "expanded")
EXAMPLES = settings(max_examples=40, deadline=None)


def draw(*shape: int, layout: str = "contiguous", dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers in memory of some layout."""
    if layout == "transposed" and len(shape) > 1:
        return torch.randn(*shape[:-2], shape[-1], shape[-2], dtype=torch.float64).to(dtype).transpose(-1, -2)
    if layout == "strided":
        return torch.randn(*shape[:-1], 2 * shape[-1] + 1, dtype=torch.float64).to(dtype)[..., 1::2]
    if layout == "expanded" and len(shape) > 1:
        return torch.randn(1, *shape[1:], dtype=torch.float64).to(dtype).expand(shape)
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, name: str = "output", floor: float = 1e-3) -> None:
    """Within the tolerance, relative to the largest expected value, or to the floor where that is larger."""
    assert actual.shape == expected.shape, name
    scale = expected.abs().max().item() if expected.numel() else 0.0
    error = (actual.double() - expected).abs().max().item() if expected.numel() else 0.0
    assert error <= tolerance * max(scale, floor), f"{name}: error {error} where the largest value is {scale}"


def compare(
    op: Callable[..., Any],
    oracle: Callable[..., Any],
    inputs: list[Tensor | None],
    tolerance: float,
    floor: float = 1e-3,
) -> None:
    """Outputs and gradients of all inputs under a random weighting of the outputs."""
    given_inputs = [None if x is None else x.detach().requires_grad_() for x in inputs]
    exact_inputs = [None if x is None else x.detach().double().clone().requires_grad_() for x in inputs]
    outs, exact = op(*given_inputs), oracle(*exact_inputs)
    outs, exact = [(x,) if isinstance(x, Tensor) else x for x in (outs, exact)]
    weights = [torch.randn(x.shape, dtype=torch.float64).to(x.dtype) for x in outs]
    for out, wanted in zip(outs, exact, strict=True):
        assert_close(out.detach(), wanted.detach(), tolerance, floor=floor)
    present = [x for x in given_inputs if x is not None]
    grads = torch.autograd.grad(outs, present, weights)
    present_exact = [x for x in exact_inputs if x is not None]
    wanted_grads = torch.autograd.grad(
        exact, present_exact, [w.double() for w in weights], allow_unused=True, materialize_grads=True
    )
    for number, (x, grad, wanted) in enumerate(zip(present, grads, wanted_grads, strict=True)):
        assert grad.dtype == x.dtype
        assert_close(grad, wanted, tolerance, f"gradient {number}", floor)


def scan_inputs(
    batch: int,
    length: int,
    channels: int,
    states: int,
    optional: tuple[bool, bool, bool] = (True, True, True),
    layout: str = "contiguous",
    dtype: torch.dtype = torch.float64,
) -> list[Tensor | None]:
    def make(*shape: int) -> Tensor:
        return draw(*shape, layout=layout, dtype=dtype)

    skip, gate, bias = optional
    return [
        make(batch, length, channels),
        make(batch, length, channels),
        -draw(channels, states, layout=layout).exp().to(dtype),
        make(batch, length, states),
        make(batch, length, states),
        make(channels) if skip else None,
        make(batch, length, channels) if gate else None,
        make(channels) if bias else None,
    ]


def positive_steps(inputs: list[Tensor | None]) -> list[Tensor | None]:
    """Step sizes that are positive without softplus too, so that the scan stays stable."""
    u, delta, *rest = inputs
    assert delta is not None
    bias = rest[-1]
    return [u, delta.abs(), *rest[:-1], None if bias is None else bias.abs()]


needs_kernels = pytest.mark.skipif(library.obstacle() is not None, reason=f"native kernels: {library.obstacle()}")


def usable_isas() -> list[str]:
    """Instruction sets to test; none where the kernels were not built."""
    return [] if library.obstacle() else library.isas()


@contextmanager
def native(isa: str | None = None) -> Iterator[None]:
    """The ops by the native kernels, of the given instruction set or the best."""
    library.use_isa(isa)
    try:
        with use_backend("native"):
            yield
    finally:
        library.use_isa(None)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """As many threads, until the end of the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compare_native(op: Callable[..., Any], inputs: list[Tensor | None], tolerance: float) -> None:
    """Compare an op by every usable instruction set with the reference in float64, outputs and all gradients."""

    def oracle(*exact: Tensor | None) -> Any:
        with use_backend("reference"):
            return op(*exact)

    for isa in usable_isas():
        with native(isa):
            # Sums of terms of size 1 that happen to cancel are as exact as their terms.
            compare(op, oracle, inputs, tolerance, floor=0.1)
