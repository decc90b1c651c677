"""Find where a run goes on, and with which settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from famba.errors import CheckpointError
from famba.files import read_file
from famba.training import checkpoint, slurm
from famba.training.config import ADDED_KEYS, RunConfig, flatten, parse, plain
from famba.training.distributed import Process
from famba.training.run_folder import RunFolder


def as_begun(config: RunConfig, run_dir: Path) -> RunConfig:
    """Return the configuration with which the run in a folder goes on.

    Keys that were added since the run began take the values that reproduce its version; a new run's stay as they are.
    Raises FambaError where the run's own configuration cannot be read.
    """
    before = _begun(config, run_dir)
    if before is None:
        return config
    added = ADDED_KEYS.keys() - flatten(before).keys()
    values = plain(config)
    for key in added:
        group, name = key.split(".")
        values[group][name] = ADDED_KEYS[key]
    return parse(values)


def _begun(config: RunConfig, run_dir: Path) -> dict[str, Any] | None:
    """Return the configuration of the run that is to go on, None where a run starts anew."""
    if config.resume == "never" and not slurm.is_restarted():
        return None
    there = RunFolder(run_dir, writes=False).config
    if there is not None or config.resume in ("auto", "never"):
        return there
    found = read_file(config.resume).get("config")
    return found if isinstance(found, dict) else None


def find_checkpoint(config: RunConfig, run: RunFolder, process: Process) -> dict[str, Any] | None:
    """Read the checkpoint to go on from, the same in all processes; None where the run starts anew.

    Raises CheckpointError where it is of another run, or where the folder holds later steps than the one that is named.
    """
    resume, folder = config.resume, run.checkpoints
    if resume == "never" and not slurm.is_restarted():
        return None
    # One process looks for the last whole one, and the others take the same.
    path = process.from_main(folder.find_last() if process.is_main else None)
    named = Path(resume) if resume not in ("auto", "never") else None
    # A checkpoint of elsewhere is where the run began; what it has saved since is where it goes on.
    if named is not None and (path is None or folder.contain(resume)):
        path = named
    if path is None:
        return None
    found = checkpoint.load(path)
    checkpoint.check_same_run(found, plain(config), process.world_size)
    later = folder.steps_after(found["step"])
    if path == named and later:
        raise CheckpointError(
            f"{resume} is of step {found['step']}, but {run.path} holds step {later[-1]} already; "
            "choose another run_dir, or resume=auto to go on from there"
        )
    return found
