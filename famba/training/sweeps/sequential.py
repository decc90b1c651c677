"""One run after the other in this process."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hydra.core.utils import JobReturn, JobStatus, run_job

from famba.errors import FambaError
from famba.training.sweeps.plan import Sweep, say

if TYPE_CHECKING:
    from hydra_plugins.famba_launchers import FambaLauncher


def launch(launcher: FambaLauncher, job_overrides: Sequence[Sequence[str]], first: int) -> list[JobReturn]:
    """Do the runs that are not finished; one that fails does not keep the others from running."""
    sweep = Sweep(launcher, job_overrides, first)
    sweep.announce()
    for run in sweep.left:
        say(f"{run.name}: started")
        done = run_job(
            hydra_context=launcher.hydra_context,
            task_function=launcher.task_function,
            config=run.values,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
        if done.status == JobStatus.COMPLETED:
            sweep.finish(run, {"top1": done.return_value})
            continue
        error = done._return_value
        if not isinstance(error, FambaError):
            traceback.print_exception(error)
        sweep.fail(run, error, run.folder / "train.log")
    return sweep.returns()
