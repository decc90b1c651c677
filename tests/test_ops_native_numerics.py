"""The native kernels, each instruction set of them, against the reference in float64: outputs and all gradients."""

from __future__ import annotations

from typing import Any

import naive
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_helpers import (
    LAYOUTS,
    TOLERANCE,
    compare,
    compare_native,
    draw,
    native,
    needs_kernels,
    positive_steps,
    scan_inputs,
    usable_isas,
)
from torch import Tensor

from famba.ops import add_rms_norm, causal_conv1d, selective_scan, use_backend
from famba.ops.native import kernels

pytestmark = needs_kernels
FEW_EXAMPLES = settings(max_examples=60, deadline=None)
LENGTHS = [0, 1, 2, 3, 15, 16, 17, 31, 33, 50]
# On both sides of every vector width, and of several vectors.
CHANNELS = [1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33]
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


def scan(softplus: bool = True, reverse: bool = False) -> Any:
    return lambda *x: selective_scan(*x, delta_softplus=softplus, reverse=reverse)


def conv(silu: bool = True, reverse: bool = False) -> Any:
    return lambda *x: causal_conv1d(*x, activation="silu" if silu else None, reverse=reverse)


def norm(eps: float = 1e-5) -> Any:
    return lambda *x: add_rms_norm(*x, eps)


def present(inputs: list[Tensor | None]) -> list[Tensor]:
    return [x for x in inputs if x is not None]


@FEW_EXAMPLES
@given(
    seed=st.integers(0, 2**31),
    batch=st.sampled_from([0, 1, 2, 3, 17]),
    length=st.sampled_from(LENGTHS),
    channels=st.sampled_from(CHANNELS),
    states=st.sampled_from([1, 2, 3, 4, 5, 16, 17, 32]),
    optional=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    softplus=st.booleans(),
    reverse=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    dtype=DTYPES,
    chunk=st.sampled_from([1, 4, 16, 33, 384]),
)
def test_scan_agrees_with_the_reference(
    seed: int,
    batch: int,
    length: int,
    channels: int,
    states: int,
    optional: tuple[bool, bool, bool],
    softplus: bool,
    reverse: bool,
    layout: str,
    dtype: torch.dtype,
    chunk: int,
) -> None:
    torch.manual_seed(seed)
    inputs = scan_inputs(batch, length, channels, states, optional, layout, dtype)
    if not softplus:
        inputs = positive_steps(inputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_CHUNK", chunk)
        compare_native(scan(softplus, reverse), inputs, TOLERANCE[dtype])


@FEW_EXAMPLES
@given(
    seed=st.integers(0, 2**31),
    batch=st.sampled_from([0, 1, 3, 17]),
    length=st.sampled_from(LENGTHS),
    channels=st.sampled_from(CHANNELS),
    width=st.integers(1, 6),
    bias=st.booleans(),
    silu=st.booleans(),
    reverse=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    dtype=DTYPES,
)
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
    x, weight = draw(batch, length, channels, layout=layout, dtype=dtype), draw(channels, width, layout=layout)
    inputs = [x, weight.to(dtype), draw(channels, layout=layout, dtype=dtype) if bias else None]
    compare_native(conv(silu, reverse), inputs, TOLERANCE[dtype])


@FEW_EXAMPLES
@given(
    seed=st.integers(0, 2**31),
    batch=st.sampled_from([0, 1, 3, 17]),
    length=st.sampled_from(LENGTHS),
    channels=st.sampled_from(CHANNELS),
    residual=st.booleans(),
    eps=st.sampled_from([1e-6, 1e-5, 0.1]),
    layout=st.sampled_from(LAYOUTS),
    dtype=DTYPES,
)
def test_norm_agrees_with_the_reference(
    seed: int, batch: int, length: int, channels: int, residual: bool, eps: float, layout: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(seed)
    # Of a single channel next to nothing is left, 1 - x^2 / (x^2 + eps), which no float32 gives exactly.
    eps = 0.1 if channels == 1 else eps
    x, stream = (draw(batch, length, channels, layout=layout) for _ in range(2))
    inputs = [x.to(dtype), stream.float() if residual else None, draw(channels, dtype=dtype)]
    compare_native(norm(eps), inputs, TOLERANCE[dtype])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("length", "states"), [(385, 16), (777, 3)])
def test_scan_longer_than_a_chunk(length: int, states: int, reverse: bool) -> None:
    torch.manual_seed(0)
    assert length > kernels._CHUNK
    compare_native(scan(reverse=reverse), scan_inputs(2, length, 9, states, dtype=torch.float32), 1e-5)


def test_scan_does_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    inputs = [x.float().requires_grad_() for x in present(scan_inputs(3, 100, 10, 5))]

    def run(chunk: int) -> list[Tensor]:
        monkeypatch.setattr(kernels, "_CHUNK", chunk)
        with native():
            y = selective_scan(*inputs, delta_softplus=True)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), inputs)]

    whole = run(384)
    for chunk in (1, 7, 32, 99):
        torch.testing.assert_close(run(chunk), whole, rtol=1e-4, atol=1e-4)


