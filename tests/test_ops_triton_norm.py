"""The Triton norm against the reference in float64, outputs and all gradients, by the interpreter or a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ops_helpers import LAYOUTS, TOLERANCE, compare, draw
from torch import Tensor

from famba.errors import BackendError
from famba.ops import add_rms_norm, availability, use_backend

pytestmark = [
    pytest.mark.skipif(availability.triton_obstacle() is not None, reason=f"triton: {availability.triton_obstacle()}"),
    # numpy says so where the interpreter meets infinity.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXAMPLES = settings(max_examples=15, deadline=None)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCES = TOLERANCE | {torch.float16: 2e-3}


def check(inputs: list[Tensor | None], tolerance: float, eps: float = 1e-5) -> None:
    def run(backend: str) -> Any:
        def op(*x: Tensor | None) -> Any:
            with use_backend(backend):
                return add_rms_norm(*x, eps)

        return op

    placed = [None if x is None else x.to(DEVICE) for x in inputs]
    compare(run("triton"), run("reference"), placed, tolerance, floor=0.1)


@EXAMPLES
@given(
    seed=st.integers(0, 2**31),
    batch=st.sampled_from([0, 1, 3]),
    length=st.sampled_from([0, 1, 2, 15, 17, 60]),
    channels=st.sampled_from([1, 3, 16, 33, 192]),
    residual=st.booleans(),
    eps=st.sampled_from([1e-6, 1e-5, 0.1]),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
)
@example(0, 3, 60, 33, True, 1e-5, "transposed", torch.float32)
@example(0, 3, 17, 192, True, 1e-5, "strided", torch.bfloat16)
def test_norm_agrees_with_the_reference(
    seed: int, batch: int, length: int, channels: int, residual: bool, eps: float, layout: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(seed)
    # Of a single channel next to nothing is left, 1 - x^2 / (x^2 + eps), which no float32 gives exactly.
    eps = 0.1 if channels == 1 else eps
    x, stream = (draw(batch, length, channels, layout=layout) for _ in range(2))
    check([x.to(dtype), stream.float() if residual else None, draw(channels, dtype=dtype)], TOLERANCES[dtype], eps)


def test_more_rows_than_the_programs_have_in_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    from famba.ops.triton import norm as kernels

    torch.manual_seed(0)
    monkeypatch.setattr(kernels, "_PROGRAMS", 3)
    check([draw(5, 90, 5).float(), draw(5, 90, 5).float(), draw(5).float()], 1e-5)


@pytest.mark.parametrize("channels", [1000, 8192])
def test_many_channels(channels: int) -> None:
    torch.manual_seed(0)
    check([draw(1, 3, channels).float(), draw(1, 3, channels).float(), draw(channels).float()], 1e-5)


def test_more_channels_than_it_takes_are_refused_with_a_remedy() -> None:
    x, weight = torch.ones(1, 1, 8193, device=DEVICE), torch.ones(8193, device=DEVICE)
    with use_backend("triton"), pytest.raises(BackendError, match=r"8193 channels.* at most 8192; use_backend\('ref"):
        add_rms_norm(x, None, weight, 1e-5)
    with use_backend("reference"):
        assert add_rms_norm(x, None, weight, 1e-5)[1].shape == x.shape


def test_views_and_parameters_of_another_precision() -> None:
    torch.manual_seed(0)
    x = draw(4, 13, 7, dtype=torch.bfloat16)
    check([x[::2, 1::3], draw(2, 4, 7).float(), draw(7)], 1e-2)
    check([x, draw(4, 13, 7).bfloat16(), draw(7).float()], 1e-2)


@pytest.mark.parametrize("value", [0.0, 1e-30, 88.0, 1e4, 1e30])
def test_extremes_are_those_of_the_reference(value: float) -> None:
    x = torch.full((2, 5, 9), value, device=DEVICE)
    x[..., 1] = 0.5

    def run(backend: str) -> list[Tensor]:
        leaves = [x.clone().requires_grad_(), torch.ones(9, device=DEVICE, requires_grad=True)]
        with use_backend(backend):
            normed, total = add_rms_norm(leaves[0], None, leaves[1], 1e-5)
            return [normed.detach(), total.detach(), *torch.autograd.grad(normed.sum() + total.sum(), leaves)]

    torch.testing.assert_close(run("triton"), run("reference"), rtol=1e-4, atol=1e-6)


def test_the_stream_is_summed_in_float32_and_the_same_bits_come_twice() -> None:
    torch.manual_seed(0)
    x = torch.full((3, 30, 5), 2.0**-10, dtype=torch.bfloat16, device=DEVICE)
    stream, weight = torch.ones(3, 30, 5, device=DEVICE), torch.randn(5, device=DEVICE)

    def run() -> list[Tensor]:
        leaves = [x.clone().requires_grad_(), stream.clone().requires_grad_(), weight.clone().requires_grad_()]
        with use_backend("triton"):
            normed, total = add_rms_norm(*leaves, 1e-5)
            return [total.detach(), *torch.autograd.grad(normed.float().square().sum(), leaves)]

    first = run()
    assert first[0].eq(1 + 2.0**-10).all()
    assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
