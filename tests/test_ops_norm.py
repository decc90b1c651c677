"""The residual addition and RMS norm by each backend against a loop in float64: outputs, gradients, extremes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops_helpers import LAYOUTS, Backend, all_backends, draw, examples, loop_norm
from torch import Tensor

from famba.errors import BackendError
from famba.ops import add_rms_norm, use_backend

# Its norm is Triton's.
OWN = ("reference", "native", "triton")


@all_backends(*OWN)
def test_it_agrees_with_the_loop(backend: Backend) -> None:
    @examples(backend)
    @given(
        seed=st.integers(0, 2**31),
        shape=st.tuples(*map(st.sampled_from, ((0, 1, 3, 17), backend.lengths, (*backend.channels, 192)))),
        residual=st.booleans(),
        eps=st.sampled_from([1e-6, 1e-5, 0.1]),
        layout=st.sampled_from(LAYOUTS),
        dtype=st.sampled_from(backend.dtypes),
    )
    def check(seed: int, shape: Any, residual: bool, eps: float, layout: str, dtype: torch.dtype) -> None:
        torch.manual_seed(seed)
        # Of a single channel next to nothing is left, 1 - x^2 / (x^2 + eps), which no float32 gives exactly.
        eps = 0.1 if shape[2] == 1 else eps
        x, stream = (draw(*shape, layout=layout) for _ in range(2))
        stream = stream.to(torch.promote_types(dtype, torch.float32))
        backend.check(*loop_norm(eps), [x.to(dtype), stream if residual else None, draw(shape[2], dtype=dtype)])

    check()


@all_backends(*OWN)
@pytest.mark.parametrize("shape", [(3, 300, 9), (5, 90, 5), (1, 3, 1000), (1, 3, 8192)], ids=str)
def test_more_rows_than_a_task_takes_and_many_channels(backend: Backend, shape: tuple[int, int, int]) -> None:
    tile = {"famba.ops.triton.norm._PROGRAMS": 3} if backend.name == "triton" else {}
    backend.check(*loop_norm(), [draw(*shape).float(), draw(*shape).float(), draw(shape[2]).float()], tile=tile)


@all_backends("triton")
def test_more_channels_than_triton_takes_are_refused_with_a_remedy(backend: Backend) -> None:
    x, weight = torch.ones(1, 1, 8193, device=backend.device), torch.ones(8193, device=backend.device)
    with backend.running(), pytest.raises(BackendError, match=r"8193 channels.* at most 8192; use_backend\('ref"):
        add_rms_norm(x, None, weight, 1e-5)
    with use_backend("reference"):
        assert add_rms_norm(x, None, weight, 1e-5)[1].shape == x.shape


@all_backends(*OWN)
def test_views_and_parameters_of_another_precision(backend: Backend) -> None:
    x = draw(4, 13, 7, dtype=torch.bfloat16)
    backend.check(*loop_norm(), [x[::2, 1::3], draw(2, 4, 7).float(), draw(7)])
    backend.check(*loop_norm(), [x, draw(4, 13, 7).bfloat16(), draw(7).float()])


@all_backends(*OWN)
@pytest.mark.parametrize("value", [0.0, 1e-30, 88.0, -88.0, 1e4, 1e18, 1e30])
def test_extremes_are_those_of_the_reference(backend: Backend, value: float) -> None:
    x = torch.full((2, 5, 9), value)
    x[..., 1] = 0.5
    backend.check_extreme(lambda x, w: add_rms_norm(x, None, w, 1e-5), [x, torch.ones(9)], abs(value) <= 1e18)


@all_backends()
def test_the_stream_is_summed_in_float32_and_the_same_bits_come_twice(backend: Backend) -> None:
    x = torch.full((3, 30, 5), 2.0**-10, dtype=torch.bfloat16, device=backend.device)
    stream, weight = torch.ones(3, 30, 5, device=backend.device), torch.randn(5).to(backend.device)

    def run() -> list[Tensor]:
        leaves = [x.clone().requires_grad_(), stream.clone().requires_grad_(), weight.clone().requires_grad_()]
        normed, total = add_rms_norm(*leaves, 1e-5)
        return [total.detach(), *torch.autograd.grad(normed.float().square().sum(), leaves)]

    with backend.running():
        first, second = run(), run()
    assert first[0].eq(1 + 2.0**-10).all()
    assert stream.eq(1).all(), "the stream that came in is not overwritten"
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