def test_norm_of_more_rows_than_a_task_takes() -> None:
    torch.manual_seed(0)
    x, stream, weight = draw(3, 300, 9, dtype=torch.float32), draw(3, 300, 9).float(), draw(9).float()
    compare_native(norm(), [x, stream, weight], 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_views_of_a_projection_serve_as_they_are(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    channels, states = 11, 3
    projected = draw(2, 19, 3 * channels + 2 * states + 1, dtype=dtype)
    u, delta, z, B, C, _ = projected.split([channels] * 3 + [states] * 2 + [1], dim=-1)
    A, D, bias = -draw(channels, states).exp().float(), draw(channels).float(), draw(channels).float()
    compare_native(scan(), [u, delta, A, B, C, D, z, bias], TOLERANCE[dtype])
    compare_native(conv(), [z, draw(channels, 4).float(), bias], TOLERANCE[dtype])
    # Every second image and every third step, of which neither begins at an aligned address.
    inputs = [u[::2, 1::3], delta[::2, 1::3], A, B[::2, 1::3], C[::2, 1::3], D, z[::2, 1::3], bias]
    compare_native(scan(), inputs, TOLERANCE[dtype])
    compare_native(norm(), [u[::2, 1::3], None, D], TOLERANCE[dtype])


def test_gradients_that_come_in_as_views() -> None:
    torch.manual_seed(0)
    inputs = [x.float() for x in present(scan_inputs(2, 9, 5, 3))]

    def run(sum_of: Any) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        outs = [conv()(leaves[0], leaves[2], leaves[5]), scan()(*leaves), *norm()(leaves[0], leaves[1], leaves[5])]
        return list(torch.autograd.grad(sum(sum_of(x) for x in outs), leaves))

    weight = torch.randn(5, 9, 2)
    for sum_of in (Tensor.sum, lambda x: (x.T if x.ndim < 3 else x.permute(2, 1, 0)).mul(weight).sum()):
        with use_backend("reference"):
            wanted = run(sum_of)
        for isa in usable_isas():
            with native(isa):
                torch.testing.assert_close(run(sum_of), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parameters_of_another_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    u, delta, A, B, C, D, z, bias = present(scan_inputs(2, 21, 5, 3, dtype=dtype))
    inputs = [u, delta, A.float(), B, C, D.double(), z, bias.float()]
    compare_native(scan(), inputs, TOLERANCE[dtype])
    compare_native(conv(), [u, draw(5, 4), D.float()], TOLERANCE[dtype])
    compare_native(norm(), [u, draw(2, 21, 5), D.float()], TOLERANCE[dtype])


@pytest.mark.parametrize("op", ["scan", "conv", "norm"])
@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0), (0, 0, 0)], ids=str)
def test_nothing_in_nothing_out(op: str, shape: tuple[int, int, int]) -> None:
    # What a larger call before leaves in scratch memory must not come out.
    for size in (shape, (3, 20, 9), shape):
        torch.manual_seed(0)
        if op == "scan":
            compare_native(scan(), scan_inputs(*size, 4, dtype=torch.float32), 1e-5)
        elif op == "conv":
            compare_native(conv(), [draw(*size).float(), draw(size[2], 4).float(), draw(size[2]).float()], 1e-5)
        elif size[2]:
            compare_native(norm(), [draw(*size).float(), draw(*size).float(), draw(size[2]).float()], 1e-5)


def test_scan_without_states_is_the_skip() -> None:
    compare_native(scan(), scan_inputs(2, 9, 5, 0, dtype=torch.float32), 1e-5)


EXTREMES = {
    "tiny steps": {"delta": 1e-30},
    "no step": {"delta": 0.0},
    "large steps": {"delta": 1e4},
    "negative steps under softplus": {"delta": -1e4, "softplus": True},
    "large steps under softplus": {"delta": 1e4, "softplus": True},
    "steps where softplus dies away": {"delta": -88.0, "softplus": True},
    "fast decay": {"delta": 0.5, "A": -1e4},
    "fastest decay": {"delta": 1e4, "A": -1e4},
    "decay near the smallest number": {"delta": 1.0, "A": -87.0},
    "no decay": {"delta": 0.5, "A": 0.0},
    "growth": {"delta": 0.5, "A": 2.0},
    "growth to infinity": {"delta": 1.0, "A": 40.0},
    "growth at once to infinity": {"delta": 1.0, "A": 1e4},
    "growth under softplus": {"delta": 1e4, "A": 1e4, "softplus": True},
    "open gate": {"delta": 0.5, "z": 1e4},
    "closed gate": {"delta": 0.5, "z": -1e4},
    "gate where silu dies away": {"delta": 0.5, "z": -88.0},
    "tiny input": {"delta": 0.5, "u": 1e-30},
    "huge input": {"delta": 0.5, "u": 1e30},
}


