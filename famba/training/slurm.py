"""Requests of a run to Slurm, from inside a job."""

from __future__ import annotations

import os
import subprocess
import time
from typing import NoReturn

from famba.errors import TrainingError
from famba.training.interrupts import StopRequest

_ENDED_BY_SLURM_S = 300.0


def in_job() -> bool:
    """Return whether this process belongs to a Slurm job."""
    return "SLURM_JOB_ID" in os.environ


def is_restarted() -> bool:
    """Return whether Slurm has started this job before."""
    return "SLURM_RESTART_COUNT" in os.environ


def requeue() -> None:
    """Put this job back into Slurm's queue, which ends it here. Raises TrainingError where Slurm refuses."""
    job, array = os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_ARRAY_JOB_ID")
    if array is not None:
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60, check=True)  # noqa: S603, S607
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip()
        raise TrainingError(
            f"the run is saved, but Slurm does not requeue job {job}: {reason}. "
            "Submit the same command again, with sbatch --requeue where jobs are not requeued by default"
        ) from error


def wait_for_the_end(stop: StopRequest) -> NoReturn:
    """Wait until Slurm ends this process, so that nobody takes the job for finished, and end it."""
    deadline = time.monotonic() + _ENDED_BY_SLURM_S
    while not stop.ended and time.monotonic() < deadline:
        time.sleep(0.1)
    raise SystemExit(128 + stop.number)
