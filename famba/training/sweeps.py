"""Launch the runs of a command line with -m, in this process, in several here, or as jobs of Slurm.

The fields of a launcher are its settings; configs/hydra/launcher holds their defaults and explains them.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from subprocess import DEVNULL, STDOUT, Popen
from typing import Annotated, Any, NamedTuple

import torch
from filelock import FileLock
from omegaconf import DictConfig, OmegaConf
from pydantic import Field
from pydantic.dataclasses import dataclass

from famba.errors import ConfigError, FambaError, TrainingError
from famba.files import write_whole
from famba.training.checkpoint import changes_weights
from famba.training.compose import Command, explained, parse_overrides, quoted, swept_by_config
from famba.training.config import STRICT, Count, Positive, RunConfig, Text, checked, parse, plain
from famba.training.interrupts import Interrupted, StopRequest
from famba.training.records import SWEEP, queue, recorded, remembered
from famba.training.run_folder import RunFolder, finished

Train = Callable[[RunConfig], dict[str, Any]]
_NotNegative = Annotated[int, Field(ge=0, le=10**9)]
_LONGEST = 200  # bytes of a name; file systems allow 255
_SUBMITITS = ("name", "timeout_min", "nodes", "tasks_per_node", "gpus_per_node", "cpus_per_task", "mem_gb")
_SHOWN, _LOOK_S = 500, 0.1  # characters of an error, seconds


def folder_name(overrides: Iterable[str], excluded: Collection[str] = ()) -> str:
    """Return the name of a run's folder: its overrides except the `excluded` keys, with a hash if it was changed."""
    whole = ",".join(sorted(line for line in overrides if _key(line) not in excluded))
    name = re.sub("[^A-Za-z0-9_.,=+@:\\[\\]-]+", "_", whole)[:_LONGEST]
    return (name if name == whole else f"{name}-{_short_hash(whole)}") or "run"


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _key(override: str) -> str:
    """Return the key or group of an override: x of x=1, +x=1, ~x and x@package=1."""
    return override.split("=", 1)[0].lstrip("+~").split("@", 1)[0]


class Run(NamedTuple):
    """One run of a sweep."""

    folder: Path
    overrides: list[str]
    config: RunConfig


class Sweep:
    """The runs that a command line asks for by the names of their folders, composed and not yet checked."""

    def __init__(self, command: Command) -> None:
        shared, given = command.shared(), parse_overrides(command.overrides)
        swept = {item.key_or_group for item in given if item.is_sweep_override()} | swept_by_config(shared).keys()
        fixed = [item for item in given if item.key_or_group not in swept and not item.key_or_group.startswith("hydra")]
        given_once = {item.key_or_group: item for item in fixed}
        experiment = str(given_once["experiment"].value()) if "experiment" in given_once else "sweep"
        # Without the values of swept keys a sweep can grow in its folder; settings such as data.root change no weights.
        kept = sorted(str(item.input_line) for item in fixed if changes_weights(item.key_or_group))
        name = f"{experiment}-{_short_hash(json.dumps([kept, sorted(swept)]))}"
        self.folder = Path(str(shared.run_dir)) if "run_dir" in given_once else Path("runs", name)
        self.launcher, self.config_dir = choose(shared.hydra.get("launcher")), command.config_dir
        self.runs: dict[str, Run] = {}
        for job in command.jobs():
            overrides = [line for line in job if not _key(line).startswith("hydra")]
            folder = self.folder / folder_name(overrides, given_once)
            config = replace(command.config_of(job), run_dir=str(folder.absolute()))
            self.runs[folder.name] = Run(folder, overrides, config)

    def launch(self, train: Train) -> None:
        """Do the runs that are not finished. Raises FambaError if a folder holds another run, or a run failed."""
        left = [r for r in self.runs.values() if not finished(RunFolder(r.folder, writes=False), r.config)]
        known = {run["folder"]: run for run in recorded(self.folder)}
        known |= {name: {"folder": name, "overrides": run.overrides} for name, run in self.runs.items()}
        _write(self.folder / SWEEP, {"runs": list(known.values())})
        done = len(self.runs) - len(left)
        print(f"sweep of {len(self.runs)} run(s) in {self.folder}, {done} finished already", flush=True)
        if errors := self.launcher.launch(self, left, train) if left else []:
            listed = "\n  ".join([f"{len(errors)} of {len(self.runs)} runs failed:", *errors])
            raise TrainingError(f"{listed}\nThe same command runs these again, and no others")


