"""Sweeps on a real Slurm, started on this machine for the tests."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from runs import TINY, assert_same_run

from famba.training.sweeps import queue, remembered

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "local_slurm.sh"
# Long enough to be stopped on the way: 180 steps and one evaluation.
LONG = [*TINY, "trainer.epochs=60", "trainer.eval_every=1000", "fusion.budget=5", "trainer.device=cpu"]


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One Slurm for all processes of pytest; the last to leave stops it."""
    absent = [name for name in ("munged", "slurmctld", "slurmd") if shutil.which(name, path="/usr/sbin:/sbin") is None]
    if absent:
        pytest.skip(f"Slurm is not installed: no {', '.join(absent)}; apt-get install slurm-wlm munge")
    if os.getuid() != 0:
        pytest.skip("Slurm's daemons need root")
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "slurm"
    users, lock = shared.with_suffix(".users"), FileLock(shared.with_suffix(".lock"))
    with lock:
        count = int(users.read_text()) if users.exists() else 0
        if count == 0:
            subprocess.run([SCRIPT, "start", shared], check=True, stdout=subprocess.DEVNULL, timeout=60)
        users.write_text(str(count + 1))
    os.environ["SLURM_CONF"] = f"{shared}/slurm.conf"
    yield
    with lock:
        count = int(users.read_text()) - 1
        users.write_text(str(count))
        if count == 0:
            subprocess.run([SCRIPT, "stop", shared], check=True, timeout=60)


class Sweep:
    """A sweep's folder and the command that works on it."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.folder = folder
        self.command = [sys.executable, "train.py", "-m", *overrides, "hydra/launcher=slurm", f"run_dir={folder}"]
        self.command += ["hydra.launcher.cpus_per_task=1"]

    def submit(self) -> str:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(self.command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=200)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def wait(self) -> None:
        wait_for(lambda: not set(queue()) & set(remembered(self.folder / "slurm").values()), 400)

    def job(self, name: str) -> str:
        wait_for(lambda: (self.folder / "slurm" / "jobs.json").exists())
        return json.loads((self.folder / "slurm" / "jobs.json").read_text())[name]

    def logged(self, name: str) -> int:
        path = self.folder / name / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def summary(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / name / "summary.json").read_text())

    def states(self) -> dict[str, str]:
        return {
            path.parent.name: self.summary(path.parent.name)["status"] for path in self.folder.glob("*/summary.json")
        }

    def processes(self, name: str) -> list[int]:
        """The training processes of a run's job."""
        job = self.job(name)
        main, _, task = job.partition("_")
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                is_ours = f"{self.folder}/slurm\0" in (entry / "cmdline").read_text()
                given = (entry / "environ").read_text().split("\0")
            except OSError:
                continue
            mine = {f"SLURM_ARRAY_JOB_ID={main}", f"SLURM_ARRAY_TASK_ID={task}"} if task else {f"SLURM_JOB_ID={main}"}
            # srun has the same arguments, but no step.
            in_step = any(variable.startswith("SLURM_STEP_NUM_TASKS=") for variable in given)
            if is_ours and in_step and mine <= set(given):
                found.append(int(entry.name))
        return found


def wait_for(true: Callable[[], bool], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_cancelled_failing_and_killed_jobs_do_not_stop_the_others_and_the_same_command_goes_on(
    slurm: None, tmp_path: Path
) -> None:
    sweep = Sweep(tmp_path / "sweep", *LONG, "recipe.optimizer=sgd", "recipe.lr=0.003,0.004,0.005,1000")
    good, cancelled, killed, bad = (f"recipe.lr={rate}" for rate in ("0.003", "0.004", "0.005", "1000"))
    assert "4 job(s) in Slurm" in sweep.submit()
    wait_for(lambda: sweep.logged(cancelled) > 5)
    subprocess.run(["scancel", sweep.job(cancelled)], check=True)
    wait_for(lambda: sweep.logged(killed) > 5)
    send(signal.SIGKILL, sweep.processes(killed))
    sweep.wait()
    assert sweep.states() == {good: "finished", cancelled: "interrupted", killed: "running", bad: "failed"}
    assert "the loss is" in sweep.summary(bad)["error"]
    stopped_at = sweep.summary(cancelled)["step"]
    assert 5 < stopped_at < 180

    sweep.command = [argument.replace(",0.005,1000", "") for argument in sweep.command]
    assert "1 finished already" in sweep.submit()
    sweep.wait()
    assert sweep.states()[cancelled] == "finished"
    assert f"continuing after step {stopped_at}" in (sweep.folder / cancelled / "train.log").read_text()
    scripts = sorted((sweep.folder / "slurm").glob("[0-9]*.sh"))
    assert "2 finished already" in sweep.submit()
    assert sorted((sweep.folder / "slurm").glob("[0-9]*.sh")) == scripts, "nothing was submitted"


@pytest.mark.slow
def test_two_time_limits_give_the_weights_of_a_run_without(slurm: None, tmp_path: Path) -> None:
    longer = [*LONG, "trainer.epochs=200", "fusion=upper"]
    sweep = Sweep(tmp_path / "sweep", *longer, "hydra.launcher.timeout_min=1", "hydra.launcher.signal_delay_s=10")
    sweep.submit()
    whole = subprocess.run(
        [sys.executable, "train.py", *longer, f"run_dir={tmp_path}/whole"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert whole.returncode == 0, whole.stderr
    # On its way a run is slowed down, not the others: most of the time it is stopped.
    log = sweep.folder / "run" / "train.log"
    restarts = 0
    while restarts < 2:
        before = sweep.logged("run")
        time.sleep(0.02)
        if sweep.logged("run") > before > 0:
            processes = sweep.processes("run")
            send(signal.SIGSTOP, processes)
            time.sleep(1.5)
            send(signal.SIGCONT, processes)
        restarts = log.read_text().count("back in Slurm's queue") if log.exists() else 0
    sweep.wait()
    assert log.read_text().count("continuing after step") == 2
    assert_same_run(sweep.folder / "run", tmp_path / "whole")


def send(number: signal.Signals, processes: list[int]) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, number)
