"""The backend on mamba-ssm and causal-conv1d, with stand-ins for their CUDA extensions.

Where the packages' Python is installed (scripts/install_extension_python.sh), it is what calls the stand-ins.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import naive
import pytest
import torch
from extension_stand_ins import Extensions, forget_caches, pretend
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_helpers import LAYOUTS, TOLERANCE, assert_close, compare, draw, positive_steps, scan_inputs
from torch import Tensor

from famba.errors import ConfigError
from famba.ops import (
    Direction,
    add_rms_norm,
    bidirectional_mixer,
    causal_conv1d,
    registry,
    selective_scan,
    use_backend,
)
from famba.ops.bidirectional_mixer import compose_mixer
from famba.ops.mamba_ssm import norm

pytest.importorskip("triton", reason="mamba-ssm needs Triton, which is for Linux alone")

INSTALLED = all(importlib.util.find_spec(name) for name in ("mamba_ssm", "causal_conv1d"))
HOW = "scripts/install_extension_python.sh installs the Python of mamba-ssm and causal-conv1d for this"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCES = {**TOLERANCE, torch.float16: 2e-3}
FEW = settings(max_examples=20, deadline=None)


@pytest.fixture(scope="module", params=["of 2.2 and 1.4", "installed"])
def stand_ins(request: pytest.FixtureRequest) -> Iterator[Extensions]:
    """The backend on CPU tensors: with the oldest releases' extensions, and through the Python of what is installed."""
    if torch.cuda.is_available():
        pytest.skip("where there is a GPU the real extensions are tested: make test-gpu")
    installed = request.param == "installed"
    if installed and not INSTALLED:
        pytest.skip(HOW)
    made = Extensions(installed)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what other packages' modules have to say while they are imported
        for module in (made.scan, made.conv):
            patch.setitem(sys.modules, module.__name__, module)
        forget_caches()
        if installed:
            run_norms_on_the_cpu(patch)
        else:
            pretend(patch, {"mamba-ssm": "2.2.2", "causal-conv1d": "1.4.0"})
            patch.setitem(sys.modules, "mamba_ssm", None)
        serving = registry.Backend("famba.ops.mamba_ssm.backend", ("cpu",), lambda: None, DTYPES)
        patch.setitem(registry._BACKENDS, "mamba_ssm", serving)
        registry.kernels("mamba_ssm")
        yield made
    forget_caches()


def run_norms_on_the_cpu(patch: pytest.MonkeyPatch) -> None:
    """Let mamba-ssm's norms run in Triton's interpreter: untuned, since tuning needs a GPU to time."""
    from mamba_ssm.ops.triton import layer_norm

    for name in ("_layer_norm_fwd_1pass_kernel", "_layer_norm_bwd_kernel"):
        patch.setattr(layer_norm, name, getattr(layer_norm, name).fn)
    patch.setattr(torch.cuda, "device", lambda index: nullcontext())
    processors = types.SimpleNamespace(multi_processor_count=3)
    patch.setattr(torch.cuda, "get_device_properties", lambda device: processors)


def compare_with_reference(op: Any, inputs: list[Tensor | None], tolerance: float) -> None:
    def oracle(*exact: Tensor | None) -> Any:
        with use_backend("reference"):
            return op(*exact)

    with use_backend("mamba_ssm"):
        # Sums of terms of size 1 that happen to cancel are as exact as their terms.
        compare(op, oracle, inputs, tolerance, floor=0.1)


def scan(softplus: bool = True, reverse: bool = False) -> Any:
    return lambda *x: selective_scan(*x, delta_softplus=softplus, reverse=reverse)


def conv(silu: bool = True, reverse: bool = False) -> Any:
    return lambda *x: causal_conv1d(*x, activation="silu" if silu else None, reverse=reverse)


@FEW
@given(
    seed=st.integers(0, 2**31),
    batch=st.sampled_from([1, 2, 3]),
    length=st.sampled_from([1, 2, 17, 33, 128]),
    channels=st.sampled_from([1, 5, 8, 17]),
    states=st.sampled_from([1, 3, 16]),
    optional=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    softplus=st.booleans(),
    reverse=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
)
def test_scan_agrees_with_the_reference(
    stand_ins: Extensions,
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
) -> None:
    torch.manual_seed(seed)
    inputs = scan_inputs(batch, length, channels, states, optional, layout, dtype)
    if not softplus:
        inputs = positive_steps(inputs)
    compare_with_reference(scan(softplus, reverse), inputs, TOLERANCES[dtype])


