"""Processes that train together stop together, fail together and never wait for one that is gone."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import TINY, metrics

from famba.errors import CheckpointError, ConfigError, TrainingError
from famba.training import distributed, slurm
from famba.training.checkpoint import check_same_run
from famba.training.distributed import adopt_slurm, connect, world_size

MINUTE = 60.0
# Lets the process of a rank do something once a number of steps is done.
PROGRAM = """
import os, signal, sys
from famba.errors import DataError
from famba.training.app import main
from famba.training.reporting import Progress

original = Progress.step

def step(self, done, epoch, loss):
    original(self, done, epoch, loss)
    if done == 2:
        {action}

if os.environ["RANK"] == "{rank}":
    Progress.step = step
sys.exit(main(sys.argv[1:]))
"""


def start(action: str, folder: Path, *overrides: str, rank: int = 1) -> list[subprocess.Popen[str]]:
    """Start two processes that train together; `action` is what that of `rank` does after two steps."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-c", PROGRAM.format(action=action, rank=rank), *TINY, f"run_dir={folder}", *overrides]
    return [
        subprocess.Popen(
            command,
            env={**shared, "RANK": str(number), "LOCAL_RANK": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]


def wait_for_step(folder: Path, step: int) -> None:
    path = folder / "metrics.jsonl"
    deadline = time.monotonic() + 5 * MINUTE
    while not (path.exists() and f'"step": {step}' in path.read_text()):
        assert time.monotonic() < deadline, "the processes did not begin to train"
        time.sleep(0.05)


@pytest.mark.slow
def test_an_error_of_one_process_ends_all_with_that_error(tmp_path: Path) -> None:
    main, other = start('raise DataError("image 7 is broken")', tmp_path)
    wait_for_step(tmp_path, 2)
    errors = [process.communicate(timeout=MINUTE)[1] for process in (main, other)]
    assert [main.returncode, other.returncode] == [2, 2]
    assert "error: process 1 failed: image 7 is broken" in errors[0]
    assert "error: image 7 is broken" in errors[1]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["status"], summary["error"]) == ("failed", "process 1 failed: image 7 is broken")


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [0, 1])
def test_a_process_that_is_frozen_is_not_waited_for(tmp_path: Path, frozen: int) -> None:
    processes = start("os.kill(os.getpid(), signal.SIGSTOP)", tmp_path, rank=frozen)
    try:
        wait_for_step(tmp_path, 2)
        _, errors = processes[1 - frozen].communicate(timeout=MINUTE)
    finally:
        processes[frozen].kill()
        processes[frozen].communicate()
    assert processes[1 - frozen].returncode == 1
    assert "Traceback" not in errors
    if frozen == 1:
        assert "lost process 1 of 2" in (tmp_path / "train.log").read_text()
        assert json.loads((tmp_path / "summary.json").read_text())["status"] == "failed"


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_the_same_step_and_the_run_goes_on(tmp_path: Path) -> None:
    processes = start("os.kill(os.getpid(), signal.SIGTERM)", tmp_path / "stopped")
    errors = [process.communicate(timeout=5 * MINUTE)[1] for process in processes]
    assert [process.returncode for process in processes] == [128 + signal.SIGTERM] * 2, errors
    assert all("stopped after step 2 of 6" in error for error in errors)
    for folder in ("stopped", "whole"):
        for process in start("pass", tmp_path / folder):
            _, error = process.communicate(timeout=5 * MINUTE)
            assert process.returncode == 0, error
    stopped, whole = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("stopped", "whole"))
    assert stopped == whole
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")


def test_another_number_of_processes_is_refused_and_why() -> None:
    with pytest.raises(CheckpointError, match=r"processes: 2 before, 1 now \(another number adds up gradients"):
        check_same_run({"config": {}, "world_size": 2}, {}, 1)


@pytest.fixture
def no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("no_ranks")
def test_tasks_of_srun_find_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    step = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "17",
            "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "node[3-4]",
            "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.3"}  # fmt: skip
    for name, value in step.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed.shutil, "which", lambda name: None)
    assert world_size() == 4
    assert (os.environ["RANK"], os.environ["LOCAL_RANK"]) == ("3", "1")
    assert os.environ["MASTER_ADDR"] == "10.0.0.3", "without Slurm's commands, as in a container"
    first = os.environ.pop("MASTER_PORT")
    del os.environ["WORLD_SIZE"]
    monkeypatch.setenv("SLURM_STEP_ID", "1")
    adopt_slurm()
    assert os.environ["MASTER_PORT"] != first, "two steps on a node do not meet"


@pytest.mark.usefixtures("no_ranks")
def test_a_batch_script_without_srun_starts_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert world_size() == 1


@pytest.mark.usefixtures("no_ranks")
def test_torchrun_inside_a_job_is_heard_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert world_size() == 8


def test_a_job_that_slurm_does_not_requeue_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    refusing = tmp_path / "scontrol"
    refusing.write_text("#!/bin/sh\necho 'Requested operation is presently disabled' >&2\nexit 1\n")
    refusing.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    with pytest.raises(TrainingError, match="does not requeue job 5: Requested operation is .* disabled. Submit"):
        slurm.requeue()


@pytest.mark.usefixtures("no_ranks")
@pytest.mark.parametrize("given", ["two", "0", "-1"])
def test_a_world_size_that_is_no_number_of_processes_is_refused(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", given)
    with pytest.raises(ConfigError, match=f"WORLD_SIZE is '{given}'; torchrun sets it"):
        world_size()


@pytest.mark.usefixtures("no_ranks")
def test_processes_without_a_place_to_meet_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE is 2, but MASTER_ADDR=None and MASTER_PORT=None name no place"):
        connect("group")


@pytest.mark.slow
def test_processes_take_the_same_measured_schedule(tmp_path: Path) -> None:
    adaptive = ("fusion=adaptive", "fusion.budget=8", "fusion.adapt_at=[0.2,0.5]", "fusion.adapt_images=16")
    # The main process alone measures; after two steps the other one says what its own network removes.
    say = 'print("schedule", *sys._getframe(1).f_back.f_locals["self"].state.model.fusion)'
    printed = [process.communicate(timeout=5 * MINUTE)[0] for process in start(say, tmp_path / "run", *adaptive)]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "finished"
    first = " ".join(map(str, summary["adapted"][0]["schedule"]))
    assert f"schedule {first}" in printed[1]
