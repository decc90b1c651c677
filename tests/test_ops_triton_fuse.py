"""Fusing tokens by Triton against sums written out, by the interpreter or a GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ops_helpers import LAYOUTS, TOLERANCE, assert_close, draw
from torch import Tensor

from famba.ops import availability, fuse_tokens, use_backend

pytestmark = pytest.mark.skipif(
    availability.triton_obstacle() is not None, reason=f"triton: {availability.triton_obstacle()}"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXAMPLES = settings(max_examples=15, deadline=None)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCES = TOLERANCE | {torch.float16: 2e-3}


def fuse(x: Tensor, places: Tensor, weights: Tensor, length: int) -> Tensor:
    with use_backend("triton"):
        return fuse_tokens(x, places, weights, length)


def check(x: Tensor, places: Tensor, weights: Tensor, length: int, tolerance: float) -> None:
    leaf, dy = x.to(DEVICE).requires_grad_(), draw(x.shape[0], length, x.shape[2], dtype=x.dtype).to(DEVICE)
    places, weights = places.to(DEVICE), weights.to(DEVICE)
    y = fuse(leaf, places, weights, length)
    (dx,) = torch.autograd.grad(y, leaf, dy)
    belongs = places.unsqueeze(1) == torch.arange(length, device=DEVICE).unsqueeze(1)
    shares = belongs * weights.double().unsqueeze(1)
    assert_close(y.detach(), shares @ leaf.detach().double(), tolerance)
    assert_close(dx, shares.transpose(1, 2) @ dy.double(), tolerance, "gradient")


@EXAMPLES
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(0, 3),
    length=st.sampled_from([0, 1, 2, 9, 17]),
    channels=st.sampled_from([1, 3, 17, 33]),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
)
@example(0, 2, 17, 33, torch.bfloat16, "transposed")
@example(0, 2, 17, 3, torch.float16, "strided")
def test_tokens_of_a_place_are_added_up(
    seed: int, batch: int, length: int, channels: int, dtype: torch.dtype, layout: str
) -> None:
    torch.manual_seed(seed)
    fused = max(1, length - 2)
    x = draw(batch, length, channels, dtype=dtype, layout=layout)
    check(x, torch.randint(0, fused, (batch, length)), torch.rand(batch, length), fused, TOLERANCES[dtype])


@pytest.mark.parametrize("fused", [1, 40, 150])
def test_more_tokens_and_channels_than_a_block(fused: int) -> None:
    torch.manual_seed(0)
    check(draw(2, 150, 70).float(), torch.randint(0, fused, (2, 150)), torch.rand(2, 150), fused, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_alone_passes_bit_for_bit_and_an_empty_place_is_zero(dtype: torch.dtype) -> None:
    numbers = [1e-30, -0.0, 3.1, float("inf"), -float("inf"), torch.finfo(dtype).max]
    x = torch.tensor(numbers, dtype=dtype, device=DEVICE).reshape(1, 2, 3)
    y = fuse(x, torch.tensor([[2, 0]], device=DEVICE), torch.ones(1, 2, device=DEVICE), 3)
    assert torch.equal(y[0, [2, 0]].view(torch.uint8), x[0].contiguous().view(torch.uint8))
    assert y[0, 1].eq(0).all()
    # As the reference has it.
    assert y[0, 1].signbit().all()


def test_what_is_no_number_stays_in_its_place() -> None:
    x = torch.ones(1, 4, 3, device=DEVICE)
    x[0, 1, 2], x[0, 3, 0] = torch.nan, torch.inf
    y = fuse(x, torch.tensor([[0, 1, 2, 2]], device=DEVICE), torch.ones(1, 4, device=DEVICE), 4)
    assert y.isnan().nonzero().tolist() == [[0, 1, 2]]
    assert y.isinf().nonzero().tolist() == [[0, 2, 0]]
    assert y[0, 2].tolist() == [float("inf"), 2, 2]


def test_tokens_whose_place_is_outside_are_left_out() -> None:
    x = torch.ones(2, 4, 3, device=DEVICE, requires_grad=True)
    places = torch.tensor([[0, 5, -1, 2**32], [1, 1, 2**31, -(2**40)]], device=DEVICE)
    y = fuse(x, places, torch.ones(2, 4, device=DEVICE), 2)
    assert y[:, :, 0].tolist() == [[1, 0], [0, 2]]
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx[:, :, 0].tolist() == [[1, 0, 0, 0], [1, 1, 0, 0]]


def test_tokens_are_added_in_their_order() -> None:
    # In another order the small ones are lost.
    x = torch.tensor([1.0, 2.0**-24, 2.0**-24, 2.0**24], device=DEVICE).reshape(1, 4, 1)
    order = [1, 2, 0, 3]
    y = fuse(x[:, order], torch.zeros(1, 4, dtype=torch.int64, device=DEVICE), torch.ones(1, 4, device=DEVICE), 1)
    total = torch.zeros(1, device=DEVICE)
    for token in order:
        total = total + x[0, token]
    assert torch.equal(y[0, 0], total)
    first = fuse(x[:, [1, 2, 0]], torch.zeros(1, 3, dtype=torch.int64, device=DEVICE), torch.ones(1, 3).to(DEVICE), 1)
    assert first.item() == 1 + 2.0**-23
