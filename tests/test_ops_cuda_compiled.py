"""The CUDA kernels compiled by NVRTC, which needs no GPU; how they are kept on disk, and what the compiler lacks."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from famba.errors import BackendError, ConfigError
from famba.ops.cuda import launch, nvrtc, scan
from famba.ops.directional import Scans

ROOT = Path(__file__).parents[1]
SUMS: launch.Constants = {"T": "float", "STATES": 3}
# Of 48 KB, 1 is the system's.
MOST_SHARED = 49 * 1024


def no_compiler() -> str | None:
    try:
        nvrtc.library()
    except BackendError as error:
        return str(error)
    return None


needs_compiler = pytest.mark.skipif(no_compiler() is not None, reason=f"NVRTC: {no_compiler()}")


@needs_compiler
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is not installed")
@pytest.mark.slow
@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_no_kernel_of_16_states_spills(dtype: str, target: int, tmp_path: Path) -> None:
    file = tmp_path / "kernels.json"
    options = f"--dtype {dtype} --target {target} --states 16 --states 256 --json {file}".split()
    command = [sys.executable, "scripts/cuda_kernels.py", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-4000:]}"
    rows = json.loads(file.read_text())
    scans = {"scan_forward", "scan_forward, measures", "scan_replay", "scan_backward"}
    names = {*scans, "row_sums", "column_sums", "conv_forward", "conv_backward"}
    assert {row["kernel"] for row in rows} == names
    for row in rows:
        assert row["shared"] <= MOST_SHARED, row
        assert row["registers"] <= 168, row
        assert row["stack"] == 0 or row["states"] == 256, row


@needs_compiler
def test_a_cubin_is_compiled_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launch.ENVIRONMENT_VARIABLE, str(tmp_path / "kept"))
    first = launch.cubin("sums.cu", SUMS, 80)
    assert first[:4] == b"\x7fELF"
    assert [path.suffix for path in (tmp_path / "kept").iterdir()] == [".cubin"]
    assert launch.cubin("sums.cu", {**SUMS, "STATES": 4}, 80) != first
    monkeypatch.setattr(nvrtc, "compile_source", lambda *_: pytest.fail("compiled again"))
    assert launch.cubin("sums.cu", SUMS, 80) == first


@needs_compiler
def test_a_folder_that_cannot_be_written_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv(launch.ENVIRONMENT_VARIABLE, str(tmp_path / "file"))
    assert launch.cubin("sums.cu", SUMS, 80)[:4] == b"\x7fELF"
    assert "are compiled in each process" in caplog.text


@needs_compiler
def test_what_the_compiler_says_is_told() -> None:
    with pytest.raises(BackendError, match=r"(?s)wrong.cu does not compile by NVRTC \(.*expected an expression"):
        nvrtc.compile_source("int x = ;", "wrong.cu", ["--gpu-architecture=sm_80"])


def test_a_device_takes_what_was_compiled_for_its_elders_of_the_same_generation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nvrtc, "architectures", lambda: (75, 80, 86, 90))
    monkeypatch.setattr(nvrtc, "version", lambda: (12, 4))
    chosen = {capability: nvrtc.architecture(capability) for capability in [(8, 0), (8, 9), (9, 0)]}
    assert chosen == {(8, 0): 80, (8, 9): 86, (9, 0): 90}
    with pytest.raises(
        BackendError, match="NVRTC 12.4 does not compile for compute capability 10.0, only for 7.5, 8.0"
    ):
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
