"""The Triton scan against the reference in float64, outputs and all gradients, by the interpreter or a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ops_helpers import LAYOUTS, TOLERANCE, compare, draw, positive_steps, scan_inputs
from test_ops_native_numerics import EXTREMES
from torch import Tensor

from famba.ops import availability, selective_scan, use_backend

pytestmark = [
    pytest.mark.skipif(availability.triton_obstacle() is not None, reason=f"triton: {availability.triton_obstacle()}"),
    # numpy says so where the interpreter meets infinity.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in reduce:RuntimeWarning"),
]
kernels = pytest.importorskip("famba.ops.triton.scan")
launch = pytest.importorskip("famba.ops.triton.launch")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCES = TOLERANCE | {torch.float16: 2e-3}
# The interpreter takes a while for each state of each tile of steps.
EXAMPLES = settings(max_examples=6, deadline=None)


def scan(backend: str, softplus: bool = True, reverse: bool = False) -> Any:
    def run(*inputs: Tensor | None) -> Tensor:
        with use_backend(backend):
            return selective_scan(*inputs, delta_softplus=softplus, reverse=reverse)

    return run


def check(inputs: list[Tensor | None], softplus: bool = True, reverse: bool = False) -> None:
    assert inputs[0] is not None
    placed = [None if x is None else x.to(DEVICE) for x in inputs]
    tolerance = TOLERANCES[inputs[0].dtype]
    compare(scan("triton", softplus, reverse), scan("reference", softplus, reverse), placed, tolerance, floor=0.1)


@EXAMPLES
@given(
    seed=st.integers(0, 2**31),
    batch=st.sampled_from([0, 1, 2]),
    length=st.sampled_from([0, 1, 2, 5, 9]),
    channels=st.sampled_from([1, 5, 8, 33]),
    states=st.sampled_from([1, 3, 4]),
    optional=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    softplus=st.booleans(),
    reverse=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    tile=st.sampled_from([2, 4, 8]),
)
@example(0, 2, 1, 5, 3, (True, True, True), True, True, "transposed", torch.float32, 8)
@example(0, 2, 9, 8, 1, (False, False, False), False, False, "strided", torch.float16, 4)
@example(0, 1, 5, 33, 3, (True, True, True), True, False, "expanded", torch.bfloat16, 2)
def test_it_agrees_with_the_reference(
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
    tile: int,
) -> None:
    torch.manual_seed(seed)
    inputs = scan_inputs(batch, length, channels, states, optional, layout, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_TILE", tile)
        check(inputs if softplus else positive_steps(inputs), softplus, reverse)


@pytest.mark.parametrize("shape", [(1, 15, 5, 2), (1, 16, 5, 1), (1, 17, 3, 1), (1, 2, 5, 16), (1, 1, 3, 32)])
@pytest.mark.parametrize("reverse", [False, True])
def test_lengths_beside_a_tile_and_many_states(shape: tuple[int, int, int, int], reverse: bool) -> None:
    torch.manual_seed(0)
    check(scan_inputs(*shape, dtype=torch.float32), reverse=reverse)


def test_channels_of_several_programs() -> None:
    torch.manual_seed(0)
    check(scan_inputs(1, 3, 2 * kernels._BLOCK + 1, 2, dtype=torch.float32))


def test_without_states_it_is_the_skip() -> None:
    torch.manual_seed(0)
    check(scan_inputs(2, 9, 5, 0, dtype=torch.float32))


def test_activations_and_parameters_of_different_dtypes() -> None:
    torch.manual_seed(0)
    u, *rest = scan_inputs(1, 5, 4, 2, dtype=torch.float32)
    assert u is not None
    placed = [x if x is None else x.to(DEVICE) for x in [u.bfloat16(), *rest]]
    compare(scan("triton"), scan("reference"), placed, 1e-2, floor=0.1)


@pytest.mark.parametrize("name", EXTREMES)
def test_extremes_are_finite_where_the_reference_is(name: str) -> None:
    torch.manual_seed(0)
    values = dict(EXTREMES[name])
    softplus = bool(values.pop("softplus", False))
    names = ["u", "delta", "A", "B", "C", "D", "z", "delta_bias"]
    inputs = dict(zip(names, scan_inputs(1, 10, 5, 3, dtype=torch.float32), strict=True))
    inputs["delta_bias"] = torch.zeros(5)
    for key, value in values.items():
        # Some channels stay ordinary beside the extreme ones.
        x = inputs[key].abs() if key == "delta" else inputs[key].clone()
        x.movedim(0 if key == "A" else -1, 0)[::2] = value
        inputs[key] = x

    def run(backend: str) -> list[Tensor]:
        leaves = [x.to(DEVICE, copy=True).requires_grad_() for x in inputs.values()]
        y = scan(backend, softplus)(*leaves)
        return [y.detach(), *torch.autograd.grad(y.sum(), leaves)]

    for of, got, want in zip(["y", *names], run("triton"), run("reference"), strict=True):
        assert not (got.isnan() & ~want.isnan()).any(), f"NaN in {of}"
        assert not (~got.isfinite() & want.isfinite()).any(), f"infinity in {of}"
        sizes = want[want.isfinite()].abs()
        scale = max(sizes.max().item(), 1e-3) if sizes.numel() else 1.0
        both = got.isfinite() & want.isfinite()
        assert ((got - want)[both].abs() <= 2e-5 * scale).all(), f"{of} differs"


def test_nan_stays_nan_and_where_it_belongs() -> None:
    torch.manual_seed(0)
    for place in range(8):
        inputs = [x.to(DEVICE) for x in scan_inputs(1, 4, 3, 3, dtype=torch.float32) if x is not None]
        inputs[place].view(-1)[1] = torch.nan
        assert torch.equal(scan("triton")(*inputs).isnan(), scan("reference")(*inputs).isnan()), f"input {place}"


def test_small_step_sizes_keep_their_digits_and_so_do_their_slopes() -> None:
    delta = torch.linspace(-80, 30, 111, device=DEVICE).view(1, 1, -1).requires_grad_()
    ones, one = torch.ones_like(delta), torch.ones(1, 1, 1, device=DEVICE)
    # A single step of a state that starts at 0: what comes out is the step size.
    y = scan("triton")(ones, delta, torch.zeros(111, 1, device=DEVICE), one, one)
    (slope,) = torch.autograd.grad(y.sum(), delta)
    exact = delta.detach().double()
    torch.testing.assert_close(y.detach().double(), -torch.nn.functional.logsigmoid(-exact), rtol=2e-6, atol=0)
    torch.testing.assert_close(slope.double(), exact.sigmoid(), rtol=2e-6, atol=0)


def pair(length: int = 5, batch: int = 2) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs of two scans that share z."""
    forward, backward = (
        [x.to(DEVICE) for x in scan_inputs(batch, length, 5, 3, dtype=torch.float32) if x is not None] for _ in range(2)
    )
    backward[6] = forward[6]
    return forward, backward


