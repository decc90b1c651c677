"""Where a run goes on: the checkpoint that `resume` means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from famba.errors import CheckpointError
from famba.training import checkpoint, slurm
from famba.training.config import RunConfig, plain
from famba.training.distributed import Process
from famba.training.run_folder import RunFolder


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
