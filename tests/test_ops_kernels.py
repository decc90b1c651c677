"""Scan, convolution, norm and fusing by each backend against loops in float64: results, gradients, extremes."""

from __future__ import annotations

from typing import Any

import naive
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops_helpers import (
    LAYOUTS,
    TOLERANCE,
    TRITON,
    USABLE_ISAS,
    Backend,
    all_backends,
    assert_close,
    draw,
    every_op,
    examples,
    loop_conv,
    loop_norm,
    loop_scan,
    native,
    needs_kernels,
    results,
    scan_inputs,
)
from torch import Tensor

from famba.errors import BackendError, ConfigError
from famba.ops import add_rms_norm, causal_conv1d, fuse_tokens, match_tokens, selective_scan, use_backend
from famba.ops.inputs import ScanInputs

# Those with a norm, and with fusing, of their own.
OWN = ("reference", "native", "triton")
# Beside the sizes at which a backend cuts its work: (batch, length, channels, states).
SHAPES = {
    "reference": [(3, 37, 4, 4)],
    "native": [(2, 385, 9, 16), (2, 777, 9, 3)],
    "triton": [(1, 15, 5, 2), (1, 16, 5, 1), (1, 17, 3, 1), (1, 2, 5, 16), (1, 1, 3, 32), (1, 3, 257, 2)],
    "cuda": [(1, 5, channels, 16) for channels in (64, 96, 129, 200)] + [(1, 19, 3, n) for n in (7, 9, 17, 64, 256)],
    "mamba_ssm": [(1, 2049, 2, 1)],
}


@all_backends()
@pytest.mark.parametrize("op", ["scan", "conv", "norm", "fuse"])
def test_it_agrees_with_the_loop(backend: Backend, op: str) -> None:
    if op in ("norm", "fuse") and backend.name not in OWN:
        pytest.skip(f"backend {backend.name!r} takes this op from Triton, where it is tested")

    @examples(backend)
    @given(
        seed=st.integers(0, 2**31),
        shape=st.tuples(*map(st.sampled_from, ((0, 1, 2, 3, 17), backend.lengths, backend.channels))),
        states=st.sampled_from(backend.states),
        width=st.sampled_from(backend.widths),
        has=st.tuples(st.booleans(), st.booleans(), st.booleans()),
        activated=st.booleans(),
        reverse=st.booleans(),
        layout=st.sampled_from(LAYOUTS),
        dtype=st.sampled_from(backend.dtypes),
        tile=st.sampled_from(backend.tiles),
    )
    def check(
        seed: int, shape: Any, states: int, width: int, has: Any, activated: bool, reverse: bool, **how: Any
    ) -> None:
        torch.manual_seed(seed)
        tile, dtype, channels = how.pop("tile"), how["dtype"], shape[2]
        x = draw(*shape, **how)
        if op == "scan":
            inputs = scan_inputs(min(shape[0], 3), *shape[1:], states, has, **how)
            if not activated:  # by positive step sizes and their bias the scan stays stable without softplus too
                inputs = [x.abs() if i in (1, 7) and x is not None else x for i, x in enumerate(inputs)]
            backend.check(*loop_scan(activated, reverse), inputs, tile=tile)
        elif op == "conv":
            weight, bias = draw(channels, width, **how), draw(channels, **how) if has[0] else None
            backend.check(*loop_conv(activated, reverse), [x, weight, bias])
        elif op == "norm":
            # Of a single channel next to nothing is left, 1 - x^2 / (x^2 + eps), which no float32 gives exactly.
            eps = 0.1 if channels == 1 else 1e-5
            stream = draw(*shape, layout=how["layout"]).to(torch.promote_types(dtype, torch.float32))
            backend.check(*loop_norm(eps), [x, stream if has[0] else None, draw(channels, dtype=dtype)])
        else:
            fused = max(1, shape[1] - 2)
            check_fusing(backend, x, torch.randint(0, fused, shape[:2]), fused)

    check()


