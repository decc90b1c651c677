"""Each run a job of a Slurm cluster, by way of submitit.

A run's own folder says whether it is finished, Slurm's queue whether its job still has to do. submitit writes the batch
script, starts the processes and keeps what an exception said; it is not asked for states, since without accounting it
does not know them.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from hydra.core.utils import JobReturn
from omegaconf import OmegaConf

from famba.errors import ConfigError, FambaError, TrainingError
from famba.files import write_whole
from famba.training.config import parse, plain
from famba.training.sweeps.logs import exception_of, last_error
from famba.training.sweeps.plan import Run, Sweep, say

if TYPE_CHECKING:
    from hydra_plugins.famba_launchers import FambaLauncher

_OF_SUBMITIT = ("name", "timeout_min", "nodes", "tasks_per_node", "gpus_per_node", "cpus_per_task", "mem_gb")
_OURS = ("_target_", "python", "max_num_timeout", "poll_s")
# A file system shows what a job has written last after a while.
_GRACE_S = 20.0
_INTENDED = "submitting.json"  # runs in the order in which they are being submitted


class StoppedError(Exception):
    """A job that was cancelled; its run has saved itself."""


class Training:
    """What each process of a job calls, by way of a pickle."""

    def __init__(self, config: Mapping[str, Any], folder: str) -> None:
        self.config, self.folder = dict(config), folder

    def __call__(self) -> float:
        """Train; return Top-1."""
        from famba.training.app import train

        try:
            return train(parse(self.config), Path(self.folder))["top1"]
        except KeyboardInterrupt as stop:
            # submitit keeps exceptions, which a KeyboardInterrupt is not.
            raise StoppedError(str(stop)) from None

    def checkpoint(self) -> Any:
        """Return what to submit again where Slurm gives notice before training answers it."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def launch(launcher: FambaLauncher, job_overrides: Sequence[Sequence[str]], first: int) -> list[JobReturn]:
    """Submit the runs that are neither finished nor in the queue already, and wait for all."""
    sweep = Sweep(launcher, job_overrides, first)
    settings: dict[str, Any] = OmegaConf.to_container(launcher.config.hydra.launcher, resolve=True)  # type: ignore[assignment]
    folder = sweep.folder / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        sweep.announce()
        jobs = _still_queued(folder, sweep.left)
        _remember(folder, jobs)
        new = [run for run in sweep.left if run.name not in jobs]
        if new:
            # sbatch may take the jobs and this process end before it has written down which.
            _write(folder / _INTENDED, [run.name for run in new])
            jobs |= _submit(new, settings, folder)
            _remember(folder, jobs)
    _Watch(sweep, jobs, folder, settings["nodes"] * settings["tasks_per_node"], settings["poll_s"]).run()
    return sweep.returns()


def queue() -> dict[str, str]:
    """Return the state of each of the user's jobs that waits or runs, by its id; HELD for one that waits in vain.

    Raises TrainingError where Slurm does not answer.
    """
    return {
        job: "HELD" if state == "PENDING" and "held" in reason.lower() else state
        for job, state, reason, script in _squeue()
    }


def _squeue() -> list[list[str]]:
    """The id, state, reason and batch script of each of the user's jobs that waits or runs."""
    command = ["squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%i|%T|%r|%o"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)  # noqa: S603 - Slurm's own
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        raise TrainingError(f"squeue does not answer: {said.strip()}") from error
    return [line.split("|", 3) for line in done.stdout.splitlines() if line.count("|") >= 3]


def remembered(folder: Path) -> dict[str, str]:
    """Return the job of each run that was submitted last, from a sweep's slurm folder."""
    try:
        return {str(name): str(job) for name, job in json.loads((folder / "jobs.json").read_text()).items()}
    except (OSError, ValueError, AttributeError):
        return {}


def _remember(folder: Path, jobs: Mapping[str, str]) -> None:
    _write(folder / "jobs.json", {**remembered(folder), **jobs})
    (folder / _INTENDED).unlink(missing_ok=True)


def _write(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=2) + "\n"
    write_whole(path, lambda file: Path(file).write_text(text))


def _still_queued(folder: Path, runs: Sequence[Run]) -> dict[str, str]:
    """Jobs of an earlier start that Slurm still has."""
    before = {**remembered(folder), **_unrecorded(folder)}
    jobs = {run.name: before[run.name] for run in runs if run.name in before}
    states = queue() if jobs else {}
    return {name: job for name, job in jobs.items() if job in states}


def _unrecorded(folder: Path) -> dict[str, str]:
    """Jobs in the queue that a start has submitted which ended before it could write them down."""
    try:
        intended = [str(name) for name in json.loads((folder / _INTENDED).read_text())]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{folder / _INTENDED} is damaged ({error}), so jobs of this sweep may be in Slurm unnoticed; "
            "cancel those that `squeue --me` shows, and remove the file"
        ) from error
    known = {job.split("_")[0] for job in remembered(folder).values()}
    found = {}
    for job, _, _, script in _squeue():
        main, _, task = job.partition("_")
        # submitit keeps the batch scripts in the folder. It makes an array of several jobs, in their order.
        if main not in known and Path(script.strip()).parent == folder and int(task or 0) < len(intended):
            found[intended[int(task or 0)]] = job
    return found


