"""Checkpoints of a run: written whole and sealed, read without running code."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from famba.errors import CheckpointError, DamagedError
from famba.files import read_file, read_seal, remove_unfinished, seal, write_whole
from famba.training.config import flatten, with_added_keys

FORMAT = 2
_KEPT = 2
_CONTENT = {"format", "config", "world_size", "step", "model", "optimizer", "scaler", "ema", "totals", "schedule"}
_log = logging.getLogger(__name__)

# What may change between a run and its continuation: it does not touch the weights that come out.
_FREE = (
    "run_dir",
    "resume",
    "data.root",
    "data.workers",
    "trainer.max_steps",
    "trainer.device",
    "trainer.cuda_graphs",
    "trainer.log_every",
    "trainer.eval_every",
    "trainer.save_every_min",
    "logger.",
)


class Checkpoints:
    """The folder of a run's checkpoints: the last two, and the one that validation selected."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, step: int, content: dict[str, Any], selected: bool = False) -> Path:
        """Write the checkpoint of a step, as the selected one too where it is; older ones than the last two go."""
        path = self.path(step)
        if selected:
            # First, since a run that goes on from the other does not select again.
            _write(self.best, content)
            write_whole(path, lambda file: _link(self.best, file))
        else:
            _write(path, content)
        for old in self._by_age()[_KEPT:]:
            old.unlink(missing_ok=True)
        return path

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.folder / f"step_{step:08d}.pt"

    def remove_unfinished(self) -> None:
        """Remove what a save left behind that was killed."""
        remove_unfinished(self.folder)

    def steps_after(self, step: int) -> list[int]:
        """Later steps that there are checkpoints of, ascending."""
        steps = [int(path.stem.removeprefix("step_")) for path in reversed(self._by_age())]
        return [later for later in steps if later > step]

    @property
    def best(self) -> Path:
        """Where the selected checkpoint is."""
        return self.folder / "best.pt"

    def find_last(self) -> Path | None:
        """Find the newest checkpoint that is whole, and put damaged later ones aside; None where there is none.

        Raises CheckpointError where there are some, but all are damaged, or where the disk or another format keeps the
        newest whole one from being read.
        """
        damaged: list[Path] = []
        for path in self._by_age():
            try:
                load(path)
            except DamagedError as error:
                _log.warning("%s; trying the one before it", error)
                damaged.append(path)
                continue
            for later in damaged:
                later.rename(later.with_suffix(".damaged"))
            return path
        if damaged:
            raise CheckpointError(f"no checkpoint in {self.folder} can be read; start anew in another run_dir")
        return None

    def contain(self, path: str) -> bool:
        """Whether a path leads into this folder."""
        return Path(path).resolve().parent == self.folder.resolve()

    @property
    def latest(self) -> Path | None:
        """The newest checkpoint, whole or not; None where there is none."""
        return next(iter(self._by_age()), None)

    def _by_age(self) -> list[Path]:
        return sorted(self.folder.glob("step_*[0-9].pt"), reverse=True)


def load(path: Path) -> dict[str, Any]:
    """Read a run's checkpoint.

    Raises DamagedError where it is not what was written, CheckpointError where it is missing, none of famba's, of
    another format, or cannot be read.
    """
    return check_content(_read(path), path)


def check_content(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return what was read from a path where it is a whole checkpoint. Raises as `load` does."""
    if "format" not in content or "step" not in content:
        raise CheckpointError(
            f"{path} holds no checkpoint of a famba run; for weights alone use init_from instead of resume"
        )
    if content["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {content['format']}, this release reads {FORMAT}; use the release that wrote it"
        )
    if not read_seal(path) or not content.keys() >= _CONTENT:
        raise DamagedError(f"{path} is damaged: its end, which seals it, is missing or changed")
    return content


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_file(path)
    except DamagedError:
        raise
    except CheckpointError as error:
        if path.is_file() and not read_seal(path) and path.suffix != ".safetensors":
            raise DamagedError(str(error)) from error
        raise


def _write(path: Path, content: dict[str, Any]) -> None:
    def write(name: str) -> None:
        # Through a file of Python's, whose error says that a disk is full; torch's own does not.
        with open(name, "wb") as file:
            torch.save({"format": FORMAT, **content}, file)
        seal(name)

    write_whole(path, write)


def _link(path: Path, name: str) -> None:
    """Give a file another name that stays where the first one goes; copy it where the file system has no links."""
    os.unlink(name)
    try:
        os.link(path, name)
    except OSError:
        shutil.copyfile(path, name)


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
    differ = differences(with_added_keys(content["config"]), config)
    if content["world_size"] != world_size:
        differ.append(
            f"processes: {content['world_size']} before, {world_size} now "
            "(another number adds up gradients in another order, so the run would not be the same)"
        )
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
