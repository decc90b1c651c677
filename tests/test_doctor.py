"""Test what `famba doctor` shows, and what it finds wrong."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import famba as package
from famba.analysis.benchmark.ops import OPS
from famba.cli import main as famba
from famba.ops import reference, registry
from famba.ops.native import library

Printed, Patch = pytest.CaptureFixture[str], pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def no_choice(monkeypatch: Patch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(registry, "_chosen", None)
    for variable in ("FAMBA_BACKEND", "FAMBA_ISA"):
        monkeypatch.delenv(variable, raising=False)
    library.use_isa(None) if library.obstacle() is None else None


def doctor(capsys: Printed) -> tuple[int, str]:
    status = famba(["doctor"])
    text = capsys.readouterr().out
    assert all(len(line) <= 100 for line in text.splitlines()), text
    return status, text


def results(text: str, *words: str) -> list[str]:
    """Lines of the self-check that hold all these words."""
    table = text[text.index("Self-check") :].splitlines()
    return [line for line in table if all(word in line for word in words)]


def test_a_machine_on_which_all_works(capsys: Printed, monkeypatch: Patch) -> None:
    isas = library.isas() if library.obstacle() is None else ()
    if isas:
        monkeypatch.setenv("FAMBA_ISA", "portable")
    status, text = doctor(capsys)
    assert status == 0
    for isa in isas:
        assert len(results(text, "native", isa, "ok")) == 2 * len(OPS), "every instruction set is checked"
        assert library.isa() == "portable", "the choice is as it was before"
    assert "All that can be used works." in text
    assert "FAILED" not in text
    for expected in (package.__version__, torch.__version__, "CPU", "CUDA", "MPS", "bfloat16", "threads"):
        assert expected in text
    for name, obstacle in registry.backends().items():
        assert name in text
        assert obstacle is None or obstacle.rpartition("; ")[2] in " ".join(text.split()), "the remedy is shown"
        assert bool(results(text, name)) == (obstacle is None)
    for op in OPS:
        for dtype in ("float32", "bfloat16"):
            assert results(text, "reference", op, dtype, "ok")


def test_a_backend_that_raises_is_reported_and_the_rest_goes_on(capsys: Printed, monkeypatch: Patch) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("no such instruction\nand many more lines")

    kernels: Any = SimpleNamespace(**{**vars(reference), "causal_conv1d": broken})
    monkeypatch.setitem(sys.modules, "other_kernels", kernels)
    monkeypatch.setitem(registry._BACKENDS, "other", registry.Backend("other_kernels", ("cpu",), lambda: None))
    status, text = doctor(capsys)
    assert status == 1
    assert "Not all works" in text
    assert len(results(text, "other", "causal_conv1d", "FAILED")) == 2
    assert "other cpu - float32 causal_conv1d: RuntimeError: no such instruction" in text
    assert "many more lines" not in text
    assert len(results(text, "other", "selective_scan", "ok")) == 2
    assert len(results(text, "reference", "ok")) >= 10


def test_without_kernels_reason_and_remedy_are_shown(capsys: Printed, monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "_loaded", library._loaded.__wrapped__)
    monkeypatch.setattr(library, "PATH", tmp_path / "libfamba_kernels.so")
    monkeypatch.setattr(library, "FAILURE", tmp_path / "build_failure.txt")
    library.FAILURE.write_text("the kernels could not be compiled at installation: No such file: 'c++'\n")
    status, text = doctor(capsys)
    assert status == 0
    assert "not usable: the kernels could not be compiled at installation: No such file: 'c++'" in text
    assert "remedy: install a C++ compiler (g++ or clang++) and install famba again" in text
    assert not results(text, "native")
    assert results(text, "reference", "ok")
