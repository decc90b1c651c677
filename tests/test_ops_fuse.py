"""Fusing tokens by place: each backend against sums written out."""

from __future__ import annotations

from typing import Any

import naive
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops_helpers import LAYOUTS, TOLERANCE, Backend, all_backends, assert_close, draw, examples
from torch import Tensor

from famba.errors import ConfigError
from famba.ops import fuse_tokens

# Those with an implementation of their own.
OWN = ("reference", "native", "triton")


def check(backend: Backend, x: Tensor, places: Tensor, weights: Tensor, length: int) -> None:
    """Compare result and gradient with products by a matrix of shares."""
    dy = draw(x.shape[0], length, x.shape[2], dtype=x.dtype).to(backend.device)
    x, places, weights = (t.to(backend.device) for t in (x, places, weights))
    leaf = x.requires_grad_()
    with backend.running():
        y = fuse_tokens(leaf, places, weights, length)
        (dx,) = torch.autograd.grad(y, leaf, dy)
    belongs = places.unsqueeze(1) == torch.arange(length, device=backend.device).unsqueeze(1)
    shares = belongs * weights.double().unsqueeze(1)
    assert_close(y.detach(), shares @ leaf.detach().double(), TOLERANCE[x.dtype])
    assert_close(dx, shares.transpose(1, 2) @ dy.double(), TOLERANCE[x.dtype], "gradient")


@all_backends(*OWN)
def test_tokens_of_a_place_are_added_up(backend: Backend) -> None:
    @examples(backend)
    @given(
        seed=st.integers(0, 2**31),
        batch=st.integers(0, 3),
        length=st.sampled_from([0, 1, 2, 9, 17]),
        channels=st.sampled_from([1, 3, 8, 17, 33]),
        dtype=st.sampled_from(backend.dtypes),
        layout=st.sampled_from(LAYOUTS),
    )
    def run(seed: int, batch: int, length: int, channels: int, **how: Any) -> None:
        torch.manual_seed(seed)
        fused = max(1, length - 2)
        x = draw(batch, length, channels, **how)
        check(backend, x, torch.randint(0, fused, (batch, length)), torch.rand(batch, length), fused)

    run()


@all_backends(*OWN)
@pytest.mark.parametrize("fused", [1, 40, 150])
def test_more_tokens_and_channels_than_a_block(backend: Backend, fused: int) -> None:
    check(backend, draw(2, 150, 70).float(), torch.randint(0, fused, (2, 150)), torch.rand(2, 150), fused)


@all_backends()
def test_a_token_alone_passes_bit_for_bit_and_an_empty_place_is_negative_zero(backend: Backend) -> None:
    for dtype in backend.dtypes:
        numbers = [1e-30, -0.0, 3.1, float("inf"), -float("inf"), torch.finfo(dtype).max]
        x = torch.tensor(numbers, dtype=dtype, device=backend.device).reshape(1, 2, 3)
        with backend.running():
            y = fuse_tokens(x, torch.tensor([[2, 0]]).to(x.device), torch.ones(1, 2).to(x.device), 3)
        assert torch.equal(y[0, [2, 0]].view(torch.uint8), x[0].contiguous().view(torch.uint8))
        assert y[0, 1].eq(0).all()
        assert backend.name == "native" or y[0, 1].signbit().all()


@all_backends(*OWN)
def test_what_is_no_number_stays_in_its_place(backend: Backend) -> None:
    x = torch.ones(1, 4, 3, device=backend.device)
    x[0, 1, 2], x[0, 3, 0] = torch.nan, torch.inf
    with backend.running():
        y = fuse_tokens(x, torch.tensor([[0, 1, 2, 2]]).to(x.device), torch.ones(1, 4).to(x.device), 4)
    assert y.isnan().nonzero().tolist() == [[0, 1, 2]]
    assert y.isinf().nonzero().tolist() == [[0, 2, 0]]
    assert y[0, 2].tolist() == [float("inf"), 2, 2]


@all_backends(*OWN)
def test_tokens_are_added_in_their_order(backend: Backend) -> None:
    # In another order the small ones are lost.
    numbers = torch.tensor([2.0**-24, 2.0**-24, 1.0, 2.0**24], device=backend.device)
    for x in (numbers, numbers[:3]):
        total = torch.zeros(1, device=backend.device)
        for token in x:
            total = total + token
        places = torch.zeros(1, len(x), dtype=torch.int64, device=backend.device)
        with backend.running():
            y = fuse_tokens(x.reshape(1, -1, 1), places, torch.ones(1, len(x), device=backend.device), 1)
        assert torch.equal(y[0, 0], total)
    assert total.item() == 1 + 2.0**-23


@all_backends("reference", "native")
def test_wrong_places_are_refused(backend: Backend) -> None:
    x, weights = torch.ones(1, 3, 2), torch.ones(1, 3)
    with backend.running(), naive.as_users_run_it():
        with pytest.raises(ConfigError, match=r"places is torch.float32 of shape \(1, 3\) on cpu, expected torch.int6"):
            fuse_tokens(x, weights, weights, 2)
        with pytest.raises(ConfigError, match=r"weights has shape \(1, 2\), expected \(1, 3\)"):
            fuse_tokens(x, torch.zeros(1, 3, dtype=torch.int64), weights[:, :2], 2)
        with pytest.raises((ConfigError, RuntimeError), match=r"places from 0 to 2, expected 0 to 1|out of bounds"):
            fuse_tokens(x, torch.tensor([[0, 1, 2]]), weights, 2)
