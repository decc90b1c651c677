"""Test what the Triton kernels share: two directions in one launch, fixed orders of sums, compiled constants."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops_helpers import TRITON, draw, scan_inputs
from torch import Tensor

from famba.ops.availability import triton_obstacle
from famba.ops.inputs import ScanInputs

pytestmark = pytest.mark.skipif(triton_obstacle() is not None, reason=f"triton: {triton_obstacle()}")
kernels = pytest.importorskip("famba.ops.triton.scan")
conv = pytest.importorskip("famba.ops.triton.conv")
launch = pytest.importorskip("famba.ops.triton.launch")
DEVICE = TRITON.device


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


def test_two_scans_in_one_launch_are_two_single_ones() -> None:
    torch.manual_seed(0)
    inputs = pair()
    dy = draw(2, 5, 5, dtype=torch.float32).to(DEVICE)
    scans = joined(*inputs, scale=0.5)
    y, (grads, all_dB, all_dC, parameters) = kernels.scan(scans), differentiated(scans, dy, with_y=True)
    assert torch.equal(y, grads.y)
    for k, given_inputs in enumerate(inputs):
        one = ScanInputs(*given_inputs, True, bool(k))
        single = kernels.selective_scan(one)[0]
        du, ddelta, dA, dB, dC, dD, dz, dbias = kernels.selective_scan_backward(dy / 2, one, y.new_empty(0))
        found = [y[k], grads.u[k], grads.delta[k], all_dB[k], all_dC[k], grads.z[k], *parameters[k]]
        wanted = [single / 2, du, ddelta, dB, dC, dz, dA, dD, dbias]
        for number, (a, b) in enumerate(zip(found, wanted, strict=True)):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=f"result {number} of direction {k}")


def test_scans_give_the_same_bits_twice() -> None:
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


def two_directions() -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    x, dys = torch.randn(2, 19, 2 * 5, device=DEVICE)[..., :5], torch.randn(2, 2, 19, 5, device=DEVICE)
    return x, dys, [torch.randn(5, 4, device=DEVICE) for _ in "ab"], [torch.randn(5, device=DEVICE) for _ in "ab"]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("reverses", [(False, True), (True, False)])
def test_two_convolutions_in_one_launch_are_two_single_ones(reverses: tuple[bool, bool], biased: bool) -> None:
    x, dys, weights, drawn = two_directions()
    biases = drawn if biased else [None, None]
    y = conv.convolve(x, weights, biases, True, reverses)
    # Written among other channels, which stay as they are.
    both = torch.ones(2, 19, 2 * 5, device=DEVICE)
    _, dx = both.chunk(2, dim=2)
    dweights, dbiases = conv.convolve_backward(dys, x, weights, biases, True, reverses, dx)
    assert (both[..., :5] == 1).all()
    singles = []
    for out, dy, weight, bias, reverse in zip(y, dys, weights, biases, reverses, strict=True):
        assert torch.equal(out, conv.causal_conv1d(x, weight, bias, True, reverse))
        singles.append(conv.causal_conv1d_backward(dy, x, weight, bias, True, reverse))
    torch.testing.assert_close(dx, singles[0][0] + singles[1][0], rtol=1e-5, atol=1e-5)
    for dweight, dbias, single in zip(dweights, dbiases, singles, strict=True):
        torch.testing.assert_close(dweight, single[1], rtol=1e-5, atol=1e-5)
        assert (dbias is None) is not biased
        if dbias is not None:
            torch.testing.assert_close(dbias, single[2], rtol=1e-5, atol=1e-5)


def test_convolutions_give_the_same_bits_twice() -> None:
    x, dys, weights, biases = two_directions()

    def run() -> list[Tensor]:
        y = conv.convolve(x, weights, biases, True, (False, True))
        dx = torch.empty(2, 19, 5, device=DEVICE)
        dweights, dbiases = conv.convolve_backward(dys, x, weights, biases, True, (False, True), dx)
        return [y, dx, *dweights, *(b for b in dbiases if b is not None)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
