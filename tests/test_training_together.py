"""Processes stop and fail together, name the failure that came first, and go on as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from runs import TINY, assert_same_run, python, start, wait_for_lines

from famba.errors import CheckpointError
from famba.training.checkpoint import check_same_run
from famba.training.distributed import adopt_slurm, world_size

# Lets the process of a rank do something once a number of steps is done.
PROGRAM = """
import os, signal, sys
from famba.errors import DataError
from famba.training.app import main
from famba.training.logging import Progress

original = Progress.step

def step(self, done, epoch, loss):
    original(self, done, epoch, loss)
    if done == 2:
        {action}

if os.environ["RANK"] == "{rank}":
    Progress.step = step
sys.exit(main(sys.argv[1:]))
"""


def torchrun(folder: Path, action: str = "pass", *overrides: str, rank: int = 1) -> subprocess.CompletedProcess[str]:
    """Train in two processes, started by torchrun; `action` is what that of `rank` does after two steps."""
    folder.mkdir(exist_ok=True)
    program = folder / "program.py"
    program.write_text(PROGRAM.format(action=action, rank=rank))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program)]
    return python(*command, *TINY, f"run_dir={folder}/run", *overrides, OMP_NUM_THREADS="1")


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run" / "summary.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_process_ends_all_with_that_error(tmp_path: Path, rank: int) -> None:
    done = torchrun(tmp_path, 'raise DataError("image 7 is broken")', rank=rank)
    assert done.returncode == 1, done.stderr
    assert "error: image 7 is broken" in done.stderr
    assert summary(tmp_path)["status"] == "failed"
    assert summary(tmp_path)["error"] == f"process {rank} failed: image 7 is broken"


@pytest.mark.slow
def test_the_run_of_a_process_that_is_killed_fails_and_goes_on(tmp_path: Path) -> None:
    done = torchrun(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    assert done.returncode == 1
    assert "error: process 0 failed: lost another process: killed, or out of memory" in done.stderr
    assert summary(tmp_path)["status"] == "failed"
    assert torchrun(tmp_path).returncode == 0
    assert summary(tmp_path)["status"] == "finished"


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_the_same_step_and_the_run_goes_on(tmp_path: Path) -> None:
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    done = torchrun(stopped, "os.kill(os.getpid(), signal.SIGTERM)")
    assert done.stderr.count("stopped after step 2 of 6") == 2, done.stderr
    assert summary(stopped)["status"] == "interrupted"
    for folder in (stopped, whole):
        assert torchrun(folder).returncode == 0
    assert_same_run(stopped / "run", whole / "run")


def test_another_number_of_processes_is_refused_and_why() -> None:
    with pytest.raises(CheckpointError, match=r"processes: 2 before, 1 now \(they add up gradients"):
        check_same_run({"config": {}, "world_size": 2}, {"config": {}, "world_size": 1})


def test_tasks_of_srun_find_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that what is set below is undone
        monkeypatch.delenv(name)
    step = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "17",
            "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "node[3-4]",
            "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.3"}  # fmt: skip
    for name, value in step.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", "")
    assert world_size() == 4
    assert (os.environ["RANK"], os.environ["LOCAL_RANK"]) == ("3", "1")
    assert os.environ["MASTER_ADDR"] == "10.0.0.3", "without Slurm's commands, as in a container"
    first = os.environ.pop("MASTER_PORT")
    del os.environ["WORLD_SIZE"]
    monkeypatch.setenv("SLURM_STEP_ID", "1")
    adopt_slurm()
    assert os.environ["MASTER_PORT"] != first, "two steps on a node do not meet"


@pytest.mark.slow
def test_processes_take_the_same_measured_schedule(tmp_path: Path) -> None:
    adaptive = ("fusion=adaptive", "fusion.budget=8", "fusion.adapt_at=[0.2,0.5]", "fusion.adapt_images=16")
    # The main process alone measures; after two steps the other one says what its own network removes.
    say = 'print("schedule", *sys._getframe(1).f_back.f_locals["self"].state.model.fusion)'
    done, found = torchrun(tmp_path, say, *adaptive), summary(tmp_path)
    assert found["status"] == "finished", done.stderr
    assert f"schedule {' '.join(map(str, found['adapted'][0]['schedule']))}" in done.stdout


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_nobody_killed(tmp_path: Path) -> None:
    # A checkpoint after each step: at most of these moments one is being written.
    settings = ("trainer.epochs=8", "trainer.save_every_min=1e-9", "recipe.ema_decay=0.9", "recipe.mixup=0.8")
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for lines in (1, 12, 26):
        process = start(killed, *settings)
        wait_for_lines(killed, lines)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it was killed before its end"
    for folder in (killed, whole):
        process = start(folder, *settings)
        errors = process.communicate(timeout=300)[1]
        assert process.returncode == 0, errors
    assert_same_run(killed, whole)


@pytest.mark.slow
def test_a_signal_to_the_whole_group_reaches_training_before_its_loaders_end(tmp_path: Path) -> None:
    process = start(tmp_path, "recipe.augmentation=timm", "data.workers=2", "trainer.epochs=400")
    wait_for_lines(tmp_path, 3)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "stopped after step" in errors
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # no loader is left behind
