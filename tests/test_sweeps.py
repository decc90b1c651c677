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
from filelock import FileLock
from omegaconf import OmegaConf
from runs import TINY

from famba.errors import ConfigError, TrainingError
from famba.training import compose as composing
from famba.training.compose import Command, check_command, compose, groups, name_by_sweep
from famba.training.interrupts import Interrupted, StopRequest
from famba.training.sweeps import launchers, local, slurm
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


def test_a_run_that_is_there_already_keeps_its_folder(tmp_path: Path) -> None:
    def begun(*runs: tuple[str, list[str]]) -> None:
        known = [{"folder": folder, "overrides": overrides} for folder, overrides in runs]
        (tmp_path / "sweep.json").write_text(json.dumps({"runs": known}))

    there = f"run_dir={tmp_path}"
    begun(*((f"seed={seed}", [f"seed={seed}", "fusion=upper", there]) for seed in (0, 2)))
    assert names("-m", "fusion=upper", "seed=0", there)[1] == ["seed=0"]
    assert names("-m", "fusion=upper", "seed=5", there)[1] == ["seed=5"]
    assert names("-m", "fusion=upper", "seed=2,5", there)[1] == ["seed=2", "seed=5"]
    assert names("-m", "fusion=lower", "seed=0", f"run_dir={tmp_path}/new")[1] == ["run"]

    # Names of before stay, also where later runs differ in more.
    begun(("seed=0", ["seed=0", "fusion=upper", there]), ("seed=1", ["seed=1", "fusion=lower", there]))
    assert names("-m", "fusion=upper", "seed=0,1", there)[1] == ["seed=0", "fusion=upper,seed=1"]
    begun(("../seed=0", ["seed=0"]))
    assert names("-m", "seed=0", there)[1] == ["run"]


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
    (["-m", "hydra/launcher=local", "hydra.launcher.jobs=0"], "hydra.launcher.jobs is 0: input should be greater"),
    (["-m", "hydra/launcher=local", "hydra.launcher.threads=many"], "hydra.launcher.threads is 'many'"),
    (["-m", "hydra/launcher=local", "hydra.launcher.gpus_per_run=99"], "takes 99 GPUs, this process sees"),
    (["-m", "hydra/launcher=slurm"], "needs Slurm's commands, sbatch, srun, squeue not found"),
    (["-m", "run_dir=a,b"], "run_dir is the folder of all runs of a sweep"),
    (["-m", "--config-dir", "/nowhere", "seed=0"], "--config-dir /nowhere is no folder"),
]


FOREIGN = ["basic", "submitit_slurm", "submitit_local", "joblib"]
REFUSED += [
    (["-m", f"hydra/launcher={name}"], f"unknown hydra/launcher '{name}'.*allowed: .*local") for name in FOREIGN
]
_BASIC = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
REFUSED += [
    (["-m", f"hydra.launcher._target_={_BASIC}"], "BasicLauncher', which knows nothing of run folders; allowed")
]
REFUSED += [(["-m", "~hydra/launcher"], "knows nothing of run folders; allowed: sequential, local, slurm")]
WRONG = {
    "local": ["jobs=true", "jobs=1.5", "threads=0", "gpus_per_run=-1", "gpus_per_run=one"],
    "slurm": [
        "name=null",
        "partition=3",
        "nodes=1.5",
        "nodes=0",
        "timeout_min=0.2",
        "tasks_per_node=true",
        "signal_delay_s=-5",
        "gpus_per_node=a100",
        "mem_gb=-1",
        "mem_gb=.inf",
        "cpus_per_task=0",
        "array_parallelism=0",
        "setup='module load cuda'",
        "setup=[3]",
        "python=3",
        "srun_args=x",
        "additional_parameters=requeue",
        "max_num_timeout=x",
        "poll_s=0",
    ],
}
for _name, _settings in WRONG.items():
    for _setting in _settings:
        _key = re.escape(f"hydra.launcher.{_setting.split('=')[0]}")
        REFUSED += [(["-m", f"hydra/launcher={_name}", f"hydra.launcher.{_setting}"], f"^{_key} is .*: ")]
REFUSED += [
    (["-m", "+hydra.launcher.jobs=2"], "^unknown key hydra.launcher.jobs$"),
    (["-m", "hydra/launcher=local", "+hydra.launcher.job=2"], "^unknown key hydra.launcher.job, did you mean 'jobs'"),
    (
        ["-m", "hydra/launcher=slurm", "+hydra.launcher.partitoin=gpu"],
        "^unknown key hydra.launcher.partitoin, did you mean 'partition'.; other options of sbatch go into additional_",
    ),
    (
        ["-m", "hydra/launcher=slurm", "hydra.launcher.name=${oc.env:NOT_THERE}"],
        "^hydra.launcher: .* 'NOT_THERE' not found",
    ),
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
        "--kill-on-bad-exit=1 --cpus-per-task=12 apptainer exec --nv "
        "--bind /scratch,/usr/bin/scontrol,/etc/slurm,/run/munge famba.sif python -u -m submitit",
    ):
        assert line in script, line