def _submit(runs: Sequence[Run], settings: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Submit runs as one array. Raises ConfigError with Slurm's words where it refuses."""
    import submitit

    failures = (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError, NameError, ValueError)
    try:
        executor = submitit.AutoExecutor(
            folder=folder,
            cluster="slurm",
            slurm_max_num_timeout=settings["max_num_timeout"],
            slurm_python=settings["python"],
        )
        executor.update_parameters(**_parameters(settings))
        # submitit prints what Slurm says too.
        with redirect_stderr(io.StringIO()), executor.batch():
            jobs = [executor.submit(Training(plain(run.config), str(run.folder))) for run in runs]
    except failures as error:
        raise ConfigError(f"the jobs cannot be submitted: {error}") from error
    return {run.name: job.job_id for run, job in zip(runs, jobs, strict=True)}


def _parameters(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Name settings as submitit's AutoExecutor does; what is null is left to the cluster."""
    given = {key: value for key, value in settings.items() if value is not None and key not in _OURS}
    if "cpus_per_task" in given:
        # Since Slurm 22.05 srun does not take it over from the job.
        given["srun_args"] = [*given.get("srun_args", []), f"--cpus-per-task={given['cpus_per_task']}"]
    return {key if key in _OF_SUBMITIT else f"slurm_{key}": value for key, value in given.items()} | {
        "stderr_to_stdout": True
    }


@dataclass
class _Job:
    """A run in Slurm; left_at says when Slurm was first seen without it."""

    run: Run
    id: str
    state: str = ""
    left_at: float | None = None


class _Watch:
    """Waits for jobs and says what becomes of them."""

    def __init__(self, sweep: Sweep, jobs: Mapping[str, str], folder: Path, processes: int, poll_s: float) -> None:
        self._sweep, self._folder, self._processes, self._poll_s = sweep, folder, processes, poll_s
        self._jobs = [_Job(run, jobs[run.name]) for run in sweep.left]
        self._answered = True

    def run(self) -> None:
        """Wait for all. Ctrl-C ends the waiting alone."""
        try:
            while self._jobs:
                self._look()
                if self._jobs:
                    time.sleep(self._poll_s)
        except KeyboardInterrupt:
            ids = " ".join(sorted({job.id.split("_")[0] for job in self._jobs}))
            print(
                f"no longer waiting; {len(self._jobs)} jobs stay in Slurm. The same command waits for them again, "
                f"`scancel {ids}` ends them, `famba status {self._sweep.folder}` shows them",
                file=sys.stderr,
            )
            raise

    def _look(self) -> None:
        try:
            states = queue()
        except TrainingError as error:
            if self._answered:
                say(f"{error}; waiting until it does")
            self._answered = False
            return
        self._answered = True
        for job in list(self._jobs):
            if job.id in states:
                job.left_at = None
                self._tell(job, states[job.id])
            elif self._conclude(job):
                self._jobs.remove(job)

    def _tell(self, job: _Job, state: str) -> None:
        """Say that a job has come into another state; on its way out it is not yet there."""
        if state in (job.state, "COMPLETING"):
            return
        again = " again" if job.state == "RUNNING" else ""
        words = {
            "PENDING": f"waiting in Slurm{again}",
            "HELD": f"held back by Slurm until `scontrol release {job.id}`",
        }
        say(f"{job.run.name}: {words.get(state, state.lower())}, job {job.id}")
        job.state = state

    def _conclude(self, job: _Job) -> bool:
        """Take down what came of a job that left the queue; False where it may still be under way from the disk."""
        try:
            summary = job.run.done()
        except FambaError as error:
            self._sweep.fail(job.run, error, self._log(job, 0))
            return True
        if summary is not None:
            self._sweep.finish(job.run, summary)
            return True
        job.left_at = job.left_at or time.monotonic()
        said = self._said(job)
        if said is None and time.monotonic() - job.left_at < _GRACE_S:
            return False
        rank, last = said or (0, self._without_a_word(job))
        self._sweep.fail(job.run, TrainingError(last), self._log(job, rank))
        return True

    def _said(self, job: _Job) -> tuple[int, str] | None:
        """The first process that ended with an exception, and what it said."""
        for rank in range(self._processes):
            try:
                outcome, value = pickle.loads(self._path(job, f"{rank}_result.pkl").read_bytes())  # noqa: S301 - written by our job
            except (OSError, EOFError, pickle.UnpicklingError):
                continue
            if outcome == "error":
                return rank, exception_of(value)
        return None

    def _without_a_word(self, job: _Job) -> str:
        last = last_error(self._log(job, 0))
        return f"job {job.id} ended without a result: {last or 'its log is empty'}"

    def _log(self, job: _Job, rank: int) -> Path:
        return self._path(job, f"{rank}_log.out")

    def _path(self, job: _Job, name: str) -> Path:
        return self._folder / f"{job.id}_{name}"
