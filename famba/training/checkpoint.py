"""Checkpoints of a run: written whole or not at all, read without running code."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from famba.errors import CheckpointError
from famba.models.checkpoints import read_file
from famba.training.config import flatten

FORMAT = 1
_KEPT = 2
_CONTENT = {"format", "config", "world_size", "step", "model", "optimizer", "scaler", "ema", "totals"}
_log = logging.getLogger(__name__)

# What may change between a run and its continuation: it does not touch the weights that come out.
_FREE = (
    "run_dir",
    "resume",
    "data.root",
    "data.workers",
    "trainer.max_steps",
    "trainer.device",
    "trainer.log_every",
    "trainer.eval_every",
    "trainer.save_every_min",
    "logger.",
)


class Checkpoints:
    """The folder of a run's checkpoints: the last two, and the one that validation selected."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, step: int, content: dict[str, Any]) -> Path:
        """Write the checkpoint of a step; older ones than the last two go."""
        path = self.folder / f"step_{step:08d}.pt"
        write_whole(path, lambda file: torch.save({"format": FORMAT, **content}, file))
        for old in self._by_age()[_KEPT:]:
            old.unlink()
        return path

    def steps_after(self, step: int) -> list[int]:
        """Later steps that there are checkpoints of, ascending."""
        steps = [int(path.stem.removeprefix("step_")) for path in reversed(self._by_age())]
        return [later for later in steps if later > step]

    def save_best(self, content: dict[str, Any]) -> None:
        """Write the checkpoint that validation selects."""
        write_whole(self.best, lambda file: torch.save({"format": FORMAT, **content}, file))

    @property
    def best(self) -> Path:
        """Where the selected checkpoint is."""
        return self.folder / "best.pt"

    def load_last(self) -> dict[str, Any] | None:
        """Read the newest checkpoint that is whole; None where there is none at all.

        Raises CheckpointError where there are some, but none can be read.
        """
        paths = self._by_age()
        for path in paths:
            try:
                return load(path)
            except CheckpointError as error:
                _log.warning("%s; trying the one before it", error)
        if paths:
            raise CheckpointError(f"no checkpoint in {self.folder} can be read; start anew in another run_dir")
        return None

    def exist(self) -> bool:
        """Whether there is any."""
        return bool(self._by_age())

    def _by_age(self) -> list[Path]:
        return sorted(self.folder.glob("step_*[0-9].pt"), reverse=True)


def load(path: Path) -> dict[str, Any]:
    """Read a run's checkpoint. Raises CheckpointError where it is missing, damaged, or none of famba's."""
    content = read_file(path)
    if not content.keys() >= _CONTENT:
        raise CheckpointError(
            f"{path} holds no checkpoint of a famba run; for weights alone use init_from instead of resume"
        )
    if content["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {content['format']}, this release reads {FORMAT}; use the release that wrote it"
        )
    return content


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """List the settings in which two configurations differ and that change the weights that come out."""
    old, new = flatten(before), flatten(now)
    return [
        f"{key}: {old.get(key)!r} before, {new.get(key)!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(_FREE)
    ]


def check_same_run(content: dict[str, Any], config: dict[str, Any], world_size: int) -> None:
    """Raise CheckpointError where a checkpoint is of a run with other settings, naming each."""
    differ = differences(content["config"], config)
    if content["world_size"] != world_size:
        differ.append(f"processes: {content['world_size']} before, {world_size} now")
    if differ:
        listed = "\n  ".join(differ)
        raise CheckpointError(
            f"the checkpoint is of a run with other settings:\n  {listed}\n"
            "Use the same settings to continue it, or another run_dir to start a new run"
        )


def save_weights(path: Path, weights: dict[str, Tensor]) -> None:
    """Write weights alone as safetensors; equal weights give equal bytes."""
    weights = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    write_whole(path, lambda file: save_file(weights, file))


def write_whole(path: Path, write: Callable[[str], object]) -> None:
    """Write a file beside its place, sync it and rename it: a reader sees the old one or the new one, whole.

    Raises CheckpointError where the disk refuses; the old file is then still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"cannot write {path}: {error}; the file before it is unharmed") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