@dataclass(frozen=True, config=STRICT)
class Local:
    """Runs on this machine: one after the other in this process, or several at once in processes with a GPU each."""

    jobs: Count | None

    def check(self, config: RunConfig) -> tuple[RunConfig, int | None]:
        """Return a configuration without what cannot be checked here, and the processes of a run, None for its own."""
        return config, None

    def places(self, runs: Iterable[Run]) -> list[str | None]:
        """Return CUDA_VISIBLE_DEVICES for each of the runs that go on at once, None to leave it as it is."""
        if any(run.config.trainer.device.startswith("cuda:") for run in runs):  # a number, which counts all GPUs
            return [None] * (self.jobs or 1)
        count = torch.cuda.device_count()
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
        return [*gpus.split(",")[:count][: self.jobs]] if count else [None] * (self.jobs or 1)

    def launch(self, sweep: Sweep, runs: list[Run], train: Train) -> list[str]:
        """Do these runs of a sweep, and return the errors of those that failed."""
        if len(places := self.places(runs)[: len(runs)]) > 1:
            return _at_once(runs, sweep.config_dir, places)
        errors = []
        for run in runs:
            print(f"{run.folder.name}: started", flush=True)
            try:
                train(run.config)
            except Exception as error:
                if not isinstance(error, FambaError):
                    traceback.print_exception(error)
                errors.append(f"{run.folder.name}: {error}")
                print(errors[-1], flush=True)
        return errors


def _at_once(runs: list[Run], config_dir: Path | None, places: list[str | None]) -> list[str]:
    """Do runs in processes of their own, as many at once as there are places, and return the errors."""
    # A run must not put the job of the whole sweep back into Slurm's queue.
    shared = {key: value for key, value in os.environ.items() if key != "SLURM_JOB_ID"}
    shared["LOCAL_WORLD_SIZE"] = str(len(places))  # processes that share the cores, as torchrun says it
    shared.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // len(places))))
    # In a session of its own it does not get the terminal's Ctrl-C, too.
    start = partial(Popen, stdin=DEVNULL, stderr=STDOUT, start_new_session=True)

    def do(run: Run) -> str | None:
        if stop.number:
            return None
        gpu, name, log = places.pop(), run.folder.name, run.folder / "output.log"
        environment = shared if gpu is None else {**shared, "CUDA_VISIBLE_DEVICES": gpu}
        run.folder.mkdir(parents=True, exist_ok=True)
        with open(log, "w") as output:
            process = start(command_of(run, config_dir), env=environment, stdout=output)
        print(f"{name}: started, output in {log}", flush=True)
        while process.poll() is None:
            time.sleep(_LOOK_S)
            if stop.number > 0:  # it saves itself
                process.terminate()
                process.wait()
        places.append(gpu)
        error = f"{name}: {log.read_text(errors='replace').rsplit('error: ', 1)[-1].strip()[-_SHOWN:]} ({log})"
        print(error if process.returncode else f"{name}: finished", flush=True)
        return error if process.returncode else None

    with StopRequest() as stop, ThreadPoolExecutor(len(places)) as pool:
        errors = [error for error in pool.map(do, runs) if error is not None]
    if stop.number:
        raise Interrupted("stopped and saved; the same command continues the runs", stop.number)
    return errors


def command_of(run: Run, config_dir: Path | None) -> list[str]:
    """Return the command that does a run by itself."""
    own = [] if config_dir is None else ["--config-dir", str(config_dir)]
    overrides = [line for line in run.overrides if _key(line) != "run_dir"]
    return [sys.executable, "-m", "famba", "train", *own, *overrides, f"run_dir={quoted(run.config.run_dir)}"]