def check_fusing(backend: Backend, x: Tensor, places: Tensor, length: int) -> None:
    """Compare result and gradient of fusing with products by a matrix of shares."""
    dy, weights = draw(x.shape[0], length, x.shape[2], dtype=x.dtype), torch.rand(places.shape)
    leaf, places, weights, dy = (t.to(backend.device) for t in (x.requires_grad_(), places, weights, dy))
    with backend.running():
        y = fuse_tokens(leaf, places, weights, length)
        (dx,) = torch.autograd.grad(y, leaf, dy)
    belongs = places.unsqueeze(1) == torch.arange(length, device=backend.device).unsqueeze(1)
    shares = belongs * weights.double().unsqueeze(1)
    assert_close(y.detach(), shares @ leaf.detach().double(), TOLERANCE[x.dtype])
    assert_close(dx, shares.transpose(1, 2) @ dy.double(), TOLERANCE[x.dtype], "gradient")


@all_backends(slow="triton")
@pytest.mark.parametrize("reverse", [False, True])
def test_sizes_beside_those_at_which_the_scans_work_is_cut(backend: Backend, reverse: bool) -> None:
    shapes = SHAPES[backend.name][reverse::2] if backend is TRITON else SHAPES[backend.name]
    for shape in [*shapes, *([(17, 5, 9, 4)] if backend.name == "native" else [])]:
        for gate in (False, True) if backend.name == "mamba_ssm" else (True,):
            inputs = scan_inputs(*shape, (True, gate, True), dtype=torch.float32)
            # Sums over a thousand steps and more are rounded as often.
            backend.check(*loop_scan(True, reverse), inputs, tolerance=3e-5 if shape[1] > 1000 else 1e-5)


@all_backends("reference", "native", "triton", "cuda", slow="triton")
@pytest.mark.parametrize("reverse", [False, True])
def test_sizes_beside_those_at_which_the_convolutions_work_is_cut(backend: Backend, reverse: bool) -> None:
    for shape, width in (((2, 130, 3), 4), ((2, 57, 130), 4), ((2, 40, 3), 7), ((17, 5, 9), 3)):
        inputs = [draw(*shape).float(), draw(shape[2], width).float(), draw(shape[2]).float()]
        backend.check(*loop_conv(reverse=reverse), inputs)


@all_backends(*OWN)
@pytest.mark.parametrize("shape", [(3, 300, 9), (5, 90, 5), (1, 3, 1000), (1, 3, 8192), (2, 150, 70)], ids=str)
def test_more_rows_than_a_task_takes_and_many_channels(backend: Backend, shape: tuple[int, int, int]) -> None:
    tile = {"famba.ops.triton.norm._PROGRAMS": 3} if backend.name == "triton" else {}
    x = draw(*shape).float()
    backend.check(*loop_norm(), [x, draw(*shape).float(), draw(shape[2]).float()], tile=tile)
    for fused in (1, 40, 150) if shape[1] == 150 else ():
        check_fusing(backend, x, torch.randint(0, fused, shape[:2]), fused)


@all_backends()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_half_of_a_projection_and_parameters_of_another_precision(backend: Backend, dtype: torch.dtype) -> None:
    x = draw(2, 9, 2 * 11, dtype=dtype)[..., 11:]
    backend.check(*loop_conv(), [x, draw(11, 4), draw(11).float()])
    backend.check(*loop_conv(), [x[::2, 1::3], draw(11, 4).float(), None])
    if backend.name in OWN:
        backend.check(*loop_norm(), [x[::2, 1::3], draw(1, 3, 11).float(), draw(11)])
        backend.check(*loop_norm(), [x, draw(2, 9, 11).to(dtype), draw(11).float()])


@all_backends()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_scan_of_different_dtypes(backend: Backend, dtype: torch.dtype) -> None:
    u, delta, A, B, C, D, z, bias = scan_inputs(2, 7, 5, 3, dtype=dtype)
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
    inputs = backend.place(scan_inputs(2, 9, 5, 3, dtype=torch.float32))
    weight = torch.randn(5, 9, 2, device=backend.device)
    for sum_of in (torch.sum, lambda x: x.permute(2, 1, 0).mul(weight).sum()):
        with use_backend("reference"):
            wanted = results(every_op, inputs, sum_of)
        with backend.running():
            torch.testing.assert_close(results(every_op, inputs, sum_of), wanted, rtol=1e-4, atol=1e-4)


