"""Sweeps: names, checks, and what would be submitted to Slurm."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from runs import TINY, check_command

from famba.errors import ConfigError, TrainingError
from famba.training import sweeps
from famba.training.app import main, train
from famba.training.compose import Command, compose
from famba.training.config import RunConfig
from famba.training.interrupts import Interrupted
from famba.training.sweeps import Local, Run, Slurm, Sweep, choose, folder_name

TABLE = ["-m", "experiment=paper_table"]


def names(*arguments: str) -> tuple[str, list[str]]:
    """The folder of a sweep, and those of its runs in it."""
    sweep = Sweep(Command.parse(arguments))
    return str(sweep.folder), list(sweep.runs)


# Names


def test_a_name_is_one_plain_folder_and_no_other_runs(tmp_path: Path) -> None:
    values = ["/a/b", "a/b", "../b", "..", "a_b", "a b", "'a b'", "/a//b", "$HOME;rm *", "a\nb"]
    values += ["x" * 400, "x" * 401, "ä" * 200]
    found = [folder_name([f"data.root={value}"]) for value in values]
    assert len(set(found)) == len(values), "names that look alike stay apart"
    for name in found:
        assert len(name.encode()) < 255
        assert not set(name) & set("/\\ '\"$;*\n")
        (tmp_path / name).mkdir()
    assert folder_name(["seed=0", "fusion=upper", "model=vim_s"], ["model"]) == "fusion=upper,seed=0"
    assert folder_name(["fusion.layers=[2,5]", "+x=1"], ["x"]) == "fusion.layers=[2,5]"
    assert folder_name([]) == "run"


def test_folders_are_named_as_version_0_1_named_them() -> None:
    assert names("-m", "seed=0,1", "fusion=upper", "data.root=/a,../../b", "run_dir=runs/mine") == (
        "runs/mine",
        [f"data.root={root},seed={seed}-{end}" for seed, root, end in
         ((0, "_a", "23224150"), (0, ".._.._b", "25e2a604"), (1, "_a", "fc59f8b6"), (1, ".._.._b", "e2c9ebb8"))],
    )  # fmt: skip
    folder, runs = names(*TABLE)
    assert folder == "runs/paper_table-368c7769"
    assert len(runs) == 30
    assert "fusion=upper,model=vim_s,seed=2" in runs
    # A part lands in the folder of the whole.
    part = [f"fusion=upper,model={model},seed={seed}" for model in ("vim_ti", "vim_s") for seed in (1, 7)]
    assert names(*TABLE, "fusion=upper", "seed=1,7") == (folder, part)


def test_the_folder_of_a_sweep_depends_on_what_its_runs_share() -> None:
    folder, _ = names("-m", "seed=0,1", "fusion=upper")
    assert folder == "runs/sweep-8159503a"
    for more in ("seed=0,1,2 hydra/launcher=slurm", "seed=0,1 data.root=/elsewhere trainer.log_every=5"):
        assert names("-m", "fusion=upper", *more.split())[0] == folder
    assert names("-m", "seed=0,1", "fusion=lower")[0] != folder != names("-m", "seed=0", "fusion=upper,lower")[0]


# Checks


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Slurm's commands, which keep what they are given."""
    folder = tmp_path / "commands"
    folder.mkdir()
    kept = f'cp "$1" {tmp_path}/script.sh; echo Submitted batch job 7'
    for name, does in {"sbatch": kept, "srun": "", "squeue": ""}.items():
        (folder / name).write_text(f"#!/bin/sh\n{does}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


_TARGET = "hydra.launcher._target_=hydra._internal.core_plugins.basic_launcher.BasicLauncher"
_SLURM = "hydra/launcher=slurm"
REFUSED = [
    (["hydra/launcher=local"], "'hydra/launcher=local' is for sweeps; add -m"),
    (["experiment=paper_table", "fusion=upper"], "several values of model, seed; add -m"),
    (["hydra.sweeper=x"], "hydra.sweeper is not taken; allowed of Hydra's: hydra/launcher"),
    (["-m", "experiment=cpu_table,small_table"], "several values of fusion, seed; sweep one experiment at a time"),
    (["seed=0", "-m", "fusion=upper", "hydra/launcher=slrm"], "unknown hydra/launcher 'slrm'"),
    (["-m", "hydra/launcher=slrm"], "unknown hydra/launcher 'slrm', did you mean 'slurm'"),
    (["-m", _TARGET], "BasicLauncher' does not use run folders; allowed"),
    (["-m", _SLURM], "needs Slurm's commands, sbatch, srun, squeue not found"),
    (["-m", "run_dir=a,b"], "'run_dir=a,b' is the same for all runs of a sweep"),
    (["-m", "--config-dir", "/nowhere", "seed=0"], "--config-dir /nowhere is no folder"),
    (["-m", "+hydra.launcher.job=2"], "did you mean 'hydra.launcher.jobs'"),
    (["-m", "hydra.launcher.jobs=0"], "^hydra.launcher.jobs is 0: "),
    (["-m", _SLURM, "+hydra.launcher.partitoin=gpu"], "did you mean 'hydra.launcher.partition'"),
    (["-m", _SLURM, "hydra.launcher.name=${oc.env:NOT_THERE}"], "'NOT_THERE' not found(?s:.*)hydra.launcher.name"),
]
WRONG = "name=null nodes=1.5 nodes=0 tasks_per_node=true mem_gb=.inf setup=[3] additional_parameters=requeue"
for _setting in WRONG.split():
    _key = re.escape(f"hydra.launcher.{_setting.split('=')[0]}")
    REFUSED += [(["-m", _SLURM, f"hydra.launcher.{_setting}"], f"^{_key} is .*: ")]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_what_cannot_be_launched_is_refused(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeps, "which", lambda name: None)
    with pytest.raises(ConfigError, match=message):
        check_command(arguments)


def test_slurm_is_checked_for_its_own_processes_and_not_for_what_the_login_node_has(
    commands: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own" / "hydra" / "launcher"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text("defaults: [slurm, _self_]\ntasks_per_node: 3\n")
    mine = ["-m", "--config-dir", str(tmp_path / "own"), "hydra/launcher=mine"]
    with pytest.raises(ConfigError, match="batch_size is 512, but must be a multiple of 3"):
        check_command(mine)
    check_command([*mine, "trainer.batch_size=384", "trainer.device=cuda", "trainer.precision=bf16"])
    check_command(["-m", _SLURM, "ops.backend=triton", "data.device=cuda"])
    monkeypatch.setattr(sweeps, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'famba\[slurm\]'"):
        check_command(["-m", _SLURM])


def test_the_example_of_a_cluster_becomes_its_batch_script(commands: Path, tmp_path: Path) -> None:
    launcher = choose(Command(("hydra/launcher=example_cluster",), True).shared().hydra.launcher)
    assert isinstance(launcher, Slurm)
    run = Run(tmp_path / "run", [], compose([]))
    assert launcher.submit([run], tmp_path / "slurm", lambda config: {}) == {"run": "7"}
    script = (tmp_path / "script.sh").read_text()
    options = "partition=gpu account=my-project constraint=a100 gpus-per-node=4 ntasks-per-node=4 cpus-per-task=12 "
    for option in (options + "mem=240GB time=720 signal=USR2@120 requeue").split():
        assert f"#SBATCH --{option}\n" in script, option
    assert "module load apptainer" in script
    container = "--bind /scratch,/usr/bin/scontrol,/etc/slurm,/run/munge famba.sif python -u -m submitit"
    assert f"--kill-on-bad-exit=1 --cpus-per-task=12 apptainer exec --nv {container}" in script


# Runs


def test_what_is_in_the_queue_is_not_submitted_again(
    commands: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["-m", *TINY, "seed=0,1", _SLURM, f"run_dir={tmp_path}/sweep"]
    (commands / "squeue").write_text("#!/bin/sh\necho '7_0|PENDING|None'\n")
    script = tmp_path / "script.sh"
    assert main(command) == 0
    assert "2 job(s) in Slurm" in capsys.readouterr().out
    assert "array=0-1" in script.read_text()
    assert main([*command, "trainer.log_every=3"]) == 0  # one of the two is no longer in the queue
    assert "array" not in script.read_text()
    script.unlink()
    (commands / "squeue").write_text("#!/bin/sh\necho '7_0|PENDING|None'; echo '7|RUNNING|None'\n")
    assert main(command) == 0
    assert not script.exists()
    (commands / "squeue").write_text("#!/bin/sh\necho 'no controller' >&2; exit 1\n")
    assert main(command) == 2
    assert "squeue does not answer: no controller" in capsys.readouterr().err


def test_a_run_that_fails_leaves_the_others_alone_and_the_same_command_does_what_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = Command.parse(["-m", *TINY, "trainer.max_steps=1", "seed=0,1", f"run_dir={tmp_path}/sweep"])
    done: list[int] = []

    def first(config: RunConfig) -> dict[str, Any]:
        done.append(config.seed)
        if config.seed == 0:
            raise TrainingError("no luck")
        return train(config)

    with pytest.raises(TrainingError, match="1 of 2 runs failed:\n  seed=0: no luck\nThe same command"):
        Sweep(command).launch(first)
    assert done == [0, 1]
    Sweep(command).launch(train)
    states = {path.parent.name: json.loads(path.read_text())["status"] for path in tmp_path.glob("*/*/summary.json")}
    assert states == {"seed=0": "finished", "seed=1": "finished"}
    assert "1 finished already" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="which resume=never would overwrite"):
        Sweep(Command((*command.overrides, "resume=never"), True)).launch(train)


@pytest.mark.parametrize(
    ("gpus", "visible", "jobs", "places"),
    [
        (3, None, None, ["0", "1", "2"]),
        (2, "5,7", None, ["5", "7"]),
        (2, "GPU-a,GPU-b", 1, ["GPU-a"]),
        (2, "0,1,2,3", None, ["0", "1"]),
        (0, None, None, [None]),
        (0, "", 2, [None, None]),
    ],
)
def test_each_run_gets_its_own_gpu(
    gpus: int, visible: str | None, jobs: int | None, places: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    runs = [Run(Path("unused"), [], compose(["run_dir=unused"]))]
    assert Local(jobs).places(runs) == places
    on_one = replace(runs[0].config, trainer=replace(runs[0].config.trainer, device="cuda:1"))
    assert Local(jobs).places([*runs, runs[0]._replace(config=on_one)]) == [None] * (jobs or 1)


def test_runs_go_on_at_once_and_one_that_fails_leaves_the_others_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sweep" / "seed=0").mkdir(parents=True)
    command = ["-m", *TINY, "trainer.max_steps=1", "seed=0,1", "hydra.launcher.jobs=2", f"run_dir={tmp_path}/sweep"]
    with FileLock(tmp_path / "sweep" / "seed=0" / ".lock"):
        assert main(command) == 2
    said = capsys.readouterr()
    assert "seed=1: finished" in said.out
    assert "error: 1 of 2 runs failed:\n  seed=0: another run is writing to" in said.err
    assert json.loads((tmp_path / "sweep" / "seed=1" / "summary.json").read_text())["status"] == "finished"


def test_runs_that_go_on_at_once_are_stopped_with_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def save(number, frame):
    sys.exit(bool((folder / "saved").write_text(os.environ.get("SLURM_JOB_ID", "no job"))))
signal.signal(signal.SIGTERM, save)
(folder / "ready").touch()
time.sleep(60)"""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(sweeps, "command_of", lambda run, _: [sys.executable, "-c", script, run.config.run_dir])

    def stop() -> None:
        while len(list(tmp_path.glob("sweep/*/ready"))) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    command = Command.parse(["-m", *TINY, "seed=0,1,2", "hydra.launcher.jobs=2", f"run_dir={tmp_path}/sweep"])
    with pytest.raises(Interrupted) as stopped:
        Sweep(command).launch(train)
    assert stopped.value.signal == signal.SIGTERM
    saved = {path.parent.name: path.read_text() for path in tmp_path.glob("sweep/*/saved")}
    assert saved == {"seed=0": "no job", "seed=1": "no job"}
