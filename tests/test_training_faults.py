"""Runs that are killed, and runs whose whole group of processes is told to stop, go on as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import TINY, assert_same_run, last_checkpoint, run
from torch import nn

from famba.errors import TrainingError
from famba.training import step, trainer
from famba.training.checkpoint import load

ROOT = Path(__file__).parents[1]


def start(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "train.py", *TINY, f"run_dir={folder}", *overrides]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for_lines(folder: Path, count: int) -> None:
    """Wait until a run has logged so many lines, of steps and epochs."""
    path, deadline = folder / "metrics.jsonl", time.monotonic() + 120
    while not (path.exists() and path.read_text().count("\n") >= count):
        assert time.monotonic() < deadline, "the run does not train"
        time.sleep(0.001)


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_nobody_killed(tmp_path: Path) -> None:
    # A checkpoint after each step: at most of these moments one is being written.
    settings = ("trainer.epochs=8", "trainer.save_every_min=1e-9", "recipe.ema_decay=0.9", "recipe.mixup=0.8")
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for lines in (1, 12, 26):
        process = start(killed, *settings)
        wait_for_lines(killed, lines)
        time.sleep(0.01 * (lines % 3))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it was killed before its end"
    for folder in (killed, whole):
        process = start(folder, *settings)
        errors = process.communicate(timeout=300)[1]
        assert process.returncode == 0, errors
    assert_same_run(killed, whole)
    results = [json.loads((folder / "summary.json").read_text()) for folder in (killed, whole)]
    assert [results[0][key] for key in ("top1", "ema_top1", "loss")] == [
        results[1][key] for key in ("top1", "ema_top1", "loss")
    ]


@pytest.mark.slow
def test_a_signal_to_the_whole_group_reaches_training_before_its_loaders_end(tmp_path: Path) -> None:
    process = start(tmp_path, "recipe.augmentation=timm", "data.workers=2", "trainer.epochs=400")
    wait_for_lines(tmp_path, 3)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "stopped after step" in errors
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # no loader is left behind


def test_a_run_that_an_error_ends_keeps_what_it_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ("trainer.epochs=1", "recipe.ema_decay=0.9")
    run(tmp_path / "whole", *settings)
    update, done = step.Step.update, []

    def broken_after(calls: int, error: Exception) -> None:
        done.clear()

        def change(self: step.Step) -> None:
            update(self)
            done.append(1)
            if len(done) == calls:
                raise error

        monkeypatch.setattr(step.Step, "update", change)

    # In the next step's images: two steps are done.
    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        batch = step.Step.next_batch
        count = iter((1, 1, 0))
        patched.setattr(step.Step, "next_batch", lambda self, batches: batch(self, batches) if next(count) else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(folder, *settings)
    assert last_checkpoint(folder).name == "step_00000002.pt"
    assert (
        f"saved after step 2; to go on from there: famba train run_dir={folder}" in (folder / "train.log").read_text()
    )
    broken_after(1, RuntimeError("in the middle of a change"))
    with pytest.raises(RuntimeError, match="in the middle"):
        run(folder, *settings)
    assert last_checkpoint(folder).name == "step_00000002.pt", "weights of half a step are not kept"
    monkeypatch.undo()
    run(folder, *settings)
    assert_same_run(folder, tmp_path / "whole")


def test_no_checkpoint_holds_what_is_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Test that a checkpoint looks at the losses first, where they are looked at now and then, as on a GPU."""
    calls = []

    def broken(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        loss = nn.functional.cross_entropy(logits, targets)
        return loss * float("nan") if len(calls) >= 2 else loss

    start = trainer.Training.__init__

    def rarely(self: trainer.Training, *arguments: Any) -> None:
        start(self, *arguments)
        self._look_every = 10

    monkeypatch.setattr(step, "create_loss", lambda recipe: broken)
    monkeypatch.setattr(trainer.Training, "__init__", rarely)
    with pytest.raises(TrainingError, match="the loss is nan at step 2"):
        run(tmp_path, "trainer.save_every_min=1e-9", "trainer.log_every=10")
    kept = [load(path) for path in (tmp_path / "checkpoints").glob("step_*.pt")]
    assert [content["step"] for content in kept] == [1]
    assert all(torch.isfinite(value).all() for value in kept[0]["model"].values())
