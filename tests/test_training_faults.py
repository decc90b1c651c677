"""Runs that are killed, and runs whose whole group of processes is told to stop, go on as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import TINY, assert_same_run

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
