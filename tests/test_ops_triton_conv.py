"""The Triton convolution against the reference in float64, outputs and all gradients, by the interpreter or a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ops_helpers import LAYOUTS, TOLERANCE, compare, draw
from torch import Tensor

from famba.ops import availability, causal_conv1d, use_backend

pytestmark = [
    pytest.mark.skipif(availability.triton_obstacle() is not None, reason=f"triton: {availability.triton_obstacle()}"),
    # numpy says so where the interpreter meets infinity.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXAMPLES = settings(max_examples=12, deadline=None)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCES = TOLERANCE | {torch.float16: 2e-3}


def conv(silu: bool, reverse: bool) -> Callable[..., Tensor]:
    def run(*inputs: Tensor | None) -> Tensor:
        with use_backend("triton"):
            return causal_conv1d(*inputs, activation="silu" if silu else None, reverse=reverse)

    return run


def check(inputs: list[Tensor | None], tolerance: float, silu: bool = True, reverse: bool = False) -> None:
    def oracle(*exact: Tensor | None) -> Any:
        with use_backend("reference"):
            return causal_conv1d(*exact, activation="silu" if silu else None, reverse=reverse)

    placed = [None if x is None else x.to(DEVICE) for x in inputs]
    compare(conv(silu, reverse), oracle, placed, tolerance, floor=0.1)


@EXAMPLES
@given(
    seed=st.integers(0, 2**31),
    batch=st.sampled_from([0, 1, 2]),
    length=st.sampled_from([0, 1, 2, 15, 16, 17]),
    channels=st.sampled_from([1, 3, 16, 33]),
    width=st.integers(1, 5),
    bias=st.booleans(),
    silu=st.booleans(),
    reverse=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
)
@example(0, 2, 17, 33, 4, True, True, True, "transposed", torch.float32)
@example(0, 2, 2, 3, 5, True, True, False, "strided", torch.bfloat16)
@example(0, 1, 16, 16, 4, False, False, False, "contiguous", torch.float16)
def test_convolution_agrees_with_the_reference(
    seed: int,
    batch: int,
    length: int,
    channels: int,
    width: int,
    bias: bool,
    silu: bool,
    reverse: bool,
    layout: str,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(seed)
    x = draw(batch, length, channels, layout=layout, dtype=dtype)
    weight = draw(channels, width, layout=layout).to(dtype)
    check([x, weight, draw(channels, dtype=dtype) if bias else None], TOLERANCES[dtype], silu, reverse)


@pytest.mark.parametrize("reverse", [False, True])
def test_more_steps_than_a_tile_and_more_sums_than_a_block(reverse: bool) -> None:
    torch.manual_seed(0)
    check([draw(2, 130, 3).float(), draw(3, 4).float(), draw(3).float()], 1e-5, reverse=reverse)
    check([draw(2, 40, 3).float(), draw(3, 7).float(), draw(3).float()], 1e-5, reverse=reverse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_half_of_a_projection_and_parameters_of_another_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = draw(2, 9, 2 * 11, dtype=dtype)[..., 11:]
    check([x, draw(11, 4), draw(11).float()], TOLERANCES[dtype])
    check([x[::2, 1::3], draw(11, 4).float(), None], TOLERANCES[dtype])


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0)], ids=str)
def test_nothing_in_nothing_out(shape: tuple[int, int, int]) -> None:
    check([draw(*shape).float(), draw(shape[2], 4).float(), draw(shape[2]).float()], 1e-5)


@pytest.mark.parametrize("value", [0.0, 1e-30, -88.0, 1e4, -1e4, 1e30, -1e30])
def test_extremes_are_those_of_the_reference(value: float) -> None:
    x = torch.full((2, 5, 9), value, device=DEVICE)
    x[..., 1] = 0.5

    def run(backend: str) -> list[Tensor]:
        leaves = [x.clone().requires_grad_(), torch.ones(9, 3, device=DEVICE, requires_grad=True)]
        with use_backend(backend):
            y = causal_conv1d(*leaves, activation="silu")
            return [y.detach(), *torch.autograd.grad(y.sum(), leaves)]

    torch.testing.assert_close(run("triton"), run("reference"), rtol=1e-4, atol=1e-6)


def test_no_future_is_seen() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1, 20, 3, device=DEVICE), torch.randn(3, 4, device=DEVICE)
    later = x.clone()
    later[:, 12:] = torch.nan
    for reverse in (False, True):
        plain, other = (conv(True, reverse)(t.flip(1) if reverse else t, weight) for t in (x, later))
        seen = slice(8, None) if reverse else slice(0, 12)
        assert torch.equal(plain[:, seen], other[:, seen])
        hidden = slice(0, 8) if reverse else slice(12, None)
        assert other[:, hidden].isnan().all()


def two_directions() -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    x, dys = torch.randn(2, 19, 2 * 5, device=DEVICE)[..., :5], torch.randn(2, 2, 19, 5, device=DEVICE)
    return x, dys, [torch.randn(5, 4, device=DEVICE) for _ in "ab"], [torch.randn(5, device=DEVICE) for _ in "ab"]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("reverses", [(False, True), (True, False)])
def test_two_directions_at_once_are_two_single_ones(reverses: tuple[bool, bool], biased: bool) -> None:
    from famba.ops.triton import conv as kernels

    x, dys, weights, drawn = two_directions()
    biases = drawn if biased else [None, None]
    y = kernels.convolve(x, weights, biases, True, reverses)
    # Written among other channels, which stay as they are.
    both = torch.ones(2, 19, 2 * 5, device=DEVICE)
    _, dx = both.chunk(2, dim=2)
    dweights, dbiases = kernels.convolve_backward(dys, x, weights, biases, True, reverses, dx)
    assert (both[..., :5] == 1).all()
    singles = []
    for out, dy, weight, bias, reverse in zip(y, dys, weights, biases, reverses, strict=True):
        assert torch.equal(out, kernels.causal_conv1d(x, weight, bias, True, reverse))
        singles.append(kernels.causal_conv1d_backward(dy, x, weight, bias, True, reverse))
    torch.testing.assert_close(dx, singles[0][0] + singles[1][0], rtol=1e-5, atol=1e-5)
    for dweight, dbias, single in zip(dweights, dbiases, singles, strict=True):
        torch.testing.assert_close(dweight, single[1], rtol=1e-5, atol=1e-5)
        assert (dbias is None) is not biased
        if dbias is not None:
            torch.testing.assert_close(dbias, single[2], rtol=1e-5, atol=1e-5)


def test_the_same_bits_twice() -> None:
    from famba.ops.triton import conv as kernels

    x, dys, weights, biases = two_directions()

    def run() -> list[Tensor]:
        y = kernels.convolve(x, weights, biases, True, (False, True))
        dx = torch.empty(2, 19, 5, device=DEVICE)
        dweights, dbiases = kernels.convolve_backward(dys, x, weights, biases, True, (False, True), dx)
        return [y, dx, *dweights, *(b for b in dbiases if b is not None)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