def joined(forward: list[Tensor], backward: list[Tensor], scale: float = 1.0) -> Any:
    u, delta, _, B, C, _, _, _ = (torch.stack(x) for x in zip(forward, backward, strict=True))
    parameters = kernels.stack_parameters(*([forward[i], backward[i]] for i in (2, 5, 7)))
    return kernels.Scans(u, delta, B, C, forward[6], parameters, (False, True), scale=scale)


def differentiated(scans: Any, dy: Tensor, with_y: bool = False) -> tuple[Any, Tensor, Tensor, list[Any]]:
    """Gradients of two scans, of B and C, which are written among other columns, and of the parameters."""
    shape = scans.u.shape
    _, dB, dC = torch.full((*shape[:3], 8), torch.nan, device=DEVICE).split([2, 3, 3], dim=3)
    parameters = [kernels.Parameters(*(torch.empty(*x, device=DEVICE) for x in ((5, 3), (5,), (5,)))) for _ in range(2)]
    return kernels.scan_backward(scans, dy, dB, dC, parameters, with_y), dB, dC, parameters


def test_two_directions_in_one_launch_are_two_scans() -> None:
    torch.manual_seed(0)
    inputs = pair()
    dy = draw(2, 5, 5, dtype=torch.float32).to(DEVICE)
    scans = joined(*inputs, scale=0.5)
    y, (grads, all_dB, all_dC, parameters) = kernels.scan(scans), differentiated(scans, dy, with_y=True)
    assert torch.equal(y, grads.y)
    for k, given_inputs in enumerate(inputs):
        single = kernels.selective_scan(*given_inputs, True, bool(k))[0]
        du, ddelta, dA, dB, dC, dD, dz, dbias = kernels.selective_scan_backward(
            dy / 2, *given_inputs, True, bool(k), y.new_empty(0)
        )
        found = [y[k], grads.u[k], grads.delta[k], all_dB[k], all_dC[k], grads.z[k], *parameters[k]]
        wanted = [single / 2, du, ddelta, dB, dC, dz, dA, dD, dbias]
        for number, (a, b) in enumerate(zip(found, wanted, strict=True)):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=f"result {number} of direction {k}")


def test_the_same_bits_twice() -> None:
    torch.manual_seed(0)
    scans, dy = joined(*pair()), draw(2, 5, 5, dtype=torch.float32).to(DEVICE)

    def run() -> list[Tensor]:
        grads, dB, dC, parameters = differentiated(scans, dy, with_y=True)
        return [*vars(grads).values(), dB, dC, *parameters[0], *parameters[1]]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_launches_and_that_neither_length_nor_batch_is_compiled_in() -> None:
    def constants(length: int, batch: int) -> list[tuple[str, dict[str, object]]]:
        scans = joined(*pair(length, batch))
        with launch.noted() as launches:
            kernels.scan(scans)
            differentiated(scans, scans.u[0])
        return [
            (made.kernel.name, {k: v for k, v in made.arguments.items() if k in made.kernel.constants})
            for made in launches
        ]

    found = constants(5, 2)
    assert [name for name, _ in found] == [
        "scan_forward",
        "scan_forward",
        "scan_backward",
        "state_sums",
        "parameter_sums",
    ]
    assert found == constants(17, 3) == constants(1, 1)
