"""The backend on mamba-ssm and causal-conv1d, with stand-ins for their CUDA extensions.

Where the packages' Python is installed (scripts/install_extension_python.sh), it is what calls the stand-ins.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import naive
import pytest
import torch
from extension_stand_ins import CausalConv1d, SelectiveScan
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_helpers import LAYOUTS, TOLERANCE, assert_close, compare, draw, positive_steps, scan_inputs
from torch import Tensor

from famba.errors import BackendError, ConfigError
from famba.ops import (
    Direction,
    add_rms_norm,
    backends,
    bidirectional_mixer,
    causal_conv1d,
    registry,
    selective_scan,
    use_backend,
)
from famba.ops.bidirectional_mixer import compose_mixer
from famba.ops.mamba_ssm import extensions, norm, packages
from famba.ops.mamba_ssm.packages import CAUSAL_CONV1D, MAMBA_SSM, Package

pytest.importorskip("triton", reason="mamba-ssm needs Triton, which is for Linux alone")

INSTALLED = all(importlib.util.find_spec(name) for name in ("mamba_ssm", "causal_conv1d"))
HOW = "scripts/install_extension_python.sh installs the Python of mamba-ssm and causal-conv1d for this"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCES = {**TOLERANCE, torch.float16: 2e-3}
FEW = settings(max_examples=20, deadline=None)


class Extensions:
    """The stand-ins in use, and whether the installed packages' Python is what calls them."""

    def __init__(self, installed: bool) -> None:
        self.installed = installed
        release = CAUSAL_CONV1D.installed() if installed else None
        writes = release is not None and packages.numbers(release) >= (1, 5, 1)
        self.scan, self.conv = SelectiveScan(), CausalConv1d(writes)

    def forget(self) -> None:
        self.scan.calls.clear()
        self.conv.calls.clear()


def pretend(patch: pytest.MonkeyPatch, versions: dict[str, str | None]) -> None:
    """Let these versions be installed, None for none; others as they are."""
    real = importlib.metadata.version

    def version(name: str) -> str:
        found = versions[name] if name in versions else real(name)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    patch.setattr(importlib.metadata, "version", version)


def forget_caches() -> None:
    extensions.obstacle.cache_clear()
    extensions.convolution.cache_clear()
    norm.package.cache_clear()


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


def test_mixer_keeps_u_the_projections_and_the_scans_mean(stand_ins: Extensions) -> None:
    channels, projected = 48, 2 * 16 + 3

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
    assert kept_bytes(4) - kept_bytes(3) == 2 * 65 * (24 + 2 * channels + 2 * projected)


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


# What hinders the packages, and the command that mends it.


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Machine]:
    """A machine with a GPU, torch 2.10 of CUDA 12.9, both packages installed and their extensions working."""
    forget_caches()
    yield Machine(monkeypatch, tmp_path)
    forget_caches()


class Machine:
    """What `obstacle` looks at, as a test sets it."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        self._patch, self._folder = patch, folder
        self.versions: dict[str, str | None] = {"mamba-ssm": "2.3.1", "causal-conv1d": "1.4.0"}
        made = Extensions(installed=False)
        for module in (made.scan, made.conv):
            patch.setitem(sys.modules, module.__name__, module)
        pretend(patch, self.versions)
        # Not even tried: its import takes seconds.
        patch.setitem(sys.modules, "mamba_ssm", None)
        patch.setattr(extensions, "DEVICE", "cpu")
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(packages.platform, "machine", lambda: "x86_64")
        patch.setattr(packages.platform, "system", lambda: "Linux")
        patch.setattr(packages, "needs_cxx20", lambda: False)
        patch.syspath_prepend(folder)
        self.torch("2.10.0+cu129", "12.9")
        self.toolkit(None)

    def torch(self, version: str, cuda: str | None, hip: str | None = None) -> None:
        self._patch.setattr(torch, "__version__", version)
        self._patch.setattr(torch.version, "cuda", cuda)
        self._patch.setattr(torch.version, "hip", hip)

    def toolkit(self, found: tuple[Path, int] | None) -> None:
        self._patch.setattr(packages, "toolkit", lambda: found)

    def headers_want_cxx20(self) -> None:
        self._patch.setattr(packages, "needs_cxx20", lambda: True)

    def remove(self, package: Package) -> None:
        """Leave a package's Python without its extension."""
        self._patch.delitem(sys.modules, package.extension)

    def spoil(self, package: Package, source: str) -> None:
        """Put a broken extension in place of a package's."""
        self.remove(package)
        (self._folder / f"{package.extension}.py").write_text(source)
        self._patch.delitem(sys.modules, package.extension, raising=False)

    def obstacle(self) -> tuple[str, str]:
        """The reason and the remedy."""
        text = extensions.obstacle()
        assert text is not None
        assert "\n" not in text
        reason, separator, remedy = text.rpartition("; ")
        assert separator
        return reason, remedy


def is_shell(command: str) -> bool:
    return subprocess.run(["bash", "-n", "-c", command], check=False).returncode == 0


