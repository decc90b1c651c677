"""The causal convolution by each backend against a loop in float64: outputs, gradients, extremes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops_helpers import LAYOUTS, Backend, all_backends, draw, examples, loop_conv

from famba.errors import ConfigError
from famba.ops import causal_conv1d


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


@all_backends("native", "triton", "cuda", "mamba_ssm")
@pytest.mark.parametrize("value", [0.0, 1e-30, -88.0, 88.0, 1e4, -1e4, 1e30, -1e30])
def test_extremes_are_those_of_the_reference(backend: Backend, value: float) -> None:
    x = torch.full((2, 5, 9), value)
    x[..., 1] = 0.5
    backend.check_extreme(loop_conv()[0], [x, torch.ones(9, 3)], abs(value) <= 1e4)


@all_backends()
@pytest.mark.parametrize("reverse", [False, True])
def test_no_position_sees_beyond_its_side(backend: Backend, reverse: bool) -> None:
    x, weight = torch.ones(1, 20, 3, device=backend.device), torch.zeros(3, 4, device=backend.device)
    x[:, 12] = torch.nan
    with backend.running():
        seen = causal_conv1d(x, weight, reverse=reverse).isnan().all(2).nonzero()[:, 1]
    assert seen.tolist() == list(range(9, 13) if reverse else range(12, 16))


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