@dataclass(frozen=True, config=STRICT)
class Slurm:
    """Each run a job of a Slurm cluster, all in one array, whose script submitit writes.

    The end of a job shows in squeue and in its run's folder: submitit itself would need Slurm's accounting.
    """

    name: Text
    partition: Text | None
    account: Text | None
    qos: Text | None
    constraint: Text | None
    gres: Text | None
    timeout_min: Count
    signal_delay_s: _NotNegative
    nodes: Count
    tasks_per_node: Count
    gpus_per_node: _NotNegative | None
    cpus_per_task: Count | None
    mem_gb: Positive | None
    array_parallelism: Count
    setup: list[Text] | None
    python: Text | None
    srun_args: list[Text] | None
    additional_parameters: dict[Text, str | bool | int | float | None] | None
    max_num_timeout: _NotNegative

    def check(self, config: RunConfig) -> tuple[RunConfig, int | None]:
        if find_spec("submitit") is None:
            raise ConfigError("hydra/launcher=slurm needs submitit; pip install 'famba[slurm]'")
        if absent := ", ".join(name for name in ("sbatch", "srun", "squeue") if which(name) is None):
            told = f"hydra/launcher=slurm needs Slurm's commands, {absent} not found"
            raise ConfigError(f"{told}; start it on a login node, outside of containers, or use hydra/launcher=local")
        # A login node has neither the GPU nor its precisions and kernels.
        trainer = replace(config.trainer, device="cpu", precision="fp32", cuda_graphs="auto")
        data, ops = replace(config.data, device="auto"), replace(config.ops, backend="auto")
        config = replace(config, trainer=trainer, data=data, ops=ops)
        return config, self.nodes * self.tasks_per_node

    def launch(self, sweep: Sweep, runs: list[Run], train: Train) -> list[str]:
        """Submit the runs that are not yet in the queue; their failures show in their folders."""
        folder = (sweep.folder / "slurm").absolute()
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            known, queued = remembered(folder), queue()
            if new := [run for run in runs if known.get(run.folder.name) not in queued]:
                _write(folder / "jobs.json", {**known, **self.submit(new, folder, train)})
        print(f"{len(runs)} job(s) in Slurm; `famba status {sweep.folder}` shows them", flush=True)
        return []

    def submit(self, runs: list[Run], folder: Path, train: Train) -> dict[str, str]:
        """Submit runs as one array; return their jobs. Raises ConfigError with Slurm's words if it refuses."""
        import submitit

        class Job(submitit.helpers.Checkpointable):  # which submits itself again if Slurm ends it before it trains
            def __call__(self, values: dict[str, Any]) -> float:
                return train(parse(values))["top1"]

        given = {key: value for key, value in asdict(self).items() if value is not None}
        own = {"slurm_max_num_timeout": given.pop("max_num_timeout"), "slurm_python": given.pop("python", None)}
        if self.cpus_per_task is not None:
            # Since Slurm 22.05 srun does not take it over from the job.
            given["srun_args"] = [*given.get("srun_args", []), f"--cpus-per-task={self.cpus_per_task}"]
        named = {key if key in _SUBMITITS else f"slurm_{key}": value for key, value in given.items()}
        try:
            executor = submitit.AutoExecutor(folder, cluster="slurm", **own)
            executor.update_parameters(**named, stderr_to_stdout=True)
            # submitit also prints Slurm's words.
            with redirect_stderr(io.StringIO()), executor.batch():
                jobs = [executor.submit(Job(), plain(run.config)) for run in runs]
        except (RuntimeError, NameError, ValueError) as error:
            raise ConfigError(f"the jobs cannot be submitted: {error}") from error
        return {run.folder.name: job.job_id for run, job in zip(runs, jobs, strict=True)}


def choose(settings: DictConfig | None) -> Local | Slurm:
    """Return the launcher of hydra.launcher. Raises ConfigError for one that is not famba's, and for wrong settings."""
    with explained():
        given: Any = OmegaConf.to_container(settings or OmegaConf.create(), resolve=True)
    target = given.pop("_target_", None)
    kinds = {"famba.training.sweeps.Local": Local, "famba.training.sweeps.Slurm": Slurm}
    if target not in kinds:
        told = "allowed: local, slurm, and files of your own that begin with one of them (defaults: [slurm, _self_])"
        raise ConfigError(f"hydra.launcher._target_={target!r} does not use run folders; {told}")
    return checked(kinds[target], given, "hydra.launcher.")


def _write(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=2) + "\n"
    write_whole(path, lambda file: Path(file).write_text(text))
