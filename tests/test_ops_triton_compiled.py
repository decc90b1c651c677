"""The Triton kernels compiled ahead for A100 and H100, each configuration that tuning may choose; no GPU needed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)

SCRIPT = Path(__file__).parent.parent / "scripts" / "compile_kernels.py"
# What a program can have without asking for more than an A100 or H100 gives every kernel.
MOST_SHARED = 48 * 1024
# A thread can have 255; a kernel that is near them spills with the next change.
MOST_REGISTERS = 224
SCAN = {"scan_forward", "scan_backward", "state_sums", "parameter_sums"}
OTHERS = {"conv_forward", "conv_backward", "conv_sums", "norm_forward", "norm_backward", "closest_partners", "places"}
KERNELS = SCAN | OTHERS | {"fuse_forward", "fuse_backward"}


def compiled(folder: Path, *options: str) -> list[dict[str, Any]]:
    """Return the output of the script, run without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    file = folder / "kernels.json"
    command = [sys.executable, str(SCRIPT), "--json", str(file), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=SCRIPT.parent.parent)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    return json.loads(file.read_text())


def check(rows: list[dict[str, Any]]) -> None:
    assert {row["kernel"] for row in rows} == KERNELS
    for row in rows:
        assert row["stack"] == 0, row
        assert row["shared"] <= MOST_SHARED, row
        assert row["registers"] <= MOST_REGISTERS, row


@pytest.mark.slow
def test_no_configuration_spills_on_an_a100(tmp_path: Path) -> None:
    check(compiled(tmp_path, "--dtype", "bfloat16", "--target", "80"))


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "more"), [("float32", ()), ("float16", ("--first",))], ids=["float32", "float16"])
def test_no_configuration_spills_on_an_h100(tmp_path: Path, dtype: str, more: tuple[str, ...]) -> None:
    check(compiled(tmp_path, "--dtype", dtype, "--target", "90", *more))


def test_a_kernel_by_its_name(tmp_path: Path) -> None:
    rows = compiled(tmp_path, "--dtype", "float32", "--target", "90", "--kernel", "conv_sums")
    assert {(row["kernel"], row["target"]) for row in rows} == {("conv_sums", "sm_90")}


def test_the_interpreter_is_refused() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert "TRITON_INTERPRET=1 is set, so nothing is compiled; unset it" in done.stderr
