"""Each op against a loop in float64: outputs, gradients, dtypes, memory."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import naive
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops_helpers import EXAMPLES, LAYOUTS, TOLERANCE, compare, draw, positive_steps, scan_inputs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from famba.ops import add_rms_norm, causal_conv1d, reference, selective_scan


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_STEP_ELEMENTS", 16)
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", 48)


@EXAMPLES
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(0, 4),
    length=st.sampled_from([0, 1, 2, 3, 4, 5, 7, 16, 23]),
    channels=st.integers(1, 4),
    states=st.integers(1, 4),
    optional=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    softplus=st.booleans(),
    reverse=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    tiles=st.sampled_from([(1, 1), (8, 24), (16, 100), (2**17, 2**19)]),
)
def test_scan_agrees_with_the_loop(
    seed: int,
    batch: int,
    length: int,
    channels: int,
    states: int,
    optional: tuple[bool, bool, bool],
    softplus: bool,
    reverse: bool,
    layout: str,
    tiles: tuple[int, int],
) -> None:
    torch.manual_seed(seed)
    inputs = scan_inputs(batch, length, channels, states, optional, layout)
    if not softplus:
        inputs = positive_steps(inputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "_STEP_ELEMENTS", tiles[0])
        patch.setattr(reference, "_CHUNK_ELEMENTS", tiles[1])
        compare(
            lambda *x: selective_scan(*x, delta_softplus=softplus, reverse=reverse),
            lambda *x: naive.scan(*x, softplus=softplus, reverse=reverse),
            inputs,
            TOLERANCE[torch.float64],
        )


@EXAMPLES
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(0, 3),
    length=st.sampled_from([0, 1, 2, 3, 5, 16, 23]),
    channels=st.integers(1, 4),
    width=st.integers(1, 6),
    bias=st.booleans(),
    silu=st.booleans(),
    reverse=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
)
def test_convolution_agrees_with_the_loop(
    seed: int,
    batch: int,
    length: int,
    channels: int,
    width: int,
    bias: bool,
    silu: bool,
    reverse: bool,
    layout: str,
) -> None:
    torch.manual_seed(seed)
    inputs = [draw(batch, length, channels, layout=layout), draw(channels, width, layout=layout)]
    compare(
        lambda *x: causal_conv1d(*x, activation="silu" if silu else None, reverse=reverse),
        lambda *x: naive.conv(*x, silu=silu, reverse=reverse),
        [*inputs, draw(channels, layout=layout) if bias else None],
        TOLERANCE[torch.float64],
    )


@EXAMPLES
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(0, 3),
    length=st.sampled_from([0, 1, 2, 5, 17]),
    channels=st.integers(1, 9),
    residual=st.booleans(),
    eps=st.sampled_from([1e-6, 1e-5, 0.1]),
    layout=st.sampled_from(LAYOUTS),
)
def test_norm_agrees_with_the_loop(
    seed: int, batch: int, length: int, channels: int, residual: bool, eps: float, layout: str
) -> None:
    torch.manual_seed(seed)
    x, stream = (draw(batch, length, channels, layout=layout) for _ in range(2))
    compare(
        lambda *t: add_rms_norm(*t, eps),
        lambda *t: naive.add_rms_norm(*t, eps),
        [x, stream if residual else None, draw(channels)],
        TOLERANCE[torch.float64],
    )


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scan_in_lower_precision(dtype: torch.dtype, reverse: bool) -> None:
    torch.manual_seed(0)
    inputs = scan_inputs(3, 37, 4, 4, dtype=dtype)
    compare(
        lambda *x: selective_scan(*x, delta_softplus=True, reverse=reverse),
        lambda *x: naive.scan(*x, softplus=True, reverse=reverse),
        inputs,
        TOLERANCE[dtype],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_convolution_and_norm_in_lower_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight, bias = draw(3, 37, 5, dtype=dtype), draw(5, 4, dtype=dtype), draw(5, dtype=dtype)
    compare(
        lambda *t: causal_conv1d(*t, activation="silu"),
        lambda *t: naive.conv(*t, silu=True),
        [x, weight, bias],
        TOLERANCE[dtype],
    )
    compare(
        lambda *t: add_rms_norm(*t, 1e-5)[0],
        lambda *t: naive.add_rms_norm(*t, 1e-5)[0],
        [x, draw(3, 37, 5).float(), bias],
        TOLERANCE[dtype],
    )


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scan_takes_parameters_of_another_precision_than_its_input(dtype: torch.dtype, bias_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    u, delta, A, B, C, D, z, bias = scan_inputs(2, 9, 3, 2)
    given_inputs = [x.to(dtype) for x in (u, delta)] + [A.float()] + [x.to(dtype) for x in (B, C)]
    inputs = [*given_inputs, D.float(), z.to(dtype), bias.to(bias_dtype)]
    compare(
        lambda *x: selective_scan(*x, delta_softplus=True),
        lambda *x: naive.scan(*x, softplus=True),
        inputs,
        TOLERANCE[dtype],
    )


def test_results_have_the_dtypes_that_are_promised() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        total = torch.float64 if dtype == torch.float64 else torch.float32
        inputs = [None if x is None else x.to(dtype) for x in scan_inputs(1, 3, 2, 2)]
        assert selective_scan(*inputs, delta_softplus=True).dtype == dtype
        assert causal_conv1d(draw(1, 3, 2, dtype=dtype), torch.ones(2, 2)).dtype == dtype
        normed, residual = add_rms_norm(draw(1, 3, 2, dtype=dtype), None, torch.ones(2), 1e-5)
        assert (normed.dtype, residual.dtype) == (dtype, total)
        again = add_rms_norm(draw(1, 3, 2, dtype=dtype), residual, torch.ones(2), 1e-5)
        assert (again[0].dtype, again[1].dtype) == (dtype, total)


def test_residual_keeps_what_bfloat16_would_lose() -> None:
    x, residual = torch.full((1, 1, 2), 2.0**-8, dtype=torch.bfloat16), torch.full((1, 1, 2), 256.0)
    total = add_rms_norm(x, residual, torch.ones(2), 1e-5)[1]
    assert total.eq(256 + 2.0**-8).all()
    assert residual.eq(256).all(), "the stream that came in is not overwritten"


def test_states_are_float32_for_bfloat16_input() -> None:
    # The state grows by 2^-9 in each of 512 steps; in bfloat16 it would stand still at 0.5.
    ones = torch.ones(1, 512, 1, dtype=torch.bfloat16)
    y = selective_scan(ones, ones * 2.0**-9, torch.zeros(1, 1), ones, ones)
    assert y[0, -1, 0] == 1.0


def test_autocast_changes_nothing() -> None:
    torch.manual_seed(0)
    inputs = [x.float() for x in scan_inputs(2, 11, 8, 8)]
    x, weight = torch.randn(2, 11, 8), torch.randn(8, 4)

    def run() -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (*inputs, x, weight)]
        *scan_in, conv_in, taps = leaves
        outs = [
            selective_scan(*scan_in, delta_softplus=True),
            causal_conv1d(conv_in, taps, activation="silu"),
            *add_rms_norm(conv_in, scan_in[0], taps[:, 0], 1e-5),
        ]
        return [*outs, *torch.autograd.grad(outs, leaves, [torch.ones_like(o) for o in outs])]

    plain = run()
    with torch.autocast("cpu", torch.bfloat16):
        cast = run()
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


@pytest.mark.usefixtures("small_tiles")
def test_reverse_is_the_flipped_sequence() -> None:
    torch.manual_seed(0)
    inputs = scan_inputs(2, 9, 3, 2)
    flipped = [x.flip(1) if x.ndim == 3 else x for x in inputs]
    torch.testing.assert_close(
        selective_scan(*inputs, delta_softplus=True, reverse=True),
        selective_scan(*flipped, delta_softplus=True).flip(1),
    )
    x, weight, bias = draw(2, 9, 3), draw(3, 4), draw(3)
    torch.testing.assert_close(
        causal_conv1d(x, weight, bias, reverse=True), causal_conv1d(x.flip(1), weight, bias).flip(1)
    )


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("reverse", [False, True])
def test_no_position_sees_beyond_its_side(reverse: bool) -> None:
    torch.manual_seed(0)
    inputs = scan_inputs(1, 9, 2, 2)
    weight = draw(2, 3)
    changed = [x.clone() if x.ndim == 3 else x for x in inputs]
    for x in changed:
        if x.ndim == 3:
            x[:, 4] += 1.0
    unseen = slice(5, None) if reverse else slice(None, 4)
    seen = slice(None, 4) if reverse else slice(5, None)
    for before, after in (
        [selective_scan(*x, delta_softplus=True, reverse=reverse) for x in (inputs, changed)],
        [causal_conv1d(x[0], weight, reverse=reverse) for x in (inputs, changed)],
    ):
        assert torch.equal(before[:, unseen], after[:, unseen])
        assert not torch.equal(before[:, seen], after[:, seen])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("step", [-1e4, -50.0, 0.0, 50.0, 1e4])
def test_extreme_steps_stay_finite(step: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    u, _, A, B, C, D, z, _ = (x.to(dtype).requires_grad_() for x in scan_inputs(1, 6, 3, 2))
    delta = torch.full((1, 6, 3), step, dtype=dtype, requires_grad=True)
    gate = (z * 1e4).detach().requires_grad_()
    y = selective_scan(u, delta, A, B, C, D, gate, delta_softplus=True)
    y.sum().backward()
    for x in (y, *(leaf.grad for leaf in (u, delta, A, B, C, D, gate))):
        assert x.isfinite().all()
    conv_in = torch.full((1, 4, 2), step, dtype=dtype, requires_grad=True)
    causal_conv1d(conv_in, torch.ones(2, 2), activation="silu").sum().backward()
    assert conv_in.grad.isfinite().all()


def test_norm_of_zeros_and_of_large_numbers_is_finite() -> None:
    for value in (0.0, 1e-20, 1e18):
        x = torch.full((1, 2, 4), value, requires_grad=True)
        normed, _ = add_rms_norm(x, None, torch.ones(4), 1e-5)
        normed.sum().backward()
        assert normed.isfinite().all()
        assert x.grad.isfinite().all()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_by_differences(reverse: bool) -> None:
    torch.manual_seed(0)
    inputs = [x.requires_grad_() for x in scan_inputs(2, 5, 2, 2)]
    assert torch.autograd.gradcheck(lambda *x: selective_scan(*x, delta_softplus=True, reverse=reverse), inputs)
    leaves = [draw(2, 5, 3).requires_grad_(), draw(3, 4).requires_grad_(), draw(3).requires_grad_()]
    assert torch.autograd.gradcheck(lambda *x: causal_conv1d(*x, activation="silu", reverse=reverse), leaves)
    stream = draw(2, 5, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, s, w: add_rms_norm(x, s, w, 1e-3), (leaves[0], stream, leaves[2]))


def test_only_the_gradients_asked_for() -> None:
    x, weight = draw(1, 3, 2).requires_grad_(), draw(2)
    _, total = add_rms_norm(x, None, weight, 1e-5)
    total.sum().backward()
    assert x.grad.eq(1).all()
    assert weight.grad is None


@pytest.mark.usefixtures("small_tiles")
def test_equal_input_gives_equal_bits() -> None:
    torch.manual_seed(0)
    inputs = [x.float() for x in scan_inputs(3, 21, 5, 4)]

    def run() -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        y = selective_scan(*leaves, delta_softplus=True)
        conv = causal_conv1d(y, leaves[2], leaves[5], activation="silu")
        out, total = add_rms_norm(conv, y, leaves[5], 1e-5)
        return [y, conv, out, total, *torch.autograd.grad(out.sum() + total.prod(), leaves)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def operator_calls() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    torch.manual_seed(0)
    ops = torch.ops.famba

    def leaf(*shape: int, layout: str = "contiguous") -> Tensor:
        return draw(*shape, layout=layout, dtype=torch.float32).requires_grad_()

    full = [x.float().requires_grad_() for x in scan_inputs(2, 5, 3, 2)]
    bare = [x.float().requires_grad_() for x in scan_inputs(2, 5, 3, 2)[:5]]
    strided = [x.requires_grad_() for x in scan_inputs(2, 5, 3, 2, layout="transposed", dtype=torch.float32)]
    state = torch.empty(0)
    norm_inputs = leaf(2, 5, 3), leaf(2, 5, 3), leaf(3), 1e-5, "reference"
    half = leaf(2, 5, 3).detach().bfloat16().requires_grad_()
    detached = [x.detach() for x in full]
    return {
        "scan": (ops.selective_scan, (*full, True, False, "reference")),
        "scan, reverse": (ops.selective_scan, (*full, False, True, "reference")),
        "scan, without options": (ops.selective_scan, (*bare, None, None, None, True, False, "reference")),
        "scan, not contiguous": (ops.selective_scan, (*strided, True, False, "reference")),
        "scan backward": (
            ops.selective_scan_backward,
            (detached[0], *detached, True, False, state, "reference"),
        ),
        "conv": (ops.causal_conv1d, (leaf(2, 5, 3), leaf(3, 4), leaf(3), True, False, "reference")),
        "conv, without bias": (ops.causal_conv1d, (leaf(2, 5, 3), leaf(3, 4), None, False, True, "reference")),
        "conv, not contiguous": (
            ops.causal_conv1d,
            (leaf(2, 5, 3, layout="transposed"), leaf(3, 4, layout="transposed"), leaf(3), True, False, "reference"),
        ),
        "conv backward": (
            ops.causal_conv1d_backward,
            (detached[0], detached[0], draw(3, 4).float(), detached[5], True, False, "reference"),
        ),
        "norm": (ops.add_rms_norm, norm_inputs),
        "norm, at the beginning": (ops.add_rms_norm, (half, None, leaf(3), 1e-5, "reference")),
        "norm, not contiguous": (
            ops.add_rms_norm,
            (leaf(2, 5, 3, layout="transposed"), leaf(2, 5, 3), leaf(3), 1e-5, "reference"),
        ),
        "norm backward": (
            ops.add_rms_norm_backward,
            (detached[0], detached[1], detached[0], detached[5], 1e-5, "reference"),
        ),
    }


@pytest.mark.parametrize("name", list(operator_calls()))
def test_ops_keep_the_rules_of_custom_operators(name: str) -> None:
    op, args = operator_calls()[name]
    with warnings.catch_warnings(), naive.as_users_run_it():
        warnings.simplefilter("ignore")
        torch.library.opcheck(op.default, args)


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_operations_are_counted(skip: bool, gate: bool) -> None:
    batch, length, channels, states = 2, 5, 3, 4
    inputs = scan_inputs(batch, length, channels, states, (skip, gate, True))
    with FlopCounterMode(display=False) as counter:
        selective_scan(*inputs, delta_softplus=True)
    assert counter.get_total_flops() == 2 * batch * length * channels * (4 * states + 1 + skip + gate)
    with FlopCounterMode(display=False) as counter:
        causal_conv1d(draw(batch, length, channels), draw(channels, 4))
    assert counter.get_total_flops() == 2 * batch * length * channels * 4


class PeakBytes(TorchDispatchMode):
    """Most bytes that tensors made under it held at once, a storage counted once."""

    def __init__(self, given_tensors: list[Tensor]) -> None:
        super().__init__()
        self.peak = 0
        self._outside = {x.untyped_storage().data_ptr() for x in given_tensors}
        self._alive: dict[int, weakref.ref[Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._alive[id(x)] = weakref.ref(x)
        self._alive = {k: ref for k, ref in self._alive.items() if ref() is not None}
        storages = {}
        for ref in self._alive.values():
            x = ref()
            if x is not None:
                storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        self.peak = max(self.peak, sum(n for place, n in storages.items() if place not in self._outside))
        return out


def test_states_of_the_whole_sequence_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, length, channels, states = 16, 32, 16, 32
    monkeypatch.setattr(reference, "_STEP_ELEMENTS", 2 * channels * states)
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", 8 * channels * states)
    inputs = [x.float() for x in scan_inputs(batch, length, channels, states)]
    all_states = 4 * batch * length * channels * states
    with torch.no_grad(), PeakBytes(inputs) as forward:
        y, state = reference.selective_scan(*inputs, True, False)
    assert y.nbytes <= forward.peak < all_states / 10
    with torch.no_grad(), PeakBytes([*inputs, y]) as backward:
        grads = reference.selective_scan_backward(y, *inputs, True, False, state)
    results = sum(g.nbytes for g in grads)
    assert results <= backward.peak < results + all_states / 5


def test_the_forward_scan_keeps_only_its_inputs() -> None:
    inputs = [x.float().requires_grad_() for x in scan_inputs(2, 32, 4, 16)]
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        selective_scan(*inputs, delta_softplus=True)
    assert sum(x.nbytes for x in kept) <= sum(x.nbytes for x in inputs)