@pytest.mark.parametrize("name", EXTREMES)
def test_extremes_are_finite_where_the_reference_is(name: str) -> None:
    torch.manual_seed(0)
    values = dict(EXTREMES[name])
    softplus = bool(values.pop("softplus", False))
    names = ["u", "delta", "A", "B", "C", "D", "z", "delta_bias"]
    drawn = present(scan_inputs(2, 18, 9, 5, dtype=torch.float32))
    inputs = dict(zip(names, drawn, strict=True)) | {"delta_bias": torch.zeros(9)}
    for key, value in values.items():
        # Some channels stay ordinary beside the extreme ones: a vector holds both.
        x = inputs[key].abs() if key == "delta" else inputs[key].clone()
        x.movedim(0 if key == "A" else -1, 0)[::2] = value
        inputs[key] = x

    def run() -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs.values()]
        y = scan(softplus)(*leaves)
        return [y.detach(), *torch.autograd.grad(y.sum(), leaves)]

    with use_backend("reference"):
        wanted = run()
    for isa in usable_isas():
        with native(isa):
            found = run()
        for of, got, want in zip(["y", *names], found, wanted, strict=True):
            assert not (got.isnan() & ~want.isnan()).any(), f"{isa}: NaN in {of}"
            assert not (~got.isfinite() & want.isfinite()).any(), f"{isa}: infinity in {of}"
            sizes = want[want.isfinite()].abs()
            scale = max(sizes.max().item(), 1e-3) if sizes.numel() else 1.0
            both = got.isfinite() & want.isfinite()
            assert ((got - want)[both].abs() <= 2e-5 * scale).all(), f"{isa}: {of} differs"


@pytest.mark.parametrize("value", [0.0, 1e-30, -88.0, 88.0, 1e4, -1e4, 1e30, -1e30])
def test_extremes_of_convolution_and_norm(value: float) -> None:
    torch.manual_seed(0)

    def run() -> list[Tensor]:
        x = torch.full((2, 5, 9), value)
        x[..., 1] = 0.5
        leaves = [x.requires_grad_(), torch.ones(9, 3, requires_grad=True)]
        y = conv()(*leaves)
        grads = torch.autograd.grad(y.sum(), leaves)
        outs = norm()(leaves[0], None, leaves[1][:, 0])
        return [y.detach(), *grads, *(o.detach() for o in outs), *torch.autograd.grad(outs[0].sum(), leaves)]

    with use_backend("reference"):
        wanted = run()
    for isa in usable_isas():
        with native(isa):
            torch.testing.assert_close(run(), wanted, rtol=1e-4, atol=1e-6)


def test_nan_stays_nan_and_where_it_belongs() -> None:
    torch.manual_seed(0)
    for place, dtype in [(p, d) for p in range(8) for d in (torch.float32, torch.bfloat16)]:
        inputs = present(scan_inputs(2, 9, 5, 3, dtype=dtype))
        inputs[place].view(-1)[1] = torch.nan
        with use_backend("reference"):
            wanted = scan()(*inputs).isnan()
        for isa in usable_isas():
            with native(isa):
                assert torch.equal(scan()(*inputs).isnan(), wanted), f"{isa}, input {place}, {dtype}"


def test_bfloat16_is_rounded_as_torch_rounds() -> None:
    torch.manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (4096,), dtype=torch.int32)
    bits[::2] = bits[::2] & ~0xFFFF | 0x8000  # exactly between two neighbours
    numbers = bits.view(torch.float32)
    skip = numbers[numbers.isfinite() & (numbers.abs() > 1e-30)]
    # One step of no length: what comes out is the skip, in float32 until it is stored.
    u, states = (torch.ones(1, 1, n, dtype=torch.bfloat16) for n in (len(skip), 1))
    for isa in usable_isas():
        with native(isa):
            y = selective_scan(u, u * 0, torch.zeros(len(skip), 1), states, states, skip)
            assert torch.equal(y[0, 0], skip.bfloat16()), isa


def test_the_loop_agrees_too() -> None:
    torch.manual_seed(0)
    inputs = scan_inputs(2, 33, 9, 5, dtype=torch.float32)
    for isa in usable_isas():
        with native(isa):
            compare(scan(), lambda *x: naive.scan(*x, softplus=True), inputs, 1e-5)
            compare(conv(), lambda *x: naive.conv(*x, silu=True), [inputs[0], draw(9, 4).float()], 1e-5)
            compare(norm(), lambda *x: naive.add_rms_norm(*x, 1e-5), [inputs[0], inputs[1], inputs[5]], 1e-5)
