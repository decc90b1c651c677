"""Vim's mixer by Triton kernels against its parts, by the interpreter or a GPU."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import naive
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ops_helpers import assert_close
from test_ops_mixer import built, draw, drawn_inputs, exact, flat, run, weights
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from famba.errors import ConfigError
from famba.ops import Direction, availability, bidirectional_mixer, use_backend
from famba.ops.bidirectional_mixer import compose_mixer
from famba.ops.inputs import MixerInputs, MixerSizes

pytestmark = [
    pytest.mark.skipif(availability.triton_obstacle() is not None, reason=f"triton: {availability.triton_obstacle()}"),
    # numpy says so where the interpreter meets infinity.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
mixer = pytest.importorskip("famba.ops.triton.mixer")
launch = pytest.importorskip("famba.ops.triton.launch")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter cuts bfloat16 off instead of rounding it, which makes for several times the error.
BFLOAT16 = 3e-2 if availability.interpreted() else 1e-2


def placed(tensors: list[Tensor | None], dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
    return [None if t is None else t.to(DEVICE, dtype) for t in tensors]


def fused(tensors: list[Tensor | None], dy: Tensor) -> list[Tensor]:
    with use_backend("triton"):
        return run(bidirectional_mixer, tensors, dy)


def error(x: Tensor, y: Tensor) -> float:
    return ((x.double() - y).norm() / y.norm()).item()


@settings(max_examples=3, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(0, 2),
    length=st.sampled_from([0, 1, 2, 5, 9]),
    sizes=st.tuples(
        st.integers(1, 9), st.integers(1, 20), st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 3, 4, 8, 12])
    ),
    width=st.integers(1, 5),
    out=st.booleans(),
)
@example(0, 2, 9, (6, 11, 3, 2), 4, True)
@example(0, 1, 5, (3, 7, 1, 1), 3, False)
# Vim-Ti's columns; and some that need no padding.
@example(0, 1, 2, (6, 9, 16, 12), 4, True)
@example(0, 1, 3, (6, 8, 4, 8), 4, True)
def test_one_op_agrees_with_its_parts(
    seed: int, batch: int, length: int, sizes: tuple[int, ...], width: int, out: bool
) -> None:
    torch.manual_seed(seed)
    drawn = weights(*sizes, width=width, out=out)
    tensors = placed(flat(draw(batch, length, sizes[0]), drawn))
    dy = draw(batch, length, sizes[0] if out else sizes[1]).to(DEVICE, torch.float32)
    for number, (a, b) in enumerate(zip(fused(tensors, dy), exact(tensors, dy), strict=True)):
        assert a.dtype == torch.float32
        # Sums of terms of size 1 that happen to cancel are as exact as their terms.
        assert_close(a, b, 1e-5, f"result {number}", floor=1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_as_the_parts_in_it(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = placed(flat(draw(2, 13, 24), weights(24, 48, 4, 3)), dtype)
    dy = draw(2, 13, 24).to(DEVICE, dtype)
    wanted, actual = exact(tensors, dy), fused(tensors, dy)
    with use_backend("reference"):
        parts = run(compose_mixer, tensors, dy)
    for number, (a, p, w) in enumerate(zip(actual, parts, wanted, strict=True)):
        assert a.dtype == dtype
        limit = max(BFLOAT16 if dtype == torch.bfloat16 else 1e-2, 1.2 * error(p, w))
        assert error(a, w) <= limit, f"result {number}"


def test_autocast_casts_the_products_and_keeps_the_weights_gradients_in_float32() -> None:
    torch.manual_seed(0)
    tensors, dy = drawn_inputs(2, 9)
    tensors, dy = placed(tensors), dy.to(DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        actual = fused(tensors, dy)
    assert actual[0].dtype == torch.bfloat16
    for number, (a, w) in enumerate(zip(actual, exact(tensors, dy), strict=True)):
        assert number == 0 or a.dtype == torch.float32
        assert error(a, w) <= 2 * BFLOAT16, f"result {number}"


def test_each_weight_has_a_dtype_of_its_own() -> None:
    torch.manual_seed(0)
    drawn = flat(draw(2, 8, 6), weights(6, 11, 3, 3))
    x, in_weight, *rest = placed(drawn)
    dtypes = [torch.float32, torch.bfloat16, torch.bfloat16, torch.float32, torch.float16, torch.float64, torch.float32]
    sides = [w.to(dtype) for w, dtype in zip(rest, dtypes * 2, strict=False)]
    # Tokens as they lie behind a class token, and a gradient that is one number everywhere.
    tensors = [x.bfloat16()[:, 1:], in_weight, *sides, rest[-1]]
    dy = torch.ones(1, device=DEVICE).expand(2, 7, 6)
    found = fused(tensors, dy)
    assert [a.dtype for a in found] == [torch.bfloat16, *(t.dtype for t in tensors)]
    for number, (a, w) in enumerate(zip(found, exact(tensors, dy), strict=True)):
        assert error(a, w) <= 2 * BFLOAT16, f"result {number}"


@contextmanager
def memory_that_holds_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(1, device=DEVICE).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("sizes", [(6, 11, 3, 3), (6, 8, 4, 8)], ids=["padded", "nothing to pad"])
def test_nothing_comes_in_from_memory_that_was_not_written(sizes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    tensors, dy = placed(flat(draw(2, 5, 6), weights(*sizes))), draw(2, 5, 6).to(DEVICE)
    wanted = fused(tensors, dy)
    with memory_that_holds_nan():
        found = fused(tensors, dy)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_it_keeps_the_small_projections_alone() -> None:
    sizes = MixerSizes(4, 197, 192, 384, 16, 12, 192, cast=True)
    (projected, weights), none = mixer.mixer_kept_shapes(sizes)
    assert math.prod(projected) == 4 * 197 * 2 * 48
    assert not none
    # One copy of each product's weight, those of both scans padded; without a cast these alone.
    stacked = 2 * 384 * (48 + 16)
    assert math.prod(weights) == 3 * 192 * 384 + stacked
    assert mixer.mixer_kept_shapes(sizes._replace(cast=False))[0][1] == (stacked,)


def test_the_same_bits_twice_and_only_the_gradients_asked_for() -> None:
    torch.manual_seed(0)
    tensors, dy = drawn_inputs(1, 9)
    tensors, dy = placed(tensors), dy.to(DEVICE)
    first, second = fused(tensors, dy), fused(tensors, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    tensors[0].requires_grad_()
    with use_backend("triton"):
        bidirectional_mixer(*built(tensors)).backward(dy.float())
    assert torch.equal(tensors[0].grad, first[1])
    assert all(t.grad is None for t in tensors[1:])


def test_launches_of_kernels() -> None:
    tensors, dy = drawn_inputs(2, 5)
    inputs = MixerInputs(*built([t.float() for t in tensors]))
    with launch.noted() as ahead:
        _, *kept = mixer.mixer(inputs)
    with launch.noted() as back:
        mixer.mixer_backward(dy.float(), inputs, kept)
    assert [found.kernel.name for found in ahead] == ["conv_forward", "scan_forward"]
    assert [found.kernel.name for found in back] == [
        "conv_forward",
        "scan_forward",
        "scan_backward",
        "state_sums",
        "parameter_sums",
        "conv_backward",
        "conv_sums",
    ]


class Counted(TorchDispatchMode):
    """Counts the ops of torch that launch something on a GPU: all that are no views and do more than take memory."""

    FREE = ("detach", "view", "_unsafe_view", "t", "transpose", "permute", "select", "slice", "squeeze", "unsqueeze")
    FREE += ("split", "split_with_sizes", "unbind", "empty", "empty_like", "new_empty", "expand", "as_strided")

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func.name().partition("::")
        name = name.split(".")[0]
        self.counts.update([name] if namespace == "aten" and name not in self.FREE else [])
        return func(*args, **(kwargs or {}))


def test_launches_of_torch_with_float32_weights_under_bfloat16_tokens() -> None:
    tensors, dy = drawn_inputs(2, 5)
    inputs = MixerInputs(*built([t.float() for t in tensors]))
    inputs, dy = inputs._replace(x=inputs.x.bfloat16()), dy.bfloat16()
    with launch.noted(), Counted() as ahead:
        _, *kept = mixer.mixer(inputs)
    with launch.noted(), Counted() as back:
        mixer.mixer_backward(dy, inputs, kept)
    # Weights, once in a step: zeros, one copy of all, one into the padded columns of dt.
    weights_alike = {"new_zeros": 1, "_foreach_copy_": 1, "copy_": 1}
    # The scans' parameters in one tensor, and the sum of both directions.
    assert ahead.counts == {**weights_alike, "mm": 2, "bmm": 2, "cat": 1, "add": 1}
    products = {"mm": 5, "bmm": 4, "baddbmm_": 1}
    # The sums of y and dz; gradients of dt without their padding, then all in the weights' dtypes; zeros behind C.
    sums_and_copies = {"add": 2, "clone": 1, "_foreach_copy_": 1, "zero_": 1}
    assert back.counts == {**products, "cat": 1, **sums_and_copies}


def test_no_gradient_of_what_is_kept_is_made() -> None:
    tensors, dy = drawn_inputs(1, 3)
    leaves = [t.requires_grad_() for t in placed(tensors)]
    with use_backend("triton"):
        y = bidirectional_mixer(*built(leaves))
    dy = dy.to(y)
    with Counted() as counted:
        y.backward(dy)
    assert counted.counts == {}


def test_torch_accepts_the_op() -> None:
    tensors, _ = drawn_inputs(1, 3)
    x, in_weight, forward, backward, out_weight = built([t.requires_grad_() for t in placed(tensors)])
    arguments = (x, in_weight, list(forward), list(backward), out_weight, "triton")
    with warnings.catch_warnings(), naive.as_users_run_it():
        warnings.simplefilter("ignore")
        torch.library.opcheck(torch.ops.famba.bidirectional_mixer, arguments)


@pytest.mark.parametrize("field", ["conv_weight", "dt_weight", "A"])
def test_directions_of_unequal_shapes_are_refused(field: str) -> None:
    torch.manual_seed(0)
    into, forward, _, out = weights(4, 5, 2, 2)
    other = weights(4, 5, 2, 2, width=3)[2] if field == "conv_weight" else weights(4, 5, 2 + (field == "A"), 1)[2]
    with use_backend("triton"), pytest.raises(ConfigError, match="backend 'triton' needs the same"):
        bidirectional_mixer(
            *(x.to(DEVICE, torch.float32) for x in (draw(1, 3, 4), into)),
            *(Direction(*(w.to(DEVICE, torch.float32) for w in side)) for side in (forward, other)),
            out.to(DEVICE, torch.float32),
        )
