"""Test without a GPU what its kernels take when compiled, how cubins are kept, and that no step makes the host wait."""

from __future__ import annotations

import importlib.util
import json
import runpy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import ROOT, python
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from famba.errors import BackendError, ConfigError
from famba.models import Vim
from famba.ops import registry, use_backend
from famba.ops.availability import triton_obstacle
from famba.ops.cuda import launch, nvrtc, scan
from famba.ops.directional import Scans

SUMS: launch.Constants = {"T": "float", "STATES": 3}
SCAN = {"scan_forward", "scan_backward", "conv_forward", "conv_backward"}
KERNELS = {
    "cuda": SCAN | {"row_sums", "column_sums"},
    "triton": SCAN | {"state_sums", "column_sums", "norm_forward", "norm_backward"},
}
KERNELS["triton"] |= {"closest_partners", "places", "fuse_forward", "fuse_backward"}
# An A100 or H100 gives every program 48 KB without being asked; of those 1 is the system's in CUDA.
MOST_SHARED = {"cuda": 49 * 1024, "triton": 48 * 1024}
# A thread can have 255. A kernel of Triton's that is near them spills with the next change.
MOST_REGISTERS = {"cuda": 168, "triton": 224}

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def no_compiler() -> str | None:
    try:
        nvrtc.library()
    except BackendError as error:
        return str(error)
    return None


needs_compiler = pytest.mark.skipif(no_compiler() is not None, reason=f"NVRTC: {no_compiler()}")


def compiled(folder: Path, *options: str) -> list[dict[str, Any]]:
    """Return the rows of scripts/compile_kernels.py, run without Triton's interpreter."""
    file = folder / "kernels.json"
    done = python("scripts/compile_kernels.py", *options, "--json", str(file), TRITON_INTERPRET="0")
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    return json.loads(file.read_text())


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        "triton --dtype bfloat16 --target 80",
        "triton --dtype float32 --target 90",
        "triton --dtype float16 --target 90 --first",
        *(pytest.param(f"cuda --dtype {d}", marks=needs_compiler) for d in ("float32", "bfloat16", "float16")),
    ],
)
def test_no_kernel_spills(options: str, tmp_path: Path) -> None:
    rows, backend = compiled(tmp_path, *options.split()), options.split()[0]
    assert {row["kernel"] for row in rows} == KERNELS[backend]
    for row in rows:
        assert row["stack"] == 0 or row["configuration"] == "256 states", row
        assert row["shared"] <= MOST_SHARED[backend], row
        assert row["registers"] <= MOST_REGISTERS[backend], row


@needs_triton
def test_a_kernel_by_its_name(tmp_path: Path) -> None:
    rows = compiled(tmp_path, "triton", "--target", "90", "--dtype", "float32", "--kernel", "column_sums")
    assert {(row["kernel"], row["target"], row["stack"]) for row in rows} == {("column_sums", "sm_90", 0)}


@needs_compiler
def test_a_cubin_is_compiled_once_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(launch.ENVIRONMENT_VARIABLE, str(tmp_path / "kept"))
    first = launch.cubin("sums.cu", SUMS, 80)
    assert first[:4] == b"\x7fELF"
    assert [path.suffix for path in (tmp_path / "kept").iterdir()] == [".cubin"]
    assert launch.cubin("sums.cu", {**SUMS, "STATES": 4}, 80) != first
    # A folder that cannot be written is no obstacle.
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv(launch.ENVIRONMENT_VARIABLE, str(tmp_path / "file"))
    assert launch.cubin("sums.cu", SUMS, 80) == first
    assert "are compiled in each process" in caplog.text
    monkeypatch.setenv(launch.ENVIRONMENT_VARIABLE, str(tmp_path / "kept"))
    monkeypatch.setattr(nvrtc, "compile_source", lambda *_: pytest.fail("compiled again"))
    assert launch.cubin("sums.cu", SUMS, 80) == first


@needs_compiler
def test_what_the_compiler_says_is_told() -> None:
    with pytest.raises(BackendError, match=r"(?s)wrong.cu does not compile by NVRTC \(.*expected an expression"):
        nvrtc.compile_source("int x = ;", "wrong.cu", ["--gpu-architecture=sm_80"])


def test_a_device_takes_what_was_compiled_for_its_elders_of_the_same_generation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nvrtc, "architectures", lambda: (75, 80, 86, 90))
    monkeypatch.setattr(nvrtc, "version", lambda: (12, 4))
    assert [nvrtc.architecture(capability) for capability in [(8, 0), (8, 9), (9, 0)]] == [80, 86, 90]
    with pytest.raises(BackendError, match="does not compile for compute capability 10.0, only for 7.5, 8.0"):
        nvrtc.architecture((10, 0))


def test_torch_without_cuda_has_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(BackendError, match="is built without CUDA; install torch for CUDA"):
        nvrtc.library.__wrapped__()
    monkeypatch.setattr(torch.version, "cuda", "99.0")
    with pytest.raises(BackendError, match=r"no libnvrtc.so.99 was found, .*; pip install nvidia-cuda-nvrtc"):
        nvrtc.library.__wrapped__()


def test_a_sequence_of_more_numbers_than_the_kernels_count_is_refused() -> None:
    u, B = (torch.empty(1, 1, 2**22, size, device="meta") for size in (512, 1))
    with pytest.raises(ConfigError, match="4194304 steps of 512 numbers are too many .* use backend 'reference'"):
        scan.scan(Scans(u, u, B, B, None, B, (False,)), u, None)


needs_interpreter = pytest.mark.skipif(triton_obstacle() is not None, reason=f"triton: {triton_obstacle()}")


@pytest.fixture
def valueless(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors on a GPU that hold nothing: whatever asks for a value fails, and so does mixing in one of the host's."""
    from famba.ops.triton.launch import noted

    monkeypatch.setattr(launch.Launch, "run", lambda self: None)
    with FakeTensorMode(), noted():
        yield


@needs_interpreter
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernels_of_a_backend_wait_for_nothing(valueless: None, backend: str, dtype: torch.dtype) -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "compile_kernels.py"))
    with torch.device("cuda"):
        calls = script["kernel_calls"](registry.kernels(backend), partial(torch.zeros, dtype=dtype))
    for call in calls:
        call()
    with pytest.raises(DataDependentOutputException):
        torch.empty(3, device="cuda").sum().item()
    with pytest.raises(RuntimeError):
        torch.empty(3, device="cuda") + torch.empty(3)


@needs_interpreter
@pytest.mark.parametrize("strategy", ["none", "all", "interleaved", "lower", "upper"])
@pytest.mark.parametrize(("position", "weighting"), [("head", "mean"), ("middle", "size"), ("none", "mean")])
def test_a_forward_of_the_model_waits_for_nothing(
    valueless: None, strategy: str, position: str, weighting: str
) -> None:
    how = {"cls_position": position, "fusion_weighting": weighting, "drop_path_rate": 0.1, "budget": 6}
    with torch.device("cuda"):
        model = Vim(img_size=8, patch_size=2, embed_dim=16, depth=4, num_classes=5, fusion=strategy, **how)
    for backend in ("triton", "reference"):
        with use_backend(backend):
            assert model(torch.empty(2, 3, 8, 8, device="cuda")).device.type == "cuda"