def test_jobs_that_were_submitted_but_not_written_down_are_found_in_the_queue(commands: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a|b" / "slurm"
    folder.mkdir(parents=True)
    runs = [Run(name, tmp_path / name, (), compose([]), OmegaConf.create()) for name in ("old", "one", "two", "three")]
    (folder / "jobs.json").write_text('{"old": "6"}')
    (folder / "submitting.json").write_text('["one", "two", "three"]')
    mine, other = folder / ".submission_file_0.sh", tmp_path / "other" / ".submission_file_1.sh"
    lines = [f"6|RUNNING|None|{mine}", f"7_0|RUNNING|None|{mine}", f"7_2|PENDING|Resources|{mine}"]
    lines += [f"8_1|RUNNING|None|{other}"]
    (commands / "squeue").write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    jobs = {"old": "6", "one": "7_0", "three": "7_2"}
    assert slurm._still_queued(folder, runs) == jobs
    slurm._remember(folder, jobs)
    assert not (folder / "submitting.json").exists()
    assert slurm._still_queued(folder, runs) == jobs
    (folder / "submitting.json").write_text("{")
    with pytest.raises(ConfigError, match="submitting.json is damaged"):
        slurm._still_queued(folder, runs)


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


class Stand:
    """A launcher whose runs are commands of the test's own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, script: str, runs: int = 2) -> None:
        self.runs = [Run(f"run{i}", folder / f"run{i}", (), compose([]), OmegaConf.create()) for i in range(runs)]
        self.failed: dict[str, str] = {}
        self.left, self.folder = self.runs, folder
        monkeypatch.setattr(local, "Sweep", lambda *given: self)
        monkeypatch.setattr(local, "command_of", lambda run, *given: [sys.executable, "-c", script, str(run.folder)])
        monkeypatch.setattr(local, "_config_dir", lambda launcher: None)
        settings = {"jobs": runs, "threads": 1, "gpus_per_run": 0}
        self.config = OmegaConf.create({"hydra": {"launcher": settings}})

    def announce(self) -> None: ...

    def finish(self, run: Run, summary: dict[str, Any]) -> None: ...

    def returns(self) -> list[Any]:
        return []

    def fail(self, run: Run, error: Exception, log: Path) -> None:
        self.failed[run.name] = str(error)

    def launch(self) -> None:
        local.launch(self, [], 0)  # type: ignore[arg-type]

    def processes(self) -> str:
        return subprocess.run(["pgrep", "-f", str(self.folder)], capture_output=True, text=True).stdout


WAIT = "import time; time.sleep(60)"
SAVE = """
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def save(number, frame):
    said = {"status": "interrupted", "step": 7, "job": os.environ.get("SLURM_JOB_ID")}
    (folder / "summary.json").write_text(json.dumps(said))
    sys.exit(1)  # as torchrun does
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, save)
(folder / "ready").touch()
time.sleep(60)
"""


def send_when(ready: Callable[[], bool], number: signal.Signals) -> threading.Thread:
    """Send this process a signal once something is so."""

    def wait() -> None:
        while not ready():
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_a_run_that_is_stopped_has_not_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand = Stand(tmp_path, monkeypatch, WAIT)
    send_when(lambda: (tmp_path / "run1" / "output.log").exists(), signal.SIGINT)
    with pytest.raises(Interrupted):
        stand.launch()
    assert stand.failed == {}
    assert "run0: stopped before it began" in capsys.readouterr().out

    stand = Stand(tmp_path, monkeypatch, SAVE)
    send_when(lambda: len(list(tmp_path.glob("*/ready"))) == 2, signal.SIGINT)
    with pytest.raises(Interrupted):
        stand.launch()
    assert stand.failed == {}
    assert "run0: stopped after step 7, saved" in capsys.readouterr().out


def test_a_run_that_cannot_be_started_leaves_the_others_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand = Stand(tmp_path, monkeypatch, "pass", runs=3)
    (tmp_path / "run1" / "output.log").mkdir(parents=True)
    monkeypatch.setattr(Run, "done", lambda run: {"top1": 1.0})
    stand.launch()
    assert list(stand.failed) == ["run1"]
    assert "cannot be started: " in stand.failed["run1"]
    assert (tmp_path / "run2" / "output.log").is_file()


def test_no_run_outlives_a_sweep_that_ends_by_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand = Stand(tmp_path, monkeypatch, WAIT)

    def broken(line: str) -> None:
        if "run1" in line:
            raise BrokenPipeError

    monkeypatch.setattr(local, "say", broken)
    with pytest.raises(BrokenPipeError):
        stand.launch()
    assert stand.processes() == ""


@pytest.mark.parametrize("progressed", [True, False])
def test_a_sweep_in_a_job_is_requeued_once_for_all_its_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, progressed: bool
) -> None:
    calls = []
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(local.slurm, "requeue", lambda: calls.append("requeued"))
    stand = Stand(tmp_path, monkeypatch, SAVE if progressed else SAVE.replace('"step": 7', '"step": 0'))

    def end(stop: StopRequest) -> None:
        with FileLock(tmp_path / ".lock", timeout=0):  # the requeued job may begin
            calls.append(stop.number)
        raise SystemExit(128 + stop.number)

    monkeypatch.setattr(local.slurm, "wait_for_the_end", end)
    send_when(lambda: len(list(tmp_path.glob("*/ready"))) == 2, signal.SIGUSR2)
    if progressed:
        with pytest.raises(SystemExit):
            stand.launch()
        assert calls == ["requeued", signal.SIGUSR2]
    else:
        with pytest.raises(TrainingError, match="not requeued: Slurm gave notice before any run had come further"):
            stand.launch()
        assert calls == []
    jobs = [json.loads(path.read_text())["job"] for path in tmp_path.glob("*/summary.json")]
    assert jobs == [None, None], "else each run would requeue the job by itself"


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
