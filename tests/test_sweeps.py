"""Sweeps: names, checks, launchers on this machine, and what would be submitted to Slurm."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import TINY, check_command

from famba.errors import ConfigError, TrainingError
from famba.training import interrupts, sweeps
from famba.training.compose import Command, compose
from famba.training.interrupts import Interrupted, StopRequest
from famba.training.sweeps import Local, Run, Slurm, Sweep, choose, folder_name, last_error

ROOT = Path(__file__).parents[1]
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
    same = [
        ["-m", "seed=0,1,2", "fusion=upper", "hydra/launcher=local", "hydra.launcher.jobs=1"],
        ["-m", "fusion=upper", "seed=0,1", "data.root=/elsewhere", "trainer.log_every=5"],
    ]
    assert {names(*arguments)[0] for arguments in same} == {folder}
    others = [["-m", "seed=0,1", "fusion=lower"], ["-m", "seed=0,1", "fusion=upper", "model=vim_s"]]
    others += [["-m", "seed=0", "fusion=upper,lower"]]
    assert len({names(*arguments)[0] for arguments in others} - {folder}) == 3


def test_a_run_that_is_there_already_keeps_its_folder(tmp_path: Path) -> None:
    def begun(*runs: tuple[str, list[str]]) -> None:
        known = [{"folder": folder, "overrides": overrides} for folder, overrides in runs]
        (tmp_path / "sweep.json").write_text(json.dumps({"runs": known}))

    there = f"run_dir={tmp_path}"
    # Version 0.1 wrote an override of Hydra's beside a run's own.
    begun(*((f"seed={seed}", [f"seed={seed}", "fusion=upper", there, "hydra.sweep={dir:'x'}"]) for seed in (0, 2)))
    assert names("-m", "fusion=upper", "seed=0", there)[1] == ["seed=0"]
    assert names("-m", "fusion=upper", "seed=2,5", there)[1] == ["seed=2", "seed=5"]
    assert names("-m", "fusion=lower", "seed=0", f"run_dir={tmp_path}/new")[1] == ["run"]

    # Names of before stay, also where later runs differ in more.
    begun(("seed=0", ["seed=0", "fusion=upper", there]), ("seed=1", ["seed=1", "fusion=lower", there]))
    assert names("-m", "fusion=upper", "seed=0,1", there)[1] == ["seed=0", "fusion=upper,seed=1"]
    begun(("../seed=0", ["seed=0"]))
    assert names("-m", "seed=0", there)[1] == ["run"]


def test_equal_values_are_one_run() -> None:
    assert names("-m", "seed=3,3", "run_dir=x")[1] == ["seed=3"]


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
_LOCAL, _SLURM = "hydra/launcher=local", "hydra/launcher=slurm"
REFUSED = [
    ([_LOCAL], "'hydra/launcher=local' is for sweeps; add -m"),
    (["fusion=none,upper"], "'fusion=none,upper' names several values; add -m"),
    (["experiment=paper_table", "fusion=upper"], "several values of model, seed; add -m .* model=vim_ti seed=0"),
    (["hydra.sweeper=x"], "hydra.sweeper is not taken; allowed of Hydra's: hydra/launcher"),
    (["-m", "hydra/launcher=slrm"], "unknown hydra/launcher 'slrm', did you mean 'slurm'"),
    (["-m", "hydra/launcher=local,slurm"], "is the same for all runs of a sweep"),
    (["-m", "hydra/launcher=submitit_slurm"], "unknown hydra/launcher 'submitit_slurm'.*allowed: .*local"),
    (["-m", _TARGET], "BasicLauncher', which does not use run folders; allowed"),
    (["-m", "~hydra/launcher"], "does not use run folders; allowed: sequential, local, slurm"),
    (["-m", _LOCAL, "hydra.launcher.jobs=0"], "hydra.launcher.jobs is 0: input should be greater"),
    (["-m", _LOCAL, "hydra.launcher.gpus_per_run=99"], "takes 99 GPUs, this process sees"),
    (["-m", _SLURM], "needs Slurm's commands, sbatch, srun, squeue not found"),
    (["-m", "run_dir=a,b"], "'run_dir=a,b' is the same for all runs of a sweep"),
    (["-m", "--config-dir", "/nowhere", "seed=0"], "--config-dir /nowhere is no folder"),
    (["-m", "+hydra.launcher.jobs=2"], "^unknown key 'hydra.launcher.jobs'$"),
    (["-m", _LOCAL, "+hydra.launcher.job=2"], "^unknown key 'hydra.launcher.job', did you mean 'hydra.launcher.jobs'"),
    (["-m", _SLURM, "+hydra.launcher.partitoin=gpu"], "did you mean 'hydra.launcher.partition'"),
    (["-m", _SLURM, "hydra.launcher.name=${oc.env:NOT_THERE}"], "^hydra.launcher: .* 'NOT_THERE' not found"),
]
WRONG = {
    "local": "jobs=true jobs=1.5 threads=0 threads=many gpus_per_run=-1 gpus_per_run=one",
    "slurm": "name=null partition=3 nodes=1.5 nodes=0 timeout_min=0.2 tasks_per_node=true signal_delay_s=-5 "
    "gpus_per_node=a100 mem_gb=-1 mem_gb=.inf cpus_per_task=0 array_parallelism=0 setup=module setup=[3] python=3 "
    "srun_args=x additional_parameters=requeue max_num_timeout=x poll_s=0",
}
for _name, _settings in WRONG.items():
    for _setting in _settings.split():
        _key = re.escape(f"hydra.launcher.{_setting.split('=')[0]}")
        REFUSED += [(["-m", f"hydra/launcher={_name}", f"hydra.launcher.{_setting}"], f"^{_key} is .*: ")]


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
    with pytest.raises(ConfigError, match="512 is not divisible by 3 processes"):
        check_command(mine)
    check_command([*mine, "trainer.batch_size=384", "trainer.device=cuda", "trainer.precision=bf16"])
    check_command(["-m", _SLURM, "ops.backend=triton"])
    monkeypatch.setattr(sweeps, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'famba\[slurm\]'"):
        check_command(["-m", _SLURM])


def test_values_of_an_experiment_are_checked_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    file = tmp_path / "experiment" / "mine.yaml"
    file.write_text("# @package _global_\nhydra:\n  sweeper:\n    params:\n      fusion: none,uper\n")
    with pytest.raises(ConfigError, match="unknown fusion 'uper', did you mean 'upper'"):
        check_command(["-m", "--config-dir", str(tmp_path), "experiment=mine"])


def test_the_example_of_a_cluster_becomes_its_batch_script(commands: Path, tmp_path: Path) -> None:
    launcher = choose(Command(("hydra/launcher=example_cluster",), True).shared().hydra.launcher)
    assert isinstance(launcher, Slurm)
    run = Run("run", tmp_path / "run", [], compose([]))
    assert launcher.submit([run], tmp_path / "slurm", lambda config: {}) == {"run": "7"}
    script = (tmp_path / "script.sh").read_text()
    options = ("partition=gpu", "account=my-project", "constraint=a100", "gpus-per-node=4", "ntasks-per-node=4")
    options += ("cpus-per-task=12", "mem=240GB", "time=720", "signal=USR2@120", "requeue")
    for line in (
        *(f"#SBATCH --{option}\n" for option in options),
        "module load apptainer",
        "--kill-on-bad-exit=1 --cpus-per-task=12 apptainer exec --nv "
        "--bind /scratch,/usr/bin/scontrol,/etc/slurm,/run/munge famba.sif python -u -m submitit",
    ):
        assert line in script, line


@pytest.mark.parametrize(
    ("gpus", "visible", "settings", "places", "threads"),
    [
        (4, None, {}, [("0",), ("1",), ("2",), ("3",)], 2),
        (2, "5,7", {}, [("5",), ("7",)], 4),
        (4, None, {"gpus_per_run": 2}, [("0", "1"), ("2", "3")], 2),
        (2, "GPU-a,GPU-b", {"jobs": 1}, [("GPU-a",)], 8),
        (2, None, {"gpus_per_run": 0, "jobs": 3}, [(), (), ()], 2),
        (0, "", {"jobs": 2}, [(), ()], 4),
        (0, None, {"threads": 3}, [(), ()], 3),
    ],
)
def test_each_run_gets_its_own_gpus_and_threads(
    gpus: int,
    visible: str | None,
    settings: dict[str, int],
    places: list[tuple[str, ...]],
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(sweeps, "cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert Local(**{"jobs": None, "threads": None, "gpus_per_run": None, **settings}).places() == (places, threads)


LOGS = [
    ("one\nerror: the data is gone;\n  look elsewhere\n", "the data is gone;\n  look elsewhere"),
    ("error: before\n$ again\nTraceback (most recent call last):\n  File x\nValueError: 3\n", "ValueError: 3"),
    ("Traceback (most recent call last):\n  File x\nfamba.errors.DataError: gone\n", "gone"),
    ("epoch 1\nKilled\n\n", "Killed"),
    ("$ python -m famba train\n", ""),
]


@pytest.mark.parametrize(("text", "error"), LOGS)
def test_the_error_of_a_log_is_found(tmp_path: Path, text: str, error: str) -> None:
    (tmp_path / "log").write_text(text)
    assert last_error(tmp_path / "log") == error


# Runs on this machine


def train(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "train.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)


def states(folder: Path) -> dict[str, str]:
    return {path.parent.name: json.loads(path.read_text())["status"] for path in folder.glob("*/summary.json")}


# A run that says how it was stopped, and in which job; it ends with status 1, as torchrun does.
SAVE = """
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def save(number, frame):
    said = {"status": "interrupted", "step": 7, "job": os.environ.get("SLURM_JOB_ID")}
    (folder / "summary.json").write_text(json.dumps(said))
    sys.exit(1)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, save)
