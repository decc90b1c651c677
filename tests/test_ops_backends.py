"""Test the choice of a backend, the reasons why one cannot be used, and the errors of ops."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import naive
import pytest
import torch
from extension_stand_ins import CausalConv1d, SelectiveScan, forget_caches, pretend
from torch._subclasses.fake_tensor import FakeTensorMode

from famba.errors import BackendError, ConfigError
from famba.ops import (
    add_rms_norm,
    availability,
    backends,
    causal_conv1d,
    fuse_tokens,
    reference,
    registry,
    selective_scan,
    use_backend,
)
from famba.ops.availability import (
    CAUSAL_CONV1D,
    INSTALL,
    MAMBA_SSM,
    Extension,
    cuda_obstacle,
    mamba_ssm_obstacle,
)
from famba.ops.cuda import driver, nvrtc

NAMES = ["cuda", "triton", "mamba_ssm", "native", "reference"]


@pytest.fixture(autouse=True)
def no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_chosen", None)
    monkeypatch.setattr(registry, "_warned", False)
    monkeypatch.delenv("FAMBA_BACKEND", raising=False)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the functions called on a further backend, "counted", which is the reference's otherwise."""
    called: list[str] = []

    class Counting(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            function = getattr(reference, name)
            return lambda *args: (called.append(name), function(*args))[1]

    monkeypatch.setitem(sys.modules, "counted_kernels", Counting("counted_kernels"))
    monkeypatch.setitem(registry._BACKENDS, "counted", registry.Backend("counted_kernels", ("cpu",), lambda: None))
    return called


def run_all() -> torch.Tensor:
    x = torch.ones(1, 2, 3, requires_grad=True)
    states = torch.ones(1, 2, 4)
    y = selective_scan(x, x, -torch.ones(3, 4), states, states)
    return add_rms_norm(causal_conv1d(y, torch.ones(3, 2)), x, torch.ones(3), 1e-5)[0].sum()


def test_backends_maps_each_name_to_what_hinders_it_and_such_a_choice_changes_nothing() -> None:
    known = backends()
    assert list(known) == NAMES
    assert known["reference"] is None
    for name, obstacle in known.items():
        if obstacle is not None:
            reason, _, remedy = obstacle.rpartition("; ")
            assert reason, f"{name} names no reason"
            assert remedy.startswith(("use ", "pip ", "export ", "install ")), f"{name} names no remedy"
            before = registry.resolve("cpu")
            with pytest.raises(BackendError, match=name) as caught:
                use_backend(name)
            assert obstacle in str(caught.value)
            assert registry.resolve("cpu") == before


def test_unknown_backends_are_refused_with_the_nearest_name() -> None:
    with pytest.raises(BackendError, match="did you mean 'reference'") as caught:
        use_backend("refrence")
    assert all(name in str(caught.value) for name in [*NAMES, "auto"])
    assert isinstance(caught.value, RuntimeError)


def test_use_backend_in_a_block_restores_the_choice_before_it(calls: list[str]) -> None:
    with use_backend("counted"):
        with use_backend("reference"):
            run_all()
            assert not calls
        run_all()
        assert calls
        with pytest.raises(ZeroDivisionError), use_backend("reference"):
            _ = 1 / 0
        assert registry.resolve("cpu") == "counted"
    assert registry.resolve("cpu") != "counted"


def test_use_backend_alone_is_a_switch_and_the_backward_runs_where_the_forward_ran(calls: list[str]) -> None:
    use_backend("counted")
    loss = run_all()
    assert sorted(calls) == ["add_rms_norm", "causal_conv1d", "selective_scan"]
    use_backend("auto")
    calls.clear()
    run_all()
    assert not calls
    loss.backward()
    assert sorted(calls) == ["add_rms_norm_backward", "causal_conv1d_backward", "selective_scan_backward"]


def test_the_environment_variable_chooses(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAMBA_BACKEND", "counted")
    run_all()
    assert calls
    calls.clear()
    with use_backend("reference"):
        run_all()
    assert not calls, "a choice in the program goes before the environment's"
    monkeypatch.setenv("FAMBA_BACKEND", "nativ")
    with pytest.raises(BackendError, match="'nativ', did you mean 'native'"):
        run_all()


def test_auto_passes_over_what_cannot_be_used_or_serves_another_device(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = registry._BACKENDS["counted"]
    known = {name: registry._BACKENDS[name] for name in ("native", "reference")}
    monkeypatch.setattr(registry, "_BACKENDS", {"counted": counted, **known})
    assert registry.resolve("cpu") == "counted"
    assert registry.resolve("cuda") == "reference"
    with use_backend("counted"), pytest.raises(BackendError, match="not serve 'cuda' tensors, only cpu; use 'auto'"):
        registry.resolve("cuda")
    broken = registry.Backend(counted.module, counted.devices, lambda: "broken; mend it")
    monkeypatch.setattr(registry, "_BACKENDS", {"counted": broken, "reference": registry._BACKENDS["reference"]})
    assert registry.resolve("cpu") == "reference"
    assert registry.explain("cpu") == "reference (counted: broken)"


def replace_gpu_backends(monkeypatch: pytest.MonkeyPatch, **obstacles: str | None) -> None:
    """Let backends of GPUs be usable, or hindered by what is given."""
    for name, obstacle in obstacles.items():
        known = registry._BACKENDS[name]
        usable = replace(known, obstacle=lambda obstacle=obstacle: obstacle, on_request=tuple)
        monkeypatch.setitem(registry._BACKENDS, name, usable)


def test_auto_takes_what_is_fastest_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_gpu_backends(monkeypatch, cuda=None, triton=None, mamba_ssm=None)
    assert registry.resolve("cuda", torch.bfloat16) == "cuda"
    assert registry.explain("cuda", torch.bfloat16) == "cuda"
    replace_gpu_backends(monkeypatch, cuda="no compiler; install one")
    assert registry.explain("cuda", torch.bfloat16) == "triton (cuda: no compiler)"
    replace_gpu_backends(monkeypatch, triton="too old a GPU; buy another")
    assert registry.explain("cuda", torch.bfloat16) == "mamba_ssm (cuda: no compiler; triton: too old a GPU)"


def run_on_a_gpu_without_values(dtype: torch.dtype) -> None:
    with FakeTensorMode():
        x, weight = torch.empty(1, 2, 4, dtype=dtype, device="cuda"), torch.empty(4, device="cuda")
        add_rms_norm(x, None, weight, 1e-5)


def test_the_reference_on_a_gpu_is_warned_of_once_but_not_where_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    replace_gpu_backends(monkeypatch, cuda="missing; install it", triton="not installed; pip install triton")
    with use_backend("reference"):
        run_on_a_gpu_without_values(torch.float32)
    run_all()
    registry.resolve("cuda")
    assert not caplog.records, "a question is no use"
    for _ in range(2):
        run_on_a_gpu_without_values(torch.float32)
    (warning,) = caplog.records
    assert (warning.name, warning.levelname) == ("famba.ops.registry", "WARNING")
    assert "hundreds of times slower" in warning.getMessage()
    assert warning.getMessage().endswith("triton: not installed; pip install triton")
    replace_gpu_backends(monkeypatch, triton=None)
    monkeypatch.setattr(registry, "_warned", False)
    run_on_a_gpu_without_values(torch.float64)
    assert "triton: serves float32 and bfloat16 and float16 alone; cast the tensors" in caplog.text


TOKENS, STATES = (2, 3, 4), (2, 3, 5)
SCAN = {"u": TOKENS, "delta": TOKENS, "A": (4, 5), "B": STATES, "C": STATES, "D": (4,), "z": TOKENS, "delta_bias": (4,)}
OPS: dict[str, tuple[Any, dict[str, tuple[int, ...]]]] = {
    "selective_scan": (selective_scan, SCAN),
    "causal_conv1d": (causal_conv1d, {"x": TOKENS, "weight": (4, 2), "bias": (4,)}),
    "add_rms_norm": (partial(add_rms_norm, eps=1e-5), {"x": TOKENS, "residual": TOKENS, "weight": (4,)}),
}


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, (_, shapes) in OPS.items() for name in shapes])
@pytest.mark.parametrize("fault", ["shape", "rank", "dtype", "complex", "device"])
def test_what_does_not_fit_is_refused_by_name(op: str, name: str, fault: str) -> None:
    function, shapes = OPS[op]
    arguments = {of: torch.zeros(shape) for of, shape in shapes.items()}
    good = arguments[name]
    changed = 2 if name in ("u", "x") else 0
    bad = {
        "shape": torch.zeros([n + (i == changed) for i, n in enumerate(good.shape)]),
        "rank": good.unsqueeze(0),
        "dtype": good.long(),
        "complex": good.to(torch.complex64),
        "device": good.to("meta"),
    }[fault]
    with naive.as_users_run_it(), pytest.raises(ConfigError) as caught:
        function(**arguments | {name: bad})
    message = str(caught.value)
    assert message.startswith(f"{op}: ")
    # Where the shapes are measured by this very argument, another one is the first that does not fit.
    measure = name in ("u", "x") and fault in ("shape", "device")
    if not measure:
        assert f" {name} " in message
    told = {"device": ("meta", "cpu"), "shape": ("has shape", "expected"), "rank": ()}.get(fault, (str(bad.dtype),))
    assert all(text in message for text in told)


def test_unknown_activations_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"activation 'relu'; allowed: None, 'silu'"):
        causal_conv1d(torch.ones(2, 3, 4), torch.ones(4, 2), activation="relu")


