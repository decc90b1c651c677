"""Tiny runs on digits for tests: seconds each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from famba.training.app import plan, train
from famba.training.compose import Command, compose
from famba.training.estimate import Alike
from famba.training.setup import prepare

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


def check_command(arguments: Sequence[str]) -> list[Alike]:
    """Check every run that a command line asks for; return those of a sweep, but for their seeds."""
    command = Command.parse(arguments)
    if command.multirun:
        return plan(command)[1]
    prepare(command.config())
    return []


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without timings and memory."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "time_" not in k and k not in _VARY} for line in lines]


_VARY = ("images_per_s", "peak_memory_mib")