(folder / "ready").touch()
time.sleep(60)
"""

FINISH = """import json, pathlib, sys
pathlib.Path(sys.argv[1], "summary.json").write_text(json.dumps({"status": "finished", "top1": 50.0}))"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Sweep]:
    """A sweep of two runs at once, which are commands of the test's own."""

    def make(script: str, *more: str) -> Sweep:
        monkeypatch.setattr(
            sweeps, "command_of", lambda run, *given: [sys.executable, "-c", script, run.config.run_dir]
        )
        here = f"run_dir={tmp_path}/sweep"
        return Sweep(Command.parse(["-m", "seed=0,1", _LOCAL, "hydra.launcher.jobs=2", here, *more]))

    return make


def send_when(ready: Callable[[], bool], number: signal.Signals) -> None:
    """Send this process a signal once something is so."""

    def wait() -> None:
        while not ready():
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=wait, daemon=True).start()


@pytest.mark.parametrize(("number", "said"), [(signal.SIGINT, "after step 7, saved"), (signal.SIGHUP, "after step 7")])
def test_a_run_that_is_stopped_has_not_failed(
    stand_in: Any, tmp_path: Path, number: signal.Signals, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # Whoever runs the tests under nohup has them ignore it, and with it the sweep does.
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    send_when(lambda: len(list(tmp_path.glob("sweep/*/ready"))) == 2, number)
    with pytest.raises(Interrupted):
        stand_in(SAVE).launch(lambda config: {})
    signal.signal(signal.SIGHUP, before)
    output = capsys.readouterr().out
    assert f"seed=0: stopped {said}" in output
    assert "failed" not in output


def test_a_run_that_cannot_be_started_leaves_the_others_alone(stand_in: Any, tmp_path: Path) -> None:
    (tmp_path / "sweep" / "seed=0" / "output.log").mkdir(parents=True)
    with pytest.raises(TrainingError, match=r"1 of 2 runs failed:\n  seed=0: error: it cannot be started: "):
        stand_in(FINISH).launch(lambda config: {})
    assert states(tmp_path / "sweep") == {"seed=1": "finished"}


def test_no_run_outlives_a_sweep_that_ends_by_an_error(
    stand_in: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(line: str) -> None:
        if "seed=1" in line:
            raise BrokenPipeError

    monkeypatch.setattr(sweeps, "say", broken)
    with pytest.raises(BrokenPipeError):
        stand_in("import time; time.sleep(60)").launch(lambda config: {})
    assert subprocess.run(["pgrep", "-f", f"{tmp_path}/sweep/seed"], capture_output=True, text=True).stdout == ""


@pytest.mark.parametrize("progressed", [True, False])
def test_a_sweep_in_a_job_is_requeued_once_for_all_its_runs(
    stand_in: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, progressed: bool
) -> None:
    calls: list[Any] = []

    def end(stop: StopRequest) -> None:
        calls.append(stop.number)
        raise SystemExit(128 + stop.number)

    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(interrupts, "requeue", lambda: calls.append("requeued"))
    monkeypatch.setattr(interrupts, "wait_for_the_end", end)
    sweep = stand_in(SAVE if progressed else SAVE.replace('"step": 7', '"step": 0'))
    send_when(lambda: len(list(tmp_path.glob("sweep/*/ready"))) == 2, signal.SIGUSR2)
    with pytest.raises(SystemExit if progressed else TrainingError):
        sweep.launch(lambda config: {})
    assert calls == (["requeued", signal.SIGUSR2] if progressed else []), "a limit too short for a step is an error"
    jobs = [json.loads(path.read_text())["job"] for path in tmp_path.glob("sweep/*/summary.json")]
    assert jobs == [None, None], "else each run would requeue the job by itself"


@pytest.mark.slow
def test_local_runs_are_commands_of_their_own_and_only_what_is_left_is_done_again(tmp_path: Path) -> None:
    settings = [*TINY, "recipe.optimizer=sgd", "recipe.lr=0.004,1000", f"run_dir={tmp_path}/sweep"]
    first = train("-m", *settings, _LOCAL, "hydra.launcher.jobs=2")
    assert first.returncode == 2, first.stderr
    assert "recipe.lr=0.004: finished, Top-1" in first.stdout
    assert "recipe.lr=1000: failed" in first.stdout
    assert "error: 1 of 2 runs failed:\n  recipe.lr=1000: error: the loss is" in first.stderr
    assert "Traceback" not in first.stdout + first.stderr
    good, bad = tmp_path / "sweep" / "recipe.lr=0.004", tmp_path / "sweep" / "recipe.lr=1000"
    assert states(tmp_path / "sweep") == {good.name: "finished", bad.name: "failed"}
    words = shlex.split((good / "output.log").read_text().splitlines()[0].removeprefix("$ "))
    by_hand = subprocess.run(["env", *words], cwd=ROOT, capture_output=True, text=True)
    assert "is finished already" in by_hand.stdout, by_hand.stderr

    again = train("-m", *settings)
    assert again.returncode == 2
    assert "1 finished already" in again.stdout
    assert "recipe.lr=1000: started" in again.stdout
    assert "recipe.lr=0.004" not in again.stdout
    runs = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["runs"]
    assert [run["folder"] for run in runs] == [good.name, bad.name]


def test_what_resume_never_does_not_overwrite_has_finished(stand_in: Any, tmp_path: Path) -> None:
    sweep = stand_in(FINISH, "resume=never")
    sweep.launch(lambda config: {})
    with pytest.raises(ConfigError, match="which resume=never would overwrite"):
        sweep.launch(lambda config: {})