@FEW
@given(
    seed=st.integers(0, 2**31),
    batch=st.sampled_from([1, 3]),
    length=st.sampled_from([1, 2, 17, 33]),
    channels=st.sampled_from([1, 5, 8, 17]),
    width=st.integers(2, 4),
    bias=st.booleans(),
    silu=st.booleans(),
    reverse=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
)
def test_convolution_agrees_with_the_reference(
    stand_ins: Extensions,
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
    compare_with_reference(conv(silu, reverse), inputs, TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["first", "residual"])
def test_norm_agrees_with_the_reference(stand_ins: Extensions, residual: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for shape, layout in (((2, 3, 5), "contiguous"), ((1, 1, 16), "strided"), ((3, 2, 4), "transposed")):
        x, stream = draw(*shape, layout=layout, dtype=dtype), draw(*shape, layout=layout).float()
        inputs = [x, stream if residual else None, draw(shape[2]).float()]
        compare_with_reference(lambda *x: add_rms_norm(*x, 1e-5), inputs, TOLERANCES[dtype])


def test_norm_is_that_of_mamba_ssm_where_it_can_be_imported(
    stand_ins: Extensions, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    norm.package.cache_clear()
    module = norm.package()
    told = "RMS norm by famba.ops.triton: mamba_ssm cannot be imported: "
    assert (module is None) == (told in caplog.text) == (not stand_ins.installed)
    if module is not None:
        called = []
        for name in ("_layer_norm_fwd", "_layer_norm_bwd"):
            real = getattr(module, name)
            monkeypatch.setattr(module, name, lambda *a, real=real, **k: called.append(real.__name__) or real(*a, **k))
        with use_backend("mamba_ssm"):
            add_rms_norm(torch.randn(1, 2, 4), None, torch.ones(4, requires_grad=True), 1e-5)[0].sum().backward()
        assert called == ["_layer_norm_fwd", "_layer_norm_bwd"]


def test_parameters_of_another_precision(stand_ins: Extensions) -> None:
    torch.manual_seed(0)
    u, delta, A, B, C, D, z, bias = scan_inputs(2, 21, 5, 3, dtype=torch.bfloat16)
    compare_with_reference(scan(), [u, delta, A.float(), B, C, D.double(), z, bias.float()], 1e-2)
    # One float32 among them: all is worked out from what was given.
    compare_with_reference(scan(), [u, delta.float(), A.float(), B, C, D, z, bias], 1e-2)
    compare_with_reference(conv(), [u, draw(5, 4), D.float()], 1e-2)


@pytest.mark.parametrize("gate", [False, True], ids=["no gate", "gate"])
def test_scan_of_more_steps_than_a_chunk_of_the_kernel(stand_ins: Extensions, gate: bool) -> None:
    torch.manual_seed(0)
    compare_with_reference(scan(), scan_inputs(1, 2049, 2, 1, (True, gate, True), dtype=torch.float32), 1e-5)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4)], ids=str)
def test_nothing_in_nothing_out(stand_ins: Extensions, shape: tuple[int, int, int]) -> None:
    stand_ins.forget()
    compare_with_reference(scan(), scan_inputs(*shape, 2, dtype=torch.float32), 1e-5)
    compare_with_reference(conv(), [draw(*shape).float(), draw(4, 3).float(), draw(4).float()], 1e-5)
    compare_with_reference(
        lambda *x: add_rms_norm(*x, 1e-5), [draw(*shape).float(), draw(*shape).float(), draw(4).float()], 1e-5
    )
    check_mixer(*mixer_inputs(*shape[:2]), 1e-5)
    assert stand_ins.scan.calls == [] == stand_ins.conv.calls


def mixer_inputs(
    batch: int,
    length: int,
    d_model: int = 6,
    channels: int = 11,
    states: int = 3,
    rank: int = 2,
    width: int = 4,
    out: bool = True,
    dtype: torch.dtype = torch.float32,
) -> tuple[list[Tensor | None], Tensor]:
    """x, in_weight, the two directions' weights in a row and out_weight; and a gradient of the result."""

    def direction() -> list[Tensor]:
        return [
            draw(channels, width) / width,
            draw(channels),
            draw(rank + 2 * states, channels) / channels**0.5,
            draw(channels, rank) / rank,
            draw(channels) - 1,
            -draw(channels, states).exp(),
            draw(channels),
        ]

    torch.manual_seed(0)
    x, in_weight = draw(batch, length, d_model), draw(2 * channels, d_model) / d_model**0.5
    out_weight = draw(d_model, channels) / channels**0.5 if out else None
    tensors = [x, in_weight, *direction(), *direction(), out_weight]
    dy = draw(batch, length, d_model if out else channels)
    return [None if t is None else t.to(dtype) for t in tensors], dy.to(dtype)