TOOLS = "pip install setuptools wheel ninja packaging einops transformers"
INSTALL = "pip install --no-build-isolation --no-deps --no-cache-dir --force-reinstall"
KEEP = "export MAMBA_KEEP_CUDA_BUILD=TRUE"
UNDEFINED = "/env/selective_scan_cuda.so: undefined symbol: _ZN3c106detail14torchCheckFail"
NO_CUDART = "libcudart.so.12: cannot open shared object file: No such file or directory"


def test_no_obstacle_where_both_extensions_run(machine: Machine) -> None:
    assert extensions.obstacle() is None


def test_no_device(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.obstacle() == (
        "no CUDA device is seen by torch 2.10.0+cu129, built for CUDA 12.9",
        "use backend 'auto'",
    )


def test_rocm_is_not_promised(machine: Machine) -> None:
    machine.torch("2.10.0+rocm7.0", None, hip="7.0")
    assert machine.obstacle()[0] == "torch is built for ROCm, for which this backend is not made"


def test_missing_packages_are_installed_from_wheels_where_there_are(machine: Machine) -> None:
    machine.versions.update({"mamba-ssm": None, "causal-conv1d": None})
    reason, remedy = machine.obstacle()
    assert reason == "causal-conv1d is not installed, and mamba-ssm is not installed"
    assert remedy == f"{KEEP} && {TOOLS} && {INSTALL} causal-conv1d==1.6.1 mamba-ssm==2.3.2.post1"
    assert is_shell(remedy)


@pytest.mark.parametrize(
    ("version", "cuda"),
    [
        ("2.11.0+cu129", "12.9"),  # newer than the wheels
        ("2.10.0a0+git1234", "12.9"),  # no release
        ("2.7.1+cu130", "13.0"),  # not published for this CUDA
    ],
)
def test_without_wheels_they_are_compiled(machine: Machine, version: str, cuda: str) -> None:
    machine.torch(version, cuda)
    machine.toolkit((Path("/opt/cuda"), int(cuda.split(".")[0])))
    machine.versions.update({"mamba-ssm": None, "causal-conv1d": None})
    _, remedy = machine.obstacle()
    assert remedy == (
        f"{KEEP} CAUSAL_CONV1D_FORCE_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE CUDA_HOME=/opt/cuda && {TOOLS} && "
        f"{INSTALL} causal-conv1d==1.7.0 mamba-ssm==2.3.2.post1"
    )
    assert is_shell(remedy)


def test_sources_are_patched_where_torch_wants_cxx20(machine: Machine) -> None:
    machine.torch("2.15.0+cu132", "13.2")
    machine.toolkit((Path("/usr/local/cuda-13.0"), 13))
    machine.headers_want_cxx20()
    machine.versions["mamba-ssm"] = None
    _, remedy = machine.obstacle()
    assert remedy == (
        f"{KEEP} MAMBA_FORCE_BUILD=TRUE CUDA_HOME=/usr/local/cuda-13.0 && {TOOLS} && "
        "pip download --no-build-isolation --no-deps --no-binary mamba-ssm mamba-ssm==2.3.2.post1 && "
        "tar -xzf ./mamba_ssm-2.3.2.post1.tar.gz && "
        "sed -i s/c++17/c++20/ ./mamba_ssm-2.3.2.post1/setup.py && "
        f"{INSTALL} ./mamba_ssm-2.3.2.post1"
    )
    assert is_shell(remedy)


@pytest.mark.parametrize(
    ("toolkit", "found"),
    [(None, "no nvcc"), ((Path("/opt/cuda"), 12), "the nvcc of CUDA 12 alone")],
    ids=["none", "12"],
)
def test_where_no_command_can_be_right_triton_is_named(machine: Machine, toolkit: Any, found: str) -> None:
    machine.torch("2.15.0+cu132", "13.2")
    machine.toolkit(toolkit)
    machine.versions["mamba-ssm"] = None
    _, remedy = machine.obstacle()
    assert remedy.startswith("no wheels are published for torch 2.15.0+cu132 with Python ")
    assert remedy.endswith(
        f"there is {found} to compile for CUDA 13.2, so use backend 'triton', which needs nothing compiled"
    )


@pytest.mark.parametrize(
    ("package", "version", "allowed"),
    [
        (MAMBA_SSM, "1.2.2", "2.2 to below 3"),
        (MAMBA_SSM, "3.0.0", "2.2 to below 3"),
        (CAUSAL_CONV1D, "1.3.0.post1", "1.4 to below 2"),
    ],
    ids=["old", "new", "old convolution"],
)
def test_releases_that_are_not_known(machine: Machine, package: Package, version: str, allowed: str) -> None:
    machine.versions[package.name] = version
    reason, remedy = machine.obstacle()
    assert reason == f"{package.name} {version} is not supported, only {allowed}"
    assert remedy.endswith(f"{INSTALL} {package.name}=={package.wheel}")


@pytest.mark.parametrize("version", ["2.2.0", "2.2.6.post3", "2.3.2.post1", "2.9.1+cu12torch2.10"])
def test_releases_that_are_known(machine: Machine, version: str) -> None:
    machine.versions["mamba-ssm"] = version
    assert extensions.obstacle() is None


def test_extension_left_out(machine: Machine) -> None:
    machine.remove(CAUSAL_CONV1D)
    reason, remedy = machine.obstacle()
    assert reason == "causal-conv1d 1.4.0 is installed without its extension causal_conv1d_cuda"
    assert remedy == f"{TOOLS} && {INSTALL} causal-conv1d==1.6.1"


def test_extension_left_out_by_a_release_that_wants_to_be_asked(machine: Machine) -> None:
    machine.versions["mamba-ssm"] = "2.3.3"
    machine.remove(MAMBA_SSM)
    reason, remedy = machine.obstacle()
    assert reason == (
        "mamba-ssm 2.3.3 is installed without its extension selective_scan_cuda, "
        "which this release builds only where MAMBA_KEEP_CUDA_BUILD=TRUE"
    )
    # The release that is there, not an older one.
    assert remedy == f"{KEEP} && {TOOLS} && {INSTALL} mamba-ssm==2.3.3"


@pytest.mark.parametrize(
    ("source", "first_line"),
    [
        (f"raise ImportError({UNDEFINED!r} + chr(10) + 'more')", UNDEFINED),
        (f"raise OSError({NO_CUDART!r})", NO_CUDART),
        ("import a_library_that_is_not_there", "No module named 'a_library_that_is_not_there'"),
        ("raise ImportError('one; two')", "one, two"),
    ],
    ids=["undefined symbol", "no libcudart", "dependency", "semicolon"],
)
def test_extension_built_for_another_torch_or_cuda(machine: Machine, source: str, first_line: str) -> None:
    machine.spoil(MAMBA_SSM, source)
    reason, remedy = machine.obstacle()
    assert reason == (
        "the extension selective_scan_cuda of mamba-ssm 2.3.1 is built for another torch or CUDA than "
        f"torch 2.10.0+cu129 of CUDA 12.9: {first_line}"
    )
    assert remedy == f"{KEEP} && {TOOLS} && {INSTALL} mamba-ssm==2.3.2.post1"


def test_a_file_that_is_no_library(machine: Machine, tmp_path: Path) -> None:
    machine.remove(MAMBA_SSM)
    (tmp_path / "selective_scan_cuda.so").write_bytes(b"\x7fELF but cut off" * 99)
    reason, _ = machine.obstacle()
    assert reason.startswith("the extension selective_scan_cuda of mamba-ssm 2.3.1 is built for another torch or CUDA")


@pytest.mark.parametrize("package", [MAMBA_SSM, CAUSAL_CONV1D], ids=lambda package: package.name)
def test_extension_without_code_for_this_gpu(machine: Machine, package: Package, monkeypatch: Any) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore; lines")

    broken = types.ModuleType(package.extension)
    for name in ("fwd", "causal_conv1d_fwd", "causal_conv1d_bwd"):
        setattr(broken, name, fail)
    monkeypatch.setitem(sys.modules, package.extension, broken)
    reason, remedy = machine.obstacle()
    assert reason == (
        f"the extension {package.extension} of {package.name} {machine.versions[package.name]} does not run here: "
        "CUDA error: no kernel image is available for execution on the device"
    )
    assert remedy.endswith(f"{INSTALL} {package.name}=={package.wheel}")


def test_the_obstacle_is_told_where_the_backend_is_asked_for(machine: Machine, monkeypatch: Any) -> None:
    machine.versions["mamba-ssm"] = "1.2.2"
    serving = registry.Backend("famba.ops.mamba_ssm.backend", ("cuda",), extensions.obstacle, DTYPES)
    monkeypatch.setitem(registry._BACKENDS, "mamba_ssm", serving)
    told = backends()["mamba_ssm"]
    assert told is not None
    assert told.startswith("mamba-ssm 1.2.2 is not supported")
    with pytest.raises(
        BackendError, match="backend 'mamba_ssm' cannot be used: mamba-ssm 1.2.2 is not supported"
    ) as error:
        use_backend("mamba_ssm")
    assert str(error.value).endswith(told)


def toolkit_in(folder: Path, version: int) -> Path:
    for name in ("bin", "include"):
        (folder / name).mkdir(parents=True)
    (folder / "bin" / "nvcc").write_text("")
    (folder / "include" / "cuda_runtime_api.h").write_text(f"#define CUDART_VERSION  {version}\n")
    return folder


def test_toolkit_is_found_where_torch_would_look_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named, linked = toolkit_in(tmp_path / "named", 12090), toolkit_in(tmp_path / "linked", 13000)
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "nvcc").symlink_to(linked / "bin" / "nvcc")
    (linked / "bin" / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(named))
    assert packages.toolkit() == (named, 12)
    monkeypatch.delenv("CUDA_HOME")
    assert packages.toolkit() == (linked, 13)


def test_cxx20_is_asked_of_the_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = tmp_path / "include" / "ATen" / "ATen.h"
    header.parent.mkdir(parents=True)
    monkeypatch.setattr(torch, "__path__", [str(tmp_path)])
    for number, wanted in ((17, False), (20, True)):
        header.write_text(f"#error C++{number} or later compatible compiler is required to use ATen.\n")
        assert packages.needs_cxx20() is wanted
