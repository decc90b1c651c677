"""Shapes in signatures are checked while the tests run; Triton's kernels run in its interpreter where no GPU is."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import install_import_hook

# Before Triton is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Before famba is first imported. Not in Triton's functions, which Triton compiles from their sources. float annotations
# take ints, as PEP 484 has it.
OPS = Path(__file__).parents[1] / "famba" / "ops"
CHECKED = sorted(f"famba.ops.{path.stem}" for path in OPS.iterdir() if path.stem not in ("__init__", "triton"))
install_import_hook(
    [*CHECKED, "famba.fusion", "famba.models"],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)


@pytest.fixture(scope="session")
def upper(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Return the folder and the summary of a finished run that fuses, for tests that only read it."""
    from runs import run

    folder = tmp_path_factory.mktemp("upper")
    chosen = ("fusion=upper", "fusion.budget=8", "model.depth=4", "model.patch_size=4", "model.cls_position=middle")
    return folder, run(folder, *chosen)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an export start no other process that tries it."""
    monkeypatch.setattr("famba.export.export.check_file", lambda *arguments: "not checked")


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that has this process sent a signal once a number of steps is done; -1 for never."""
    from famba.training.logging import Progress

    original = Progress.step

    def arrange(stop: int, number: signal.Signals = signal.SIGINT) -> None:
        def step(self: Progress, done: int, epoch: int, loss: float | None) -> None:
            original(self, done, epoch, loss)
            if done == stop:
                os.kill(os.getpid(), number)

        monkeypatch.setattr(Progress, "step", step)

    return arrange