def test_a_length_that_no_sequence_has_is_refused() -> None:
    x = torch.ones(1, 2, 3)
    for length in (-1, 2**62):
        with pytest.raises(ConfigError, match="expected 0 to 2147483647"):
            fuse_tokens(x, torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2), length)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Machine]:
    """A machine with a GPU, torch 2.10 of CUDA 12.9, both packages installed and their extensions working."""
    forget_caches()
    yield Machine(monkeypatch, tmp_path)
    forget_caches()


class Machine:
    """Set what `mamba_ssm_obstacle` looks at."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        self.patch, self._folder = patch, folder
        self.versions: dict[str, str | None] = {"mamba-ssm": "2.3.1", "causal-conv1d": "1.4.0"}
        for module in (SelectiveScan(), CausalConv1d()):
            patch.setitem(sys.modules, module.__name__, module)
        pretend(patch, self.versions)
        # Not even tried: its import takes seconds.
        patch.setitem(sys.modules, "mamba_ssm", None)
        patch.setattr(availability, "DEVICE", "cpu")
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.syspath_prepend(folder)
        self.torch("2.10.0+cu129", "12.9")

    def torch(self, version: str, cuda: str | None, hip: str | None = None) -> None:
        self.patch.setattr(torch, "__version__", version)
        self.patch.setattr(torch.version, "cuda", cuda)
        self.patch.setattr(torch.version, "hip", hip)

    def remove(self, package: Extension) -> None:
        """Leave a package's Python without its extension."""
        self.patch.delitem(sys.modules, package.module)

    def spoil(self, source: str) -> None:
        """Put a broken extension in place of mamba-ssm's."""
        self.remove(MAMBA_SSM)
        (self._folder / f"{MAMBA_SSM.module}.py").write_text(source)