@all_backends()
@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0)], ids=str)
def test_nothing_in_nothing_out(backend: Backend, shape: tuple[int, int, int]) -> None:
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


@all_backends("triton")
def test_more_channels_or_tokens_than_triton_takes_are_refused_with_a_remedy(backend: Backend) -> None:
    x, weight = torch.ones(1, 4097, 1, device=backend.device), torch.ones(8193, device=backend.device)
    with backend.running(), pytest.raises(BackendError, match=r"8193 channels.* at most 8192; use_backend\('ref"):
        add_rms_norm(weight.view(1, 1, -1), None, weight, 1e-5)
    with backend.running(), pytest.raises(BackendError, match=r"4097 tokens.* at most 4096; use_backend\('ref"):
        match_tokens(x, 0, None, None, 1, "sequence")


@all_backends("triton")
def test_triton_leaves_out_tokens_whose_place_is_outside(backend: Backend) -> None:
    places = torch.tensor([[0, 5, -1, 2**32], [1, 1, 2**31, -(2**40)]], device=backend.device)
    ones = torch.ones(2, 4, device=backend.device)
    with backend.running():
        y, dx = results(lambda x: fuse_tokens(x, places, ones, 2), [ones[..., None]])
    assert y[..., 0].tolist() == [[1, 0], [0, 2]]
    assert dx[..., 0].tolist() == [[1, 0, 0, 0], [1, 1, 0, 0]]


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
def test_extremes_of_the_scan_are_finite_where_the_reference_is(backend: Backend, name: str) -> None:
    values: dict[str, Any] = dict(EXTREMES[name])
    softplus = bool(values.pop("softplus", False))
    drawn = scan_inputs(*((1, 10, 5, 3) if backend is TRITON else (2, 18, 9, 5)), dtype=torch.float32)
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


@all_backends("native", "triton", "cuda", "mamba_ssm")
@pytest.mark.parametrize("value", [0.0, 1e-30, -88.0, 88.0, 1e4, -1e4, 1e18, 1e30, -1e30])
def test_extremes_of_convolution_and_norm_are_those_of_the_reference(backend: Backend, value: float) -> None:
    x = torch.full((2, 5, 9), value, device=backend.device)
    x[..., 1] = 0.5
    ones = [torch.ones(shape, device=backend.device) for shape in ((9, 3), (9,))]

    def run() -> list[Tensor]:
        found = results(loop_conv()[0], [x, ones[0]])
        return found + results(lambda x, w: add_rms_norm(x, None, w, 1e-5), [x, ones[1]])

    with use_backend("reference"):
        wanted = run()
    assert all(x.isfinite().all() for x in wanted if abs(value) <= 1e4)
    with backend.running():
        torch.testing.assert_close(run(), wanted, rtol=1e-4, atol=1e-6)


@all_backends("native", "triton", "cuda")
def test_nan_stays_nan_and_where_it_belongs(backend: Backend) -> None:
    for place, dtype in [(p, d) for p in range(8) for d in backend.dtypes[:2]]:
        inputs = backend.place(scan_inputs(1, 5, 3, 3, dtype=dtype))
        inputs[place].view(-1)[1] = torch.nan
        with use_backend("reference"):
            wanted = loop_scan()[0](*inputs).isnan()
        with backend.running():
            assert torch.equal(loop_scan()[0](*inputs).isnan(), wanted), f"input {place}, {dtype}"


@all_backends()
@pytest.mark.parametrize("reverse", [False, True])
def test_no_position_of_a_convolution_sees_beyond_its_side(backend: Backend, reverse: bool) -> None:
    x, weight = torch.ones(1, 20, 3, device=backend.device), torch.zeros(3, 4, device=backend.device)
    x[:, 12] = torch.nan
    with backend.running():
        seen = causal_conv1d(x, weight, reverse=reverse).isnan().all(2).nonzero()[:, 1]
    assert seen.tolist() == list(range(9, 13) if reverse else range(12, 16))


