"""The selective scan by each backend against a loop in float64: outputs, gradients, extremes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops_helpers import (
    LAYOUTS,
    TRITON,
    USABLE_ISAS,
    Backend,
    all_backends,
    draw,
    every_op,
    examples,
    loop_conv,
    loop_norm,
    loop_scan,
    native,
    needs_kernels,
    positive_steps,
    results,
    scan_inputs,
)
from torch import Tensor

from famba.errors import ConfigError
from famba.ops import selective_scan, use_backend
from famba.ops.inputs import ScanInputs

# Beside the sizes at which a backend cuts its work: (batch, length, channels, states).
SHAPES = {
    "reference": [(3, 37, 4, 4)],
    "native": [(2, 385, 9, 16), (2, 777, 9, 3)],
    "triton": [(1, 15, 5, 2), (1, 16, 5, 1), (1, 17, 3, 1), (1, 2, 5, 16), (1, 1, 3, 32), (1, 3, 257, 2)],
    "cuda": [(1, 5, channels, 16) for channels in (64, 96, 129, 200)] + [(1, 19, 3, n) for n in (7, 9, 17, 64, 256)],
    "mamba_ssm": [(1, 2049, 2, 1)],
}


def present(inputs: list[Tensor | None]) -> list[Tensor]:
    return [x for x in inputs if x is not None]


@all_backends()
def test_it_agrees_with_the_loop(backend: Backend) -> None:
    @examples(backend)
    @given(
        seed=st.integers(0, 2**31),
        shape=st.tuples(*map(st.sampled_from, ((0, 1, 2, 3), backend.lengths, backend.channels, backend.states))),
        optional=st.tuples(st.booleans(), st.booleans(), st.booleans()),
        softplus=st.booleans(),
        reverse=st.booleans(),
        layout=st.sampled_from(LAYOUTS),
        dtype=st.sampled_from(backend.dtypes),
        tile=st.sampled_from(backend.tiles),
    )
    def check(seed: int, shape: Any, optional: Any, softplus: bool, reverse: bool, layout: str, **how: Any) -> None:
        torch.manual_seed(seed)
        inputs = scan_inputs(*shape, optional, layout, how["dtype"])
        backend.check(*loop_scan(softplus, reverse), inputs if softplus else positive_steps(inputs), tile=how["tile"])

    check()


@all_backends(slow="triton")
@pytest.mark.parametrize("reverse", [False, True])
def test_sizes_beside_those_at_which_work_is_cut(backend: Backend, reverse: bool) -> None:
    shapes = SHAPES[backend.name][reverse::2] if backend is TRITON else SHAPES[backend.name]
    for shape in shapes:
        for gate in (False, True) if backend.name == "mamba_ssm" else (True,):
            inputs = scan_inputs(*shape, (True, gate, True), dtype=torch.float32)
            # Sums over a thousand steps and more are rounded as often.
            backend.check(*loop_scan(True, reverse), inputs, tolerance=3e-5 if shape[1] > 1000 else 1e-5)
    if backend.name == "native":
        backend.check(*loop_scan(True, reverse), scan_inputs(17, 5, 9, 4, dtype=torch.float32))


@all_backends()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs_of_different_dtypes(backend: Backend, dtype: torch.dtype) -> None:
    u, delta, A, B, C, D, z, bias = present(scan_inputs(2, 7, 5, 3, dtype=dtype))
    backend.check(*loop_scan(), [u, delta, A.float(), B, C, D.double(), z, bias.float()])
    # Worked out from what was given: nothing is rounded to the coarsest.
    backend.check(*loop_scan(), [u, delta.float(), A.float(), B.float(), C, D, z, bias])


@all_backends()
def test_views_of_a_projection_serve_as_they_are(backend: Backend) -> None:
    channels, states = 11, 3
    projected = draw(2, 9, 3 * channels + 2 * states + 1, dtype=torch.bfloat16)
    u, delta, z, B, C, _ = projected.split([channels] * 3 + [states] * 2 + [1], dim=-1)
    A, D, bias = -draw(channels, states).exp().float(), draw(channels).float(), draw(channels).float()
    backend.check(*loop_scan(), [u, delta, A, B, C, D, z, bias])
    # Every second image and every third step, of which neither begins at an aligned address.
    every = (slice(None, None, 2), slice(1, None, 3))
    backend.check(*loop_scan(), [u[every], delta[every], A, B[every], C[every], D, z[every], bias])


@all_backends()
def test_gradients_that_come_in_as_views(backend: Backend) -> None:
    inputs = backend.place(present(scan_inputs(2, 9, 5, 3, dtype=torch.float32)))
    weight = torch.randn(5, 9, 2, device=backend.device)
    for sum_of in (torch.sum, lambda x: x.permute(2, 1, 0).mul(weight).sum()):
        with use_backend("reference"):
            wanted = results(every_op, inputs, sum_of)
        with backend.running():
            torch.testing.assert_close(results(every_op, inputs, sum_of), wanted, rtol=1e-4, atol=1e-4)


@all_backends()
@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0)], ids=str)
def test_nothing_in_nothing_out_of_each_op(backend: Backend, shape: tuple[int, int, int]) -> None:
    # What a larger call before leaves in scratch memory must not come out.
    for size in (shape, (3, 6, 9), shape):
        backend.check(*loop_scan(), scan_inputs(*size, 4, dtype=torch.float32))
        x, bias = draw(*size).float(), draw(size[2]).float()
        backend.check(*loop_conv(), [x, draw(size[2], 4).float(), bias])
        if size[2]:
            backend.check(*loop_norm(), [x, draw(*size).float(), bias])


@all_backends("cuda", "mamba_ssm")
@pytest.mark.parametrize("states", [0, 257])
def test_numbers_of_states_that_a_backend_does_not_take_are_named(backend: Backend, states: int) -> None:
    with backend.running(), pytest.raises(ConfigError, match=f"{states} states, .* takes 1 to 256") as error:
        selective_scan(*backend.place(scan_inputs(1, 3, 2, states, dtype=torch.float32)))
    assert str(error.value).endswith("use backend 'triton' or 'reference'")


EXTREMES = {
    "tiny steps": {"delta": 1e-30},
    "no step": {"delta": 0.0},
    "large steps": {"delta": 1e4},
    "negative steps under softplus": {"delta": -1e4, "softplus": True},
    "steps where softplus dies away": {"delta": -88.0, "softplus": True},
    "fast decay": {"delta": 0.5, "A": -1e4},
    "fastest decay": {"delta": 1e4, "A": -1e4},
    "decay near the smallest number": {"delta": 1.0, "A": -87.0},
    "growth to infinity": {"delta": 1.0, "A": 40.0},
    "growth at once to infinity": {"delta": 1.0, "A": 1e4},
    "growth under softplus": {"delta": 1e4, "A": 1e4, "softplus": True},
    "closed gate": {"delta": 0.5, "z": -1e4},
    "gate where silu dies away": {"delta": 0.5, "z": -88.0},
    "tiny input": {"delta": 0.5, "u": 1e-30},
    "huge input": {"delta": 0.5, "u": 1e30},
}


@all_backends("native", "triton", "cuda")
@pytest.mark.parametrize("name", EXTREMES)
def test_extremes_are_finite_where_the_reference_is(backend: Backend, name: str) -> None:
    values: dict[str, Any] = dict(EXTREMES[name])
    softplus = bool(values.pop("softplus", False))
    small = backend is TRITON
    drawn = present(scan_inputs(*((1, 10, 5, 3) if small else (2, 18, 9, 5)), dtype=torch.float32))
    inputs = dict(zip(ScanInputs._fields, drawn, strict=False))
    inputs["delta_bias"] = torch.zeros_like(inputs["delta_bias"])
    for key, value in values.items():
        # Some channels stay ordinary beside the extreme ones: a vector holds both.
        x = inputs[key].abs() if key == "delta" else inputs[key].clone()
        x.movedim(0 if key == "A" else -1, 0)[::2] = value
        inputs[key] = x
    op, tensors = loop_scan(softplus)[0], [x.to(backend.device) for x in inputs.values()]
    with use_backend("reference"):
        wanted = results(op, tensors)
    with backend.running():
        found = results(op, tensors)
    for of, got, want in zip(["y", *inputs], found, wanted, strict=True):
        assert not (got.isnan() & ~want.isnan()).any(), f"NaN in {of}"
        assert not (~got.isfinite() & want.isfinite()).any(), f"infinity in {of}"
        sizes = want[want.isfinite()].abs()
        scale = max(sizes.max().item(), 1e-3) if sizes.numel() else 1.0
        both = got.isfinite() & want.isfinite()
        assert ((got - want)[both].abs() <= 2e-5 * scale).all(), f"{of} differs"


@all_backends("native", "triton", "cuda")
def test_nan_stays_nan_and_where_it_belongs(backend: Backend) -> None:
    for place, dtype in [(p, d) for p in range(8) for d in backend.dtypes[:2]]:
        inputs = backend.place(present(scan_inputs(1, 5, 3, 3, dtype=dtype)))
        inputs[place].view(-1)[1] = torch.nan
        with use_backend("reference"):
            wanted = loop_scan()[0](*inputs).isnan()
        with backend.running():
            assert torch.equal(loop_scan()[0](*inputs).isnan(), wanted), f"input {place}, {dtype}"


@all_backends("triton", "cuda")
def test_small_step_sizes_keep_their_digits_and_so_do_their_slopes(backend: Backend) -> None:
    delta = torch.linspace(-80, 30, 111, device=backend.device).view(1, 1, -1).requires_grad_()
    ones, one = torch.ones_like(delta), torch.ones(1, 1, 1, device=backend.device)
    # A single step of a state that starts at 0: what comes out is the step size.
    with backend.running():
        y = selective_scan(ones, delta, torch.zeros(111, 1, device=backend.device), one, one, delta_softplus=True)
        (slope,) = torch.autograd.grad(y.sum(), delta)
    exact = delta.detach().double()
    torch.testing.assert_close(y.detach().double(), -torch.nn.functional.logsigmoid(-exact), rtol=2e-6, atol=0)
    torch.testing.assert_close(slope.double(), exact.sigmoid(), rtol=2e-6, atol=0)


@all_backends("reference", "native", "mamba_ssm")
def test_states_are_float32_for_bfloat16_input(backend: Backend) -> None:
    # The state grows by 2^-9 in each of 512 steps; in bfloat16 it would stand still at 0.5.
    ones = torch.ones(1, 512, 1, dtype=torch.bfloat16)
    with backend.running():
        assert selective_scan(ones, ones * 2.0**-9, torch.zeros(1, 1), ones, ones)[0, -1, 0] == 1.0


@needs_kernels
def test_bfloat16_is_rounded_as_torch_rounds() -> None:
    torch.manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (4096,), dtype=torch.int32)
    bits[::2] = bits[::2] & ~0xFFFF | 0x8000  # exactly between two neighbours
    numbers = bits.view(torch.float32)
    skip = numbers[numbers.isfinite() & (numbers.abs() > 1e-30)]
    # One step of no length: what comes out is the skip, in float32 until it is stored.
    u, states = (torch.ones(1, 1, n, dtype=torch.bfloat16) for n in (len(skip), 1))
    for isa in USABLE_ISAS:
        with native(isa):
            y = selective_scan(u, u * 0, torch.zeros(len(skip), 1), states, states, skip)
            assert torch.equal(y[0, 0], skip.bfloat16()), isa
