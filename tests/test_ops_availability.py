"""Test the reasons why kernels for GPUs cannot be used, and the command that installs mamba-ssm."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from extension_stand_ins import CausalConv1d, SelectiveScan, forget_caches, pretend

from famba.errors import BackendError
from famba.ops import availability
from famba.ops.availability import (
    CAUSAL_CONV1D,
    INSTALL,
    MAMBA_SSM,
    Extension,
    cuda_obstacle,
    mamba_ssm_obstacle,
)
from famba.ops.cuda import driver, nvrtc

pytest.importorskip("triton", reason="mamba-ssm needs Triton, which is for Linux alone")


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


UNDEFINED = "/env/selective_scan_cuda.so: undefined symbol: _ZN3c106detail14torchCheckFail"
NO_CUDART = "libcudart.so.12: cannot open shared object file: No such file or directory"


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
    "a new release": (
        lambda m: m.versions.update({"causal-conv1d": "2.0.0"}),
        "causal-conv1d 2.0.0 is not supported, only 1.4 to below 2",
    ),
    "an extension left out": (
        lambda m: m.remove(CAUSAL_CONV1D),
        "causal-conv1d 1.4.0 is installed without its extension causal_conv1d_cuda",
    ),
    "an undefined symbol": (
        lambda m: m.spoil(f"raise ImportError({UNDEFINED!r} + chr(10) + 'more')"),
        BUILT_FOR_ANOTHER + UNDEFINED,
    ),
    "no libcudart": (lambda m: m.spoil(f"raise OSError({NO_CUDART!r})"), BUILT_FOR_ANOTHER + NO_CUDART),
    "a dependency": (
        lambda m: m.spoil("import a_library_that_is_not_there"),
        BUILT_FOR_ANOTHER + "No module named 'a_library_that_is_not_there'",
    ),
    "a semicolon": (lambda m: m.spoil("raise ImportError('one; two')"), BUILT_FOR_ANOTHER + "one, two"),
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
        return str(cuda_obstacle())

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
