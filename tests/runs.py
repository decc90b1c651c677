"""Tiny runs on digits for tests: seconds each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from famba.training.app import plan, train
from famba.training.compose import Command, compose
from famba.training.config import RunConfig
from famba.training.setup import prepare

ROOT = Path(__file__).parents[1]
TINY = (
    "model=vim_micro",
    "model.depth=2",
    "model.embed_dim=16",
    "model.d_state=2",
    "model.patch_size=8",
    "data=digits",
    "data.subset=72",
    "recipe=quick",
    "trainer.epochs=2",
    "trainer.batch_size=24",
    "trainer.precision=fp32",
    "trainer.log_every=1",
    "recipe.warmup_epochs=0.5",
)


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    """Train a tiny Vim, 3 steps per epoch and 2 epochs unless told otherwise; return the summary."""
    return train(compose([*TINY, f"run_dir={folder}", *overrides]), folder)


def python(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, with these variables beside those of this one."""
    command, variables = [sys.executable, *arguments], {**os.environ, **environment}
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=600)


def start(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    """Begin a tiny run in a process of its own, and do not wait for its end."""
    command = [sys.executable, "train.py", *TINY, f"run_dir={folder}", *overrides]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for_lines(folder: Path, count: int) -> None:
    """Wait until a run has logged so many lines, of steps and epochs."""
    path, deadline = folder / "metrics.jsonl", time.monotonic() + 120
    while not (path.exists() and path.read_text().count("\n") >= count):
        assert time.monotonic() < deadline, "the run does not train"
        time.sleep(0.001)


def check_command(arguments: Sequence[str]) -> list[RunConfig]:
    """Check every run that a command line asks for; return their configurations."""
    command = Command.parse(arguments)
    if command.multirun:
        return [run.config for run in plan(command).runs.values()]
    prepare(config := command.config())
    return [config]


def weights(folder: Path) -> bytes:
    """Return the bytes of a run's last weights."""
    return (folder / "model.safetensors").read_bytes()


def last_checkpoint(folder: Path) -> Path:
    """Return the path of a run's newest checkpoint."""
    return sorted((folder / "checkpoints").glob("step_*.pt"))[-1]


def assert_same_run(one: Path, other: Path) -> None:
    """Two runs have the same weights, bit by bit, and the same metrics."""
    assert weights(one) == weights(other)
    assert metrics(one) == metrics(other)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without timings and memory."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    vary = ("images_per_s", "peak_memory_mib")
    return [{k: v for k, v in line.items() if "time_" not in k and k not in vary} for line in lines]


class Hostile:
    """Make a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)
