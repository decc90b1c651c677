"""The causal convolution by each backend against a loop in float64: outputs, gradients, extremes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops_helpers import LAYOUTS, Backend, all_backends, draw, examples, loop_conv
from torch import Tensor

from famba.errors import ConfigError
from famba.ops import causal_conv1d, use_backend


@all_backends()
def test_it_agrees_with_the_loop(backend: Backend) -> None:
    @examples(backend)
    @given(
        seed=st.integers(0, 2**31),
        shape=st.tuples(*map(st.sampled_from, ((0, 1, 2, 3), backend.lengths, backend.channels))),
        width=st.sampled_from(backend.widths),
        bias=st.booleans(),
        silu=st.booleans(),
        reverse=st.booleans(),
        layout=st.sampled_from(LAYOUTS),
        dtype=st.sampled_from(backend.dtypes),
    )
    def check(
        seed: int, shape: Any, width: int, bias: bool, silu: bool, reverse: bool, layout: str, dtype: torch.dtype
    ) -> None:
        torch.manual_seed(seed)
        x, weight = draw(*shape, layout=layout, dtype=dtype), draw(shape[2], width, layout=layout).to(dtype)
        inputs = [x, weight, draw(shape[2], layout=layout, dtype=dtype) if bias else None]
        backend.check(*loop_conv(silu, reverse), inputs)

    check()


@all_backends("reference", "native", "triton", "cuda", slow="triton")
@pytest.mark.parametrize("reverse", [False, True])
def test_more_steps_than_a_tile_and_more_taps_than_usual(backend: Backend, reverse: bool) -> None:
    for shape, width in (((2, 130, 3), 4), ((2, 57, 130), 4), ((2, 40, 3), 7), ((17, 5, 9), 3)):
        inputs = [draw(*shape).float(), draw(shape[2], width).float(), draw(shape[2]).float()]
        backend.check(*loop_conv(reverse=reverse), inputs)


@all_backends()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_half_of_a_projection_and_parameters_of_another_precision(backend: Backend, dtype: torch.dtype) -> None:
    x = draw(2, 9, 2 * 11, dtype=dtype)[..., 11:]
    backend.check(*loop_conv(), [x, draw(11, 4), draw(11).float()])
    backend.check(*loop_conv(), [x[::2, 1::3], draw(11, 4).float(), None])


@all_backends()
@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0)], ids=str)
def test_nothing_in_nothing_out(backend: Backend, shape: tuple[int, int, int]) -> None:
    for size in (shape, (3, 20, 9), shape):
        backend.check(*loop_conv(), [draw(*size).float(), draw(size[2], 4).float(), draw(size[2]).float()])


@all_backends("native", "triton", "cuda", "mamba_ssm")
@pytest.mark.parametrize("value", [0.0, 1e-30, -88.0, 88.0, 1e4, -1e4, 1e30, -1e30])
def test_extremes_are_those_of_the_reference(backend: Backend, value: float) -> None:
    x = torch.full((2, 5, 9), value, device=backend.device)
    x[..., 1] = 0.5

    def run() -> list[Tensor]:
        leaves = [x.clone().requires_grad_(), torch.ones(9, 3, device=backend.device, requires_grad=True)]
        y = causal_conv1d(*leaves, activation="silu")
        return [y.detach(), *torch.autograd.grad(y.sum(), leaves)]

    with use_backend("reference"):
        wanted = run()
    assert all(x.isfinite().all() for x in wanted if abs(value) <= 1e4)
    with backend.running():
        torch.testing.assert_close(run(), wanted, rtol=1e-4, atol=1e-6)


@all_backends()
def test_no_position_sees_beyond_its_side(backend: Backend) -> None:
    x, weight = torch.randn(1, 20, 3).to(backend.device), torch.randn(3, 4).to(backend.device)
    later = x.clone()
    later[:, 12:] = torch.nan
    for reverse in (False, True):
        turned = [t.flip(1) if reverse else t for t in (x, later)]
        with backend.running():
            plain, other = (causal_conv1d(t, weight, activation="silu", reverse=reverse) for t in turned)
            forward = causal_conv1d(x, weight, activation="silu")
        torch.testing.assert_close(plain.flip(1) if reverse else plain, forward)
        seen, hidden = (slice(8, None), slice(0, 8)) if reverse else (slice(0, 12), slice(12, None))
        assert torch.equal(plain[:, seen], other[:, seen])
        assert other[:, hidden].isnan().all()


@all_backends("mamba_ssm")
def test_limits_of_causal_conv1d_are_named(backend: Backend) -> None:
    # The last without a copy of 16 GB.
    for x, weight, limit in (
        (torch.ones(1, 3, 2), torch.ones(2, 5), "width 5, causal-conv1d takes 2 to 4"),
        (torch.ones(1, 3, 2), torch.ones(2, 1), "width 1, causal-conv1d takes 2 to 4"),
        (torch.ones(1, 1, 2**16), torch.ones(2**16, 4), "65536 channels, .* at most 65535"),
        (torch.ones(1).expand(2**21, 2**10, 2), torch.ones(2, 4), "4294967296 elements, .* at most 4294967295"),
    ):
        with backend.running(), pytest.raises(ConfigError, match=f"{limit}.*; .*use backend 'triton' or 'reference'$"):
            causal_conv1d(x, weight)