@all_backends("triton", "cuda")
def test_small_step_sizes_keep_their_digits_and_so_do_their_slopes(backend: Backend) -> None:
    delta = torch.linspace(-80, 30, 111, device=backend.device).view(1, 1, -1)
    ones, one = torch.ones_like(delta), torch.ones(1, 1, 1, device=backend.device)
    zeros, exact = torch.zeros(111, 1, device=backend.device), delta.double()
    # A single step of a state that starts at 0: what comes out is the step size.
    with backend.running():
        y, slope = results(lambda x: selective_scan(ones, x, zeros, one, one, delta_softplus=True), [delta])
    torch.testing.assert_close(y.double(), -torch.nn.functional.logsigmoid(-exact), rtol=2e-6, atol=0)
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


@all_backends()
def test_the_residual_stream_is_summed_in_float32_and_the_same_bits_come_twice(backend: Backend) -> None:
    x = torch.full((3, 30, 5), 2.0**-10, dtype=torch.bfloat16, device=backend.device)
    stream, weight = torch.ones(3, 30, 5, device=backend.device), torch.randn(5).to(backend.device)
    with backend.running():
        first, second = (results(lambda *t: add_rms_norm(*t, 1e-5), [x, stream, weight]) for _ in range(2))
    assert first[1].eq(1 + 2.0**-10).all()
    assert stream.eq(1).all(), "the stream that came in is not overwritten"
    assert all(map(torch.equal, first, second))


@all_backends()
def test_a_token_alone_passes_bit_for_bit_and_an_empty_place_is_negative_zero(backend: Backend) -> None:
    for dtype in backend.dtypes:
        numbers = [1e-30, -0.0, 3.1, float("inf"), -float("inf"), torch.finfo(dtype).max]
        x = torch.tensor(numbers, dtype=dtype, device=backend.device).reshape(1, 2, 3)
        with backend.running():
            y = fuse_tokens(x, torch.tensor([[2, 0]]).to(x.device), torch.ones(1, 2).to(x.device), 3)
        assert torch.equal(y[0, [2, 0]].view(torch.uint8), x[0].contiguous().view(torch.uint8))
        assert y[0, 1].eq(0).all()
        assert backend.name == "native" or y[0, 1].signbit().all()


@all_backends(*OWN)
def test_tokens_are_added_in_their_order_and_what_is_no_number_stays_in_its_place(backend: Backend) -> None:
    # In another order the small ones are lost.
    numbers = torch.tensor([2.0**-24, 2.0**-24, 1.0, 2.0**24], device=backend.device)
    ones = torch.ones(1, 4, device=backend.device)
    for count, total in ((3, 1 + 2.0**-23), (4, 2.0**24 + 2)):
        x = numbers[:count].reshape(1, -1, 1)
        with backend.running():
            y = fuse_tokens(x, torch.zeros(1, count, dtype=torch.int64, device=backend.device), ones[:, :count], 1)
        assert y.item() == total
    x = torch.ones(1, 4, 3, device=backend.device)
    x[0, 1, 2], x[0, 3, 0] = torch.nan, torch.inf
    with backend.running():
        y = fuse_tokens(x, torch.tensor([[0, 1, 2, 2]]).to(x.device), ones, 4)
    assert y.isnan().nonzero().tolist() == [[0, 1, 2]]
    assert y.isinf().nonzero().tolist() == [[0, 2, 0]]
    assert y[0, 2].tolist() == [float("inf"), 2, 2]


@all_backends("reference", "native")
def test_wrong_places_are_refused(backend: Backend) -> None:
    x, weights = torch.ones(1, 3, 2), torch.ones(1, 3)
    with backend.running(), naive.as_users_run_it():
        with pytest.raises(ConfigError, match=r"places is torch.float32 of shape \(1, 3\) on cpu, expected torch.int6"):
            fuse_tokens(x, weights, weights, 2)
        with pytest.raises(ConfigError, match=r"weights has shape \(1, 2\), expected \(1, 3\)"):
            fuse_tokens(x, torch.zeros(1, 3, dtype=torch.int64), weights[:, :2], 2)
        with pytest.raises((ConfigError, RuntimeError), match=r"places from 0 to 2, expected 0 to 1|out of bounds"):
            fuse_tokens(x, torch.tensor([[0, 1, 2]]), weights, 2)
