"""Sweeps: names, checks, launchers on this machine, and what would be submitted to Slurm."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from runs import TINY

from famba.errors import ConfigError
from famba.training import compose as composing
from famba.training.compose import Command, check_command, compose, groups, name_by_sweep
from famba.training.sweeps import launchers, slurm
from famba.training.sweeps.limits import Limits
from famba.training.sweeps.logs import last_error
from famba.training.sweeps.names import folder_name
from famba.training.sweeps.plan import Run

ROOT = Path(__file__).parents[1]
TABLE = ["-m", "experiment=paper_table"]


def jobs(*arguments: str) -> list[list[str]]:
    return composing._jobs(Command.parse(arguments))


def names(*arguments: str) -> tuple[str, list[str]]:
    """The folder of a sweep, and those of its runs in it, as Hydra works them out."""
    composed = [composing._compose([*job, name_by_sweep(arguments)], None) for job in jobs(*arguments)]
    return str(composed[0].hydra.sweep.dir), [str(values.hydra.sweep.subdir) for values in composed]


# Names


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.root=/a/b"],
        ["data.root=../../b"],
        ["init_from=../x"],
        ["seed=1", "data.root='a b'"],
        ["data.root=$HOME;rm *"],
        ["data.root=.."],
        ["data.root=" + "x" * 400],
        ["data.root=" + "ä" * 200],
        ["data.root=a\nb"],
        ["fusion.budget=[0,1]", "data.root=/a"],
    ],
)
def test_a_name_is_one_plain_folder(overrides: list[str], tmp_path: Path) -> None:
    name = folder_name(overrides)
    assert (tmp_path / name).resolve().parent == tmp_path.resolve()
    assert len(name.encode()) < 255
    assert not set(name) & set("/\\ '\"$;*\n")
    (tmp_path / name).mkdir()


def test_names_that_look_alike_stay_apart() -> None:
    values = ["/a/b", "a/b", "a_b", "a b", "'a b'", "/a//b", "x" * 300, "x" * 301]
    assert len({folder_name([f"data.root={value}"]) for value in values}) == len(values)


def test_plain_overrides_are_names_as_they_stand() -> None:
    assert folder_name(["seed=0", "fusion=upper", "model=vim_s"], ["model"]) == "fusion=upper,seed=0"
    assert folder_name(["fusion.layers=[2,5]", "+x=1"], ["x"]) == "fusion.layers=[2,5]"
    assert folder_name([]) == "run"


def test_runs_are_named_by_what_they_differ_in() -> None:
    folder, runs = names("-m", "seed=0,1", "fusion=upper", "data.root=/a,../../b", "run_dir=runs/mine")
    assert folder == "runs/mine"
    assert len(set(runs)) == 4
    assert all("fusion" not in run and "/" not in run for run in runs)
    assert runs[0].startswith("data.root=_a,seed=0-")


def test_the_folder_of_a_sweep_depends_on_what_its_runs_share() -> None:
    folder, _ = names("-m", "seed=0,1", "fusion=upper")
    assert folder.startswith("runs/sweep-")
    same = [
        ["-m", "fusion=upper", "seed=0,1"],
        ["-m", "seed=0,1,2", "fusion=upper"],
        ["-m", "seed=0,1", "fusion=upper", "hydra/launcher=local", "hydra.launcher.jobs=1"],
        ["-m", "seed=0,1", "fusion=upper", "data.root=/elsewhere", "trainer.log_every=5"],
    ]
    assert {names(*arguments)[0] for arguments in same} == {folder}
    others = [
        ["-m", "seed=0,1", "fusion=lower"],
        ["-m", "seed=0,1", "fusion=upper", "model=vim_s"],
        ["-m", "seed=0", "fusion=upper,lower"],
    ]
    assert len({names(*arguments)[0] for arguments in others} - {folder}) == 3


# The paper's table


def test_the_paper_table_is_thirty_runs() -> None:
    folder, runs = names(*TABLE)
    assert folder.startswith("runs/paper_table-")
    assert len(set(runs)) == 30
    assert "fusion=upper,model=vim_s,seed=2" in runs
    config = compose([*jobs(*TABLE)[0]])
    assert (config.data.name, config.trainer.epochs, config.trainer.batch_size) == ("cifar100", 300, 512)


def test_a_part_of_the_table_lands_in_the_folder_of_the_whole() -> None:
    folder, runs = names(*TABLE, "fusion=upper", "seed=1,7")
    assert folder == names(*TABLE)[0]
    expected = [f"fusion=upper,model={model},seed={seed}" for model in ("vim_s", "vim_ti") for seed in (1, 7)]
    assert sorted(runs) == expected


def test_an_experiment_of_several_values_needs_m() -> None:
    with pytest.raises(ConfigError, match=r"several values of model, seed; add -m .* model=vim_ti seed=0"):
        check_command(["experiment=paper_table", "fusion=upper"])
    check_command(["experiment=paper_table", "fusion=upper", "model=vim_ti", "seed=0"])


def test_values_of_an_experiment_are_checked_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    file = tmp_path / "experiment" / "mine.yaml"
    file.write_text("# @package _global_\nhydra:\n  sweeper:\n    params:\n      fusion: none,uper\n")
    with pytest.raises(ConfigError, match="unknown fusion 'uper', did you mean 'upper'"):
        check_command(["-m", "--config-dir", str(tmp_path), "experiment=mine"])


# Launchers


@pytest.fixture
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "which", lambda name: None)


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


def launcher(name: str, *overrides: str) -> OmegaConf:
    return composing._compose(["seed=0", f"hydra/launcher={name}", *overrides], None).hydra.launcher


REFUSED = [
    (["hydra/launcher=local"], "'hydra/launcher=local' is for sweeps; add -m"),
    (["-m", "hydra/launcher=slrm"], "unknown hydra/launcher 'slrm', did you mean 'slurm'"),
    (["-m", "hydra/launcher=local", "hydra.launcher.jobs=0"], "hydra.launcher.jobs is 0; allowed: null, or a whole"),
    (["-m", "hydra/launcher=local", "hydra.launcher.threads=many"], "hydra.launcher.threads is 'many'"),
    (["-m", "hydra/launcher=local", "hydra.launcher.gpus_per_run=99"], "takes 99 GPUs, this process sees"),
    (["-m", "hydra/launcher=slurm"], "needs Slurm's commands, sbatch, srun, squeue not found"),
    (["-m", "run_dir=a,b"], "run_dir is the folder of all runs of a sweep"),
    (["-m", "--config-dir", "/nowhere", "seed=0"], "--config-dir /nowhere is no folder"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_what_cannot_be_launched_is_refused(arguments: list[str], message: str, no_slurm: None) -> None:
    with pytest.raises(ConfigError, match=message):
        check_command(arguments)


def test_slurm_without_submitit_names_the_remedy(commands: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'famba\[slurm\]'"):
        check_command(["-m", "hydra/launcher=slurm"])


def test_runs_are_checked_for_the_processes_that_a_job_starts(commands: Path) -> None:
    many = ["hydra/launcher=slurm", "hydra.launcher.nodes=3", "hydra.launcher.tasks_per_node=5"]
    with pytest.raises(ConfigError, match="512 is not divisible by 15 processes"):
        check_command(["-m", *many])


def test_what_only_the_cluster_has_is_not_asked_of_the_login_node(commands: Path) -> None:
    there = ["trainer.device=cuda", "trainer.precision=bf16", "ops.backend=triton"]
    check_command(["-m", "hydra/launcher=slurm", *there])


def test_a_cluster_file_of_ones_own(commands: Path, tmp_path: Path) -> None:
    (tmp_path / "own" / "hydra" / "launcher").mkdir(parents=True)
    file = tmp_path / "own" / "hydra" / "launcher" / "mine.yaml"
    file.write_text("defaults: [slurm, _self_]\ntasks_per_node: 3\n")
    own = ["--config-dir", str(tmp_path / "own")]
    assert "mine" in groups(tmp_path / "own")["hydra/launcher"]
    with pytest.raises(ConfigError, match="not divisible by 3 processes"):
        check_command(["-m", *own, "hydra/launcher=mine"])
    check_command(["-m", *own, "hydra/launcher=mine", "trainer.batch_size=384"])


def test_the_example_of_a_cluster_becomes_its_batch_script(commands: Path, tmp_path: Path) -> None:
    settings = OmegaConf.to_container(launcher("example_cluster"), resolve=True)
    run = Run("run", tmp_path / "run", (), compose([]), OmegaConf.create())
    assert slurm._submit([run], settings, tmp_path / "slurm") == {"run": "7"}
    script = (tmp_path / "script.sh").read_text()
    for line in (
        "#SBATCH --partition=gpu",
        "#SBATCH --account=my-project",
        "#SBATCH --constraint=a100",
        "#SBATCH --gpus-per-node=4",
        "#SBATCH --ntasks-per-node=4",
        "#SBATCH --cpus-per-task=12",
        "#SBATCH --mem=240GB",
        "#SBATCH --time=720",
        "#SBATCH --signal=USR2@120",
        "#SBATCH --requeue",
        "module load apptainer",
        "--kill-on-bad-exit=1 --cpus-per-task=12 apptainer exec --nv --bind /scratch famba.sif python -u -m submitit",
    ):
        assert line in script, line


def test_a_key_that_submitit_does_not_know_is_named(commands: Path, tmp_path: Path) -> None:
    settings = {**OmegaConf.to_container(launcher("slurm"), resolve=True), "partitoin": "gpu"}
    run = Run("run", tmp_path / "run", (), compose([]), OmegaConf.create())
    with pytest.raises(ConfigError, match="partitoin"):
        slurm._submit([run], settings, tmp_path / "slurm")


@pytest.mark.parametrize(
    ("gpus", "visible", "settings", "places"),
    [
        (4, None, {}, [("0",), ("1",), ("2",), ("3",)]),
        (2, "5,7", {}, [("5",), ("7",)]),
        (4, None, {"gpus_per_run": 2}, [("0", "1"), ("2", "3")]),
        (2, "GPU-a,GPU-b", {"jobs": 1}, [("GPU-a",)]),
        (2, None, {"gpus_per_run": 0, "jobs": 3}, [(), (), ()]),
        (0, "", {"jobs": 2}, [(), ()]),
        (0, None, {"threads": 3}, [(), ()]),
    ],
)
def test_each_run_gets_its_own_gpus(
    gpus: int,
    visible: str | None,
    settings: dict[str, int],
    places: list[tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr("famba.training.sweeps.limits.cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    limits = Limits.of(OmegaConf.create({"jobs": None, "threads": None, "gpus_per_run": None, **settings}))
    assert limits.places() == places
    share = 8 // len(places) // max(1, limits.gpus_per_run)
    assert limits.threads_of(len(places)) == settings.get("threads", share)


LOGS = [
    ("one\nerror: the data is gone;\n  look elsewhere\n", "the data is gone;\n  look elsewhere"),
    ("error: before\n$ again\nTraceback (most recent call last):\n  File x\nValueError: 3\n", "ValueError: 3"),
    ("Traceback (most recent call last):\n  File x\nfamba.errors.DataError: gone\n", "gone"),
    ("epoch 1\nKilled\n\n", "Killed"),
    ("", ""),
]


@pytest.mark.parametrize(("text", "error"), LOGS)
def test_the_error_of_a_log_is_found(tmp_path: Path, text: str, error: str) -> None:
    (tmp_path / "log").write_text(text)
    assert last_error(tmp_path / "log") == error


# Runs on this machine


def train(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "train.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=500
    )


def states(folder: Path) -> dict[str, str]:
    return {path.parent.name: json.loads(path.read_text())["status"] for path in folder.glob("*/summary.json")}


@pytest.mark.slow
def test_local_runs_are_commands_of_their_own_and_only_what_is_left_is_done_again(tmp_path: Path) -> None:
    settings = [*TINY, "recipe.optimizer=sgd", "recipe.lr=0.004,1000", f"run_dir={tmp_path}/sweep"]
    first = train("-m", *settings, "hydra/launcher=local", "hydra.launcher.jobs=2")
    assert first.returncode == 2, first.stderr
    assert "recipe.lr=0.004: finished, Top-1" in first.stdout
    assert "recipe.lr=1000: failed" in first.stdout
    assert "error: 1 of 2 runs failed" in first.stderr
    assert "Traceback" not in first.stdout + first.stderr
    good, bad = tmp_path / "sweep" / "recipe.lr=0.004", tmp_path / "sweep" / "recipe.lr=1000"
    assert states(tmp_path / "sweep") == {good.name: "finished", bad.name: "failed"}
    typed = (good / "output.log").read_text().splitlines()[0].removeprefix("$ ")
    words = shlex.split(typed)
    assert words[0].startswith("OMP_NUM_THREADS=")
    assert words[1:5] == [sys.executable, "-m", "famba", "train"]
    by_hand = subprocess.run(["env", *words], cwd=ROOT, capture_output=True, text=True)
    assert "is finished already" in by_hand.stdout, by_hand.stderr

    again = train("-m", *settings)
    assert again.returncode == 2
    assert "1 finished already" in again.stdout
    assert "recipe.lr=1000: started" in again.stdout
    assert "recipe.lr=0.004" not in again.stdout
    runs = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["runs"]
    assert [run["folder"] for run in runs] == [good.name, bad.name]


@pytest.mark.slow
def test_ctrl_c_is_passed_on_once_and_waited_for(tmp_path: Path) -> None:
    settings = [*TINY, "trainer.epochs=2000", "trainer.eval_every=10000", "seed=0,1,2", f"run_dir={tmp_path}"]
    local = ["hydra/launcher=local", "hydra.launcher.jobs=2"]
    process = subprocess.Popen(
        [sys.executable, "train.py", "-m", *settings, *local],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    logs = [tmp_path / f"seed={seed}" / "metrics.jsonl" for seed in (0, 1)]
    deadline = time.monotonic() + 300
    while not all(log.exists() and log.read_text().count("\n") > 2 for log in logs) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "stopping 2 runs, which save themselves first" in output
    assert "seed=0: stopped after step" in output
    assert "the same command goes on" in errors
    assert states(tmp_path) == {"seed=0": "interrupted", "seed=1": "interrupted"}
    left = subprocess.run(["pgrep", "-f", f"run_dir='{tmp_path}"], capture_output=True, text=True)
    assert left.stdout == ""
