"""Fusing tokens by place: each backend against sums written out."""

from __future__ import annotations

import warnings

import naive
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops_helpers import EXAMPLES, TOLERANCE, assert_close, draw
from torch import Tensor

from famba.errors import ConfigError
from famba.ops import fuse_tokens, use_backend
from famba.ops.native import library

BACKENDS = ["reference", *(["native"] if library.obstacle() is None else [])]


def sums(x: Tensor, places: Tensor, weights: Tensor, length: int) -> Tensor:
    out = torch.zeros(x.shape[0], length, x.shape[2], dtype=torch.float64)
    for image in range(x.shape[0]):
        for token in range(x.shape[1]):
            out[image, places[image, token]] += weights[image, token].double() * x[image, token].double()
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@EXAMPLES
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(0, 3),
    length=st.integers(0, 9),
    channels=st.sampled_from([1, 3, 8, 17, 33]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    layout=st.sampled_from(["contiguous", "transposed", "strided", "expanded"]),
)
def test_tokens_of_a_place_are_added_up(
    backend: str, seed: int, batch: int, length: int, channels: int, dtype: torch.dtype, layout: str
) -> None:
    torch.manual_seed(seed)
    fused = max(1, length - 2)
    x = draw(batch, length, channels, dtype=dtype, layout=layout).requires_grad_()
    places, weights = torch.randint(0, fused, (batch, length)), torch.rand(batch, length)
    dy = draw(batch, fused, channels, dtype=dtype)
    with use_backend(backend):
        y = fuse_tokens(x, places, weights, fused)
        (dx,) = torch.autograd.grad(y, x, dy)
    assert_close(y.detach(), sums(x.detach(), places, weights, fused), TOLERANCE[dtype])
    index = places.unsqueeze(2).expand(-1, -1, channels)
    assert_close(dx, dy.double().gather(1, index) * weights.double().unsqueeze(2), TOLERANCE[dtype], "gradient")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_alone_passes_bit_for_bit_and_an_empty_place_is_zero(backend: str, dtype: torch.dtype) -> None:
    x = torch.tensor([1e-30, -0.0, 3.1, float("inf")], dtype=dtype).reshape(1, 2, 2)
    with use_backend(backend):
        y = fuse_tokens(x, torch.tensor([[2, 0]]), torch.ones(1, 2), 3)
    assert torch.equal(y[0, [2, 0]].view(torch.uint8), x[0].contiguous().view(torch.uint8))
    assert y[0, 1].eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_places_are_refused(backend: str) -> None:
    x, weights = torch.ones(1, 3, 2), torch.ones(1, 3)
    with use_backend(backend), naive.as_users_run_it():
        with pytest.raises(
            ConfigError, match=r"places is torch.float32 of shape \(1, 3\) on cpu, expected torch.int64"
        ):
            fuse_tokens(x, weights, weights, 2)
        with pytest.raises(ConfigError, match=r"weights has shape \(1, 2\), expected \(1, 3\)"):
            fuse_tokens(x, torch.zeros(1, 3, dtype=torch.int64), weights[:, :2], 2)
        with pytest.raises((ConfigError, RuntimeError), match=r"places from 0 to 2, expected 0 to 1|out of bounds"):
            fuse_tokens(x, torch.tensor([[0, 1, 2]]), weights, 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_accepts_the_op(backend: str) -> None:
    x = torch.randn(2, 4, 3, requires_grad=True)
    places, weights = torch.tensor([[0, 1, 1, 2]] * 2), torch.rand(2, 4)
    with warnings.catch_warnings(), naive.as_users_run_it():
        warnings.simplefilter("ignore")
        torch.library.opcheck(torch.ops.famba.fuse_tokens, (x, places, weights, 3, backend))