def built(tensors: list[Tensor | None]) -> tuple[Any, ...]:
    x, in_weight, *rest, out_weight = tensors
    return x, in_weight, Direction(*rest[:7]), Direction(*rest[7:]), out_weight


def run(mixer: Any, tensors: list[Tensor | None], dy: Tensor) -> list[Tensor]:
    """The result and all gradients."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    y = mixer(*built(leaves))
    return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], dy.to(y.dtype))]


def exact(tensors: list[Tensor | None], dy: Tensor) -> list[Tensor]:
    with use_backend("reference"):
        return run(compose_mixer, [None if t is None else t.double() for t in tensors], dy.double())


def check_mixer(tensors: list[Tensor | None], dy: Tensor, tolerance: float) -> None:
    with use_backend("mamba_ssm"):
        actual = run(bidirectional_mixer, tensors, dy)
    present = [t for t in tensors if t is not None]
    for number, (a, w, t) in enumerate(zip(actual, exact(tensors, dy), [present[0], *present], strict=True)):
        assert a.dtype == t.dtype
        assert_close(a, w, tolerance, f"result {number}", floor=1.0)


@pytest.mark.parametrize("out", [False, True], ids=["no projection", "projection"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [1, 2, 17, 33])
def test_mixer_agrees_with_its_parts(stand_ins: Extensions, length: int, batch: int, out: bool) -> None:
    check_mixer(*mixer_inputs(batch, length, out=out), 1e-5)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 2), (9, 16, 16, 4, 3), (4, 8, 1, 1, 4)], ids=str)
def test_mixer_of_many_sizes(stand_ins: Extensions, sizes: tuple[int, ...]) -> None:
    check_mixer(*mixer_inputs(2, 5, *sizes), 1e-5)


def test_mixer_gives_the_extensions_addresses_that_they_read_vectors_from(stand_ins: Extensions) -> None:
    check_mixer(*mixer_inputs(1, 128, rank=3), 1e-5)


def test_mixer_of_more_steps_than_a_chunk_of_the_kernel(stand_ins: Extensions) -> None:
    check_mixer(*mixer_inputs(1, 2049, 3, 2, 1, 1), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mixer_in_half_precision_is_as_near_as_its_parts(stand_ins: Extensions, dtype: torch.dtype) -> None:
    tensors, dy = mixer_inputs(3, 37, 24, 48, 16, 3, dtype=dtype)
    with use_backend("mamba_ssm"):
        actual = run(bidirectional_mixer, tensors, dy)
    with use_backend("reference"):
        parts = run(compose_mixer, tensors, dy)

    def error(x: Tensor, y: Tensor) -> float:
        return ((x.double() - y).norm() / y.norm()).item()

    for number, (a, p, w) in enumerate(zip(actual, parts, exact(tensors, dy), strict=True)):
        assert a.dtype == dtype
        assert error(a, w) <= max(1e-2, 1.2 * error(p, w)), f"result {number}"


def test_mixer_under_autocast_keeps_the_weights_gradients_in_float32(stand_ins: Extensions) -> None:
    tensors, dy = mixer_inputs(2, 19, 24, 48, 16, 3)
    with use_backend("mamba_ssm"), torch.autocast("cpu", torch.bfloat16):
        actual = run(bidirectional_mixer, tensors, dy)
    assert actual[0].dtype == torch.bfloat16
    for number, (a, w) in enumerate(zip(actual, exact(tensors, dy), strict=True)):
        assert number == 0 or a.dtype == torch.float32
        assert (a.double() - w).norm() <= 2e-2 * w.norm(), f"result {number}"


def test_mixer_runs_both_directions_in_one_call_without_turning_the_layout(stand_ins: Extensions) -> None:
    batch, length, channels = 3, 17, 11
    tensors, dy = mixer_inputs(batch, length, channels=channels)
    leaves = [None if t is None else t.requires_grad_() for t in tensors]
    stand_ins.forget()
    with use_backend("mamba_ssm"):
        y = bidirectional_mixer(*built(leaves))
        y.backward(dy)
    strides = (length, batch * length, 1)
    assert stand_ins.scan.calls == [("fwd", strides, 2, False), ("bwd", strides, 2, False)]
    assert stand_ins.conv.calls == ["fwd", "fwd", "bwd"]


def test_mixer_keeps_the_projections_and_the_scans_mean(stand_ins: Extensions) -> None:
    channels, projected = 48, 8 + 2 * 16

    def kept_bytes(batch: int) -> int:
        kept: dict[int, Tensor] = {}
        tensors, _ = mixer_inputs(batch, 65, 24, channels, 16, 3, dtype=torch.bfloat16)
        leaves = [None if t is None else t.requires_grad_() for t in tensors]
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
        )
        with use_backend("mamba_ssm"), hooks:
            bidirectional_mixer(*built(leaves))
        return sum(t.untyped_storage().nbytes() for t in kept.values())

    # Of one more image, in bfloat16; x is kept too.
    assert kept_bytes(4) - kept_bytes(3) == 2 * 65 * (24 + channels + 2 * projected)


def test_torch_accepts_the_ops(stand_ins: Extensions) -> None:
    def leaves(tensors: list[Tensor | None], dtype: torch.dtype = torch.bfloat16) -> list[Tensor | None]:
        return [None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]

    x, in_weight, forward, backward, out_weight = built(leaves(mixer_inputs(2, 5)[0]))
    with warnings.catch_warnings(), naive.as_users_run_it():
        warnings.simplefilter("ignore")
        mixer = (x, in_weight, list(forward), list(backward), out_weight, "mamba_ssm")
        torch.library.opcheck(torch.ops.famba.bidirectional_mixer, mixer)
        single = (
            (torch.ops.famba.selective_scan, leaves(scan_inputs(2, 5, 4, 3))),
            (torch.ops.famba.causal_conv1d, leaves([draw(2, 5, 4), draw(4, 3), draw(4)])),
        )
        for op, tensors in single:
            checks = ("test_schema", "test_autograd_registration", "test_faketensor")
            torch.library.opcheck(op, (*tensors, True, True, "mamba_ssm"), test_utils=checks)


@pytest.mark.parametrize(
    ("call", "limit"),
    [
        (lambda: scan()(*scan_inputs(1, 3, 2, 257, dtype=torch.float32)), "257 states, mamba-ssm takes 1 to 256"),
        (lambda: scan()(*scan_inputs(1, 3, 2, 0, dtype=torch.float32)), "0 states, mamba-ssm takes 1 to 256"),
        (lambda: conv()(torch.ones(1, 3, 2), torch.ones(2, 5)), "width 5, causal-conv1d takes 2 to 4"),
        (lambda: conv()(torch.ones(1, 3, 2), torch.ones(2, 1)), "width 1, causal-conv1d takes 2 to 4"),
        (
            lambda: conv()(torch.ones(1, 1, 2**16), torch.ones(2**16, 4)),
            "65536 channels, causal-conv1d takes at most 65535",
        ),
        (
            lambda: conv()(torch.ones(1).expand(2**21, 2**10, 2), torch.ones(2, 4)),
            "4294967296 elements, causal-conv1d counts at most 4294967295",
        ),
    ],
    ids=["states", "no states", "width", "no neighbour", "channels", "elements"],
)
def test_limits_of_the_packages_are_named(stand_ins: Extensions, call: Any, limit: str, monkeypatch: Any) -> None:
    from famba.ops.mamba_ssm import kernels

    if "elements" in limit:  # no copy of 16 GB
        monkeypatch.setattr(kernels, "_turned", lambda x, reverse, dtype: x.transpose(1, 2))
    with use_backend("mamba_ssm"), pytest.raises(ConfigError, match=limit) as error:
        call()
    assert str(error.value).endswith("use backend 'triton' or 'reference'")


def test_mixer_wants_both_directions_of_the_same_sizes(stand_ins: Extensions) -> None:
    x, in_weight, forward, backward, out_weight = built(mixer_inputs(2, 5)[0])
    backward = backward._replace(conv_weight=torch.ones(11, 3))
    with use_backend("mamba_ssm"), pytest.raises(ConfigError, match=r"\(11, 4\) forward and \(11, 3\) backward"):
        bidirectional_mixer(x, in_weight, forward, backward, out_weight)
