"""What hinders mamba-ssm and causal-conv1d, and the command that mends it."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from extension_stand_ins import Extensions, forget_caches, pretend

from famba.errors import BackendError
from famba.ops import (
    backends,
    registry,
    use_backend,
)
from famba.ops.mamba_ssm import extensions, packages
from famba.ops.mamba_ssm.packages import CAUSAL_CONV1D, MAMBA_SSM, Package

pytest.importorskip("triton", reason="mamba-ssm needs Triton, which is for Linux alone")


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
    serving = registry.Backend("famba.ops.mamba_ssm.backend", ("cuda",), extensions.obstacle)
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