BUILT_FOR_ANOTHER = (
    "the extension selective_scan_cuda of mamba-ssm 2.3.1 is built for another torch or CUDA than "
    "torch 2.10.0+cu129 of CUDA 12.9: "
)
OBSTACLES: dict[str, tuple[Callable[[Machine], object], str]] = {
    "no device": (
        lambda m: m.patch.setattr(torch.cuda, "is_available", lambda: False),
        "torch 2.10.0+cu129 is built for CUDA 12.9, but sees no CUDA device; use backend 'auto'",
    ),
    "ROCm": (
        lambda m: m.torch("2.10.0+rocm7.0", None, hip="7.0"),
        "torch is built for ROCm, for which this backend is not made; use backend 'auto'",
    ),
    "no packages": (
        lambda m: m.versions.update({"mamba-ssm": None, "causal-conv1d": None}),
        "causal-conv1d is not installed, and mamba-ssm is not installed",
    ),
    "an old release": (
        lambda m: m.versions.update({"mamba-ssm": "1.2.2"}),
        "mamba-ssm 1.2.2 is not supported, only 2.2 to below 3",
    ),
    "an extension left out": (
        lambda m: m.remove(CAUSAL_CONV1D),
        "causal-conv1d 1.4.0 is installed without its extension causal_conv1d_cuda",
    ),
    "an undefined symbol": (
        lambda m: m.spoil("raise ImportError('selective_scan_cuda.so: undefined symbol: _ZN3c10' + chr(10) + 'more')"),
        BUILT_FOR_ANOTHER + "selective_scan_cuda.so: undefined symbol: _ZN3c10",
    ),
    "no libcudart": (
        lambda m: m.spoil("raise OSError('libcudart.so.12: cannot open shared object file')"),
        BUILT_FOR_ANOTHER + "libcudart.so.12: cannot open shared object file",
    ),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_each_obstacle_has_a_reason_and_a_remedy(machine: Machine, name: str) -> None:
    change, reason = OBSTACLES[name]
    change(machine)
    assert mamba_ssm_obstacle() == (reason if ";" in reason else f"{reason}; {INSTALL}")
    assert INSTALL in (Path(__file__).parent.parent / "docs" / "gpu.md").read_text(), "the command that the page gives"


@pytest.mark.parametrize("version", ["2.2.0", "2.2.6.post3", "2.3.2.post1", "2.9.1+cu12torch2.10"])
def test_releases_that_are_known(machine: Machine, version: str) -> None:
    machine.versions["mamba-ssm"] = version
    assert mamba_ssm_obstacle() is None


@pytest.mark.parametrize("package", [MAMBA_SSM, CAUSAL_CONV1D], ids=lambda package: package.package)
def test_extension_without_code_for_this_gpu(machine: Machine, package: Extension, monkeypatch: Any) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore; lines")

    broken = types.ModuleType(package.module)
    for name in ("fwd", "causal_conv1d_fwd", "causal_conv1d_bwd"):
        setattr(broken, name, fail)
    monkeypatch.setitem(sys.modules, package.module, broken)
    named = f"the extension {package.module} of {package.package} {machine.versions[package.package]}"
    told = "CUDA error: no kernel image is available for execution on the device"
    assert mamba_ssm_obstacle() == f"{named} does not run here: {told}; {INSTALL}"


def test_each_obstacle_of_the_cuda_kernels_has_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise BackendError("no driver; install it")

    def told(owner: Any, name: str, value: Any) -> str:
        monkeypatch.setattr(owner, name, value)
        return str(cuda_obstacle.__wrapped__())

    monkeypatch.setattr(torch.version, "hip", None)
    assert "sees no CUDA device; use 'auto', or a Linux" in told(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    old = told(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "is interpreted (TRITON_INTERPRET=1); unset TRITON_INTERPRET" in old
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "which is not installed; pip install triton" in told(importlib.util, "find_spec", lambda name: None)
    old = told(importlib.util, "find_spec", lambda name: types.SimpleNamespace())
    assert "compute capability 8.0 or more, this one has 7.5; use 'triton'" in old
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert told(driver, "library", missing) == "no driver; install it"
    monkeypatch.setattr(driver, "library", lambda: None)
    assert told(nvrtc, "architectures", lambda: (80, 90)) == "None"
    assert told(nvrtc, "architectures", missing) == "no driver; install it"
