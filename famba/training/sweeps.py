"""Sweeps: the runs of a command line with -m, their folders, and the launchers that do them.

The fields of a launcher are its settings; configs/hydra/launcher holds their defaults and explains them.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr, suppress
from dataclasses import asdict, fields, replace
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Annotated, Any, NamedTuple

import torch
from filelock import FileLock
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from famba.errors import ConfigError, FambaError, TrainingError
from famba.files import write_whole
from famba.training import interrupts
from famba.training.checkpoint import changes_weights
from famba.training.compose import Command, parse_overrides, quoted, run_config, swept_by_config
from famba.training.config import STRICT, Count, Positive, RunConfig, Text, explain, parse, plain
from famba.training.interrupts import Interrupted, StopRequest
from famba.training.records import SWEEP, queue, recorded, remembered
from famba.training.run_folder import RunFolder, finished

Summary = dict[str, Any]
Train = Callable[[RunConfig], Summary]
NotNegative = Annotated[int, Field(ge=0, le=10**9)]
_OTHER = re.compile(r"[^A-Za-z0-9_.,=+@:\[\]-]+")
_LONGEST = 200  # bytes of a name; file systems allow 255
_SUBMITITS = ("name", "timeout_min", "nodes", "tasks_per_node", "gpus_per_node", "cpus_per_task", "mem_gb")
_READ = 1 << 16  # bytes at the end of a log
_OUTPUT = "output.log"
_LOOK_S = 0.1
_GRACE_S = 20.0  # until a file system shows what a job has written last

# Names


def folder_name(overrides: Iterable[str], excluded: Iterable[str] = ()) -> str:
    """Return the name of a run's folder: its overrides except the `excluded` keys, as one plain file name.

    Other characters become "_"; a name that was changed or shortened ends with a hash of the whole.
    """
    without = set(excluded)
    whole = ",".join(sorted(line for line in overrides if _key(line) not in without))
    name = _OTHER.sub("_", whole)[:_LONGEST]
    return (name if name == whole else f"{name}-{_short_hash(whole)}") or "run"


def sweep_name(experiment: str | None, fixed: Iterable[str], swept: Iterable[str]) -> str:
    """Return the name of a sweep's folder, from the overrides that its runs share and the keys in which they differ.

    The values of these keys are left out, so that a sweep can grow in its folder; so are settings that change no
    weights, such as data.root.
    """
    shared = sorted(line for line in fixed if changes_weights(_key(line)))
    return f"{experiment or 'sweep'}-{_short_hash(json.dumps([shared, sorted(swept)]))}"


def run_name(overrides: Iterable[str], excluded: Iterable[str], sweep: Path) -> str:
    """Return the name of a run's folder in a sweep's: that of the run with equal overrides there, if any.

    Otherwise its folder_name, with the keys too in which the runs that are there differ.
    """
    there = [(run["folder"], _of_run(run["overrides"])) for run in recorded(sweep)]
    own = _of_run(overrides)
    if same := [folder for folder, others in there if others == own]:
        return same[0]
    differing = {_key(line) for _, others in there for line in others ^ there[0][1]}
    return folder_name(overrides, set(excluded) - differing)


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _of_run(overrides: Iterable[str]) -> frozenset[str]:
    """Return overrides without their order, run_dir and Hydra's own."""
    return frozenset(line for line in overrides if _key(line) != "run_dir" and not _key(line).startswith("hydra"))


def _key(override: str) -> str:
    """Return the key or group of an override: x of x=1, +x=1, ~x and x@package=1."""
    return override.split("=", 1)[0].lstrip("+~").split("@", 1)[0]


# Runs


class Run(NamedTuple):
    """One run of a sweep."""

    name: str
    folder: Path
    overrides: list[str]
    config: RunConfig

    def summary(self) -> Summary:
        """Return the summary so far, {} where there is none that can be read."""
        with suppress(FambaError):
            return RunFolder(self.folder, writes=False).summary or {}
        return {}


class Sweep:
    """The runs that a command line asks for, composed and not yet checked; `left` are those that are not finished."""

    def __init__(self, command: Command) -> None:
        shared, given = command.shared(), parse_overrides(command.overrides)
        swept = {item.key_or_group for item in given if item.is_sweep_override()} | swept_by_config(shared).keys()
        fixed = [item for item in given if item.key_or_group not in swept and not item.key_or_group.startswith("hydra")]
        keys = {item.key_or_group for item in fixed}
        experiment = next((str(item.value()) for item in fixed if item.key_or_group == "experiment"), None)
        name = sweep_name(experiment, [str(item.input_line) for item in fixed], swept)
        self.folder = Path(str(shared.run_dir)) if "run_dir" in keys else Path("runs", name)
        self.launcher, self.config_dir = choose(shared.hydra.get("launcher")), command.config_dir
        self.runs: dict[str, Run] = {}
        for job in command.jobs():
            overrides = [line for line in job if not _key(line).startswith("hydra")]
            folder = self.folder / run_name(overrides, keys, self.folder)
            config = replace(run_config(command.compose(job)), run_dir=str(folder.absolute()))
            self.runs[folder.name] = Run(folder.name, folder, overrides, config)
        self.left: list[Run] = []
        self._before: dict[str, Summary] = {}
        self._errors: dict[str, str] = {}
        self._ended = 0

    def launch(self, train: Train) -> None:
        """Do the runs that are not finished; one that fails does not keep the others from running.

        Raises FambaError where a folder holds a run with other settings, before anything is written, or a run failed.
        """
        self._before = {run.name: run.summary() for run in self.runs.values()}
        done = {name for name, run in self.runs.items() if finished(RunFolder(run.folder, writes=False), run.config)}
        self.left, self._ended = [run for run in self.runs.values() if run.name not in done], len(done)
        known = {run["folder"]: run for run in recorded(self.folder)}
        known |= {run.name: {"folder": run.name, "overrides": run.overrides} for run in self.runs.values()}
        _write(self.folder / SWEEP, {"runs": list(known.values())})
        runs = f"{len(self.runs)} run{'s' if len(self.runs) != 1 else ''}"
        say(f"sweep of {runs} in {self.folder}" + (f", {len(done)} finished already" if done else ""))
        if self.left:
            self.launcher.launch(self, train)
        if self._errors:
            listed = "".join(f"\n  {name}: {error}" for name, error in self._errors.items())
            again = "The same command runs these again, and no others"
            raise TrainingError(f"{len(self._errors)} of {len(self.runs)} runs failed:{listed}\n{again}")

    def news(self, run: Run) -> Summary:
        """Return the summary where the run has written one since the sweep began, else {}."""
        summary = run.summary()
        return summary if summary != self._before[run.name] else {}

    def has_progressed(self) -> bool:
        """Return whether a run has done steps since the sweep began."""
        return any((self.news(run).get("step") or 0) > (self._before[run.name].get("step") or 0) for run in self.left)

    def conclude(self, run: Run, log: Path, otherwise: str) -> None:
        """Print and keep the result of a run; the error is that in its folder, else in its log, else `otherwise`."""
        self._ended += 1
        count, news = f" ({self._ended} of {len(self.runs)})" if len(self.runs) > 1 else "", self.news(run)
        if news.get("status") == "finished":
            say(f"{run.name}: finished, Top-1 {news['top1']:.2f} %{count}")
            return
        told = {"failed": news.get("error"), "interrupted": f"stopped after step {news.get('step')}, saved"}
        error = told.get(str(news.get("status"))) or last_error(log) or otherwise
        self._errors[run.name] = f"error: {error}\n    log: {log}"
        say(f"{run.name}: failed{count}, {self._errors[run.name]}")


# Launchers


@dataclass(frozen=True, config=STRICT)
class Sequential:
    """One run after the other in this process."""

    def check(self, config: RunConfig) -> tuple[RunConfig, int | None]:
        """Return a configuration without what this machine cannot check, and the processes of a run, None for its own.

        Raises ConfigError where the launcher cannot work here, or the run asks for what the launcher decides.
        """
        return config, None

    def launch(self, sweep: Sweep, train: Train) -> None:
        """Do the runs of a sweep that are left."""
        for run in sweep.left:
            say(f"{run.name}: started")
            error: Exception | None = None
            try:
                train(run.config)
            except Exception as failure:
                error = failure
                if not isinstance(error, FambaError):
                    traceback.print_exception(error)
            sweep.conclude(run, run.folder / "train.log", str(error))


class _Started(NamedTuple):
    run: Run
    gpus: tuple[str, ...]
    process: subprocess.Popen[bytes]

    def stop(self, number: int) -> None:
        self.process.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)


@dataclass(frozen=True, config=STRICT)
class Local(Sequential):
    """Several runs at once on this machine, each a process that a user could have started."""

    jobs: Count | None
    threads: Count | None
    gpus_per_run: NotNegative | None

    def check(self, config: RunConfig) -> tuple[RunConfig, int | None]:
        device, gpus = config.trainer.device, self.places()[0][0]
        if gpus and device.startswith("cuda:"):
            raise ConfigError(
                f"trainer.device={device}, but hydra/launcher=local gives each run its own GPU; leave it out"
            )
        return config, max(1, len(gpus))

    def places(self, runs: int = 10**9) -> tuple[list[tuple[str, ...]], int]:
        """Return the GPUs of each run that goes on at once, as CUDA_VISIBLE_DEVICES names them, and its threads."""
        count, visible = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = tuple(map(str, range(count)) if visible is None else map(str.strip, visible.split(",")))[:count]
        each = min(1, len(gpus)) if self.gpus_per_run is None else self.gpus_per_run
        threads = self.threads or int(os.environ.get("OMP_NUM_THREADS", "0"))
        jobs = self.jobs or max(1, len(gpus) // each if each else cores() // (threads or 1))
        if each * jobs > len(gpus):
            raise ConfigError(
                f"hydra.launcher.gpus_per_run={each} for {jobs} runs at once takes {each * jobs} GPUs, this process "
                f"sees {len(gpus)}; lower it, or hydra.launcher.jobs"
            )
        at_once = min(jobs, runs)
        places = [gpus[place * each : (place + 1) * each] for place in range(at_once)]
        return places, threads or max(1, cores() // at_once // max(1, each))

    def launch(self, sweep: Sweep, train: Train) -> None:
        started: list[_Started] = []
        with StopRequest() as stop:
            try:
                self._do(sweep, started, stop)
            finally:
                # Whatever ended the sweep, no run stays behind.
                for one in started:
                    one.stop(stop.number)
                for one in started:
                    one.process.wait()
            if not stop.number:
                return
            stopped = Interrupted("stopped and saved; the same command continues the runs", stop.number)
            if not stopped.goes_on:
                raise stopped
            if not sweep.has_progressed():
                raise TrainingError("not requeued: Slurm gave notice before any run did a step; raise the time limit")
            interrupts.requeue()
            say("back in Slurm's queue")
            interrupts.wait_for_the_end(stop)

    def _do(self, sweep: Sweep, started: list[_Started], stop: StopRequest) -> None:
        """Do the runs that are left until all have ended; `started` always holds those that have not."""
        waiting, told = list(sweep.left), False
        places, threads = self.places(len(waiting))
        say(f"{len(places)} at once, each with {threads} thread{'s' if threads != 1 else ''}")
        while started or (waiting and not stop.number):
            while places and waiting and not stop.number:
                if (one := _start(sweep, waiting.pop(0), places[0], threads)) is not None:
                    started.append(one)
                    on = f" on GPU {','.join(one.gpus)}" if one.gpus else ""
                    say(f"{one.run.name}: started{on}, output in {one.run.folder / _OUTPUT}")
                    del places[0]
            if stop.number and not told:
                told = True
                say(f"stopping {len(started)} runs, which save themselves first")
                for one in started:
                    one.stop(stop.number)
            for one in [one for one in started if one.process.poll() is not None]:
                started.remove(one)
                places.append(one.gpus)
                _end(sweep, one, stop)
            time.sleep(_LOOK_S)


def _start(sweep: Sweep, run: Run, gpus: tuple[str, ...], threads: int) -> _Started | None:
    """Start a run on GPUs; None where that fails."""
    log = run.folder / _OUTPUT
    given = {"OMP_NUM_THREADS": str(threads)} | ({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {})
    # The launcher alone puts its job back into Slurm's queue, once for all runs.
    inherited = {key: value for key, value in os.environ.items() if key != "SLURM_JOB_ID"}
    command = command_of(run, len(gpus), sweep.config_dir)
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        with open(log, "a") as output:
            output.write(f"$ {' '.join(f'{key}={value}' for key, value in given.items())} {shlex.join(command)}\n")
            output.flush()
            streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
            # In its own session it does not get the terminal's Ctrl-C beside the one that is passed on.
            process = subprocess.Popen(command, env={**inherited, **given}, start_new_session=True, **streams)  # noqa: S603
    except OSError as error:
        sweep.conclude(run, log, f"it cannot be started: {error}")
        return None
    return _Started(run, gpus, process)


def command_of(run: Run, processes: int, config_dir: Path | None) -> list[str]:
    """Return the command that does a run by itself."""
    many = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"] if processes > 1 else []
    own = [] if config_dir is None else ["--config-dir", str(config_dir)]
    overrides = [line for line in run.overrides if _key(line) != "run_dir"]
    return [sys.executable, "-m", *many, "famba", "train", *own, *overrides, f"run_dir={quoted(run.config.run_dir)}"]


def _end(sweep: Sweep, one: _Started, stop: StopRequest) -> None:
    status, news = one.process.returncode, sweep.news(one.run)
    # A run that was stopped may end with torchrun's own exit status.
    if stop.number and news.get("status", "running") in ("running", "interrupted"):
        saved = f"after step {news.get('step')}, saved"
        say(f"{one.run.name}: stopped {saved if news.get('status') == 'interrupted' else 'before it could save'}")
    else:
        ended = f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        sweep.conclude(one.run, one.run.folder / _OUTPUT, ended)


@dataclass(frozen=True, config=STRICT)
class Slurm(Sequential):
    """Each run a job of a Slurm cluster, all in one array.

    submitit writes the batch script and starts the processes. The end of a job shows in squeue and in its run's folder:
    submitit itself would need Slurm's accounting.
    """

    name: Text
    partition: Text | None
    account: Text | None
    qos: Text | None
    constraint: Text | None
    gres: Text | None
    timeout_min: Count
    signal_delay_s: NotNegative
    nodes: Count
    tasks_per_node: Count
    gpus_per_node: NotNegative | None
    cpus_per_task: Count | None
    mem_gb: Positive | None
    array_parallelism: Count
    setup: list[Text] | None
    python: Text | None
    srun_args: list[Text] | None
    additional_parameters: dict[Text, str | bool | int | float | None] | None
    max_num_timeout: NotNegative
    poll_s: Positive

    def check(self, config: RunConfig) -> tuple[RunConfig, int | None]:
        if find_spec("submitit") is None:
            raise ConfigError("hydra/launcher=slurm needs submitit; pip install 'famba[slurm]'")
        if absent := [name for name in ("sbatch", "srun", "squeue") if which(name) is None]:
            raise ConfigError(
                f"hydra/launcher=slurm needs Slurm's commands, {', '.join(absent)} not found; start it on a login node "
                "of the cluster, outside of containers, or use hydra/launcher=local"
            )
        # A login node has neither the GPU nor its precisions and kernels.
        trainer = replace(config.trainer, device="cpu", precision="fp32", cuda_graphs="auto")
        config = replace(config, trainer=trainer, ops=replace(config.ops, backend="auto"))
        return config, self.nodes * self.tasks_per_node

    def launch(self, sweep: Sweep, train: Train) -> None:
        folder = (sweep.folder / "slurm").absolute()
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            known, queued = remembered(folder), queue()
            jobs = {run.name: known[run.name] for run in sweep.left if known.get(run.name) in queued}
            if new := [run for run in sweep.left if run.name not in jobs]:
                jobs |= self.submit(new, folder, train)
                _write(folder / "jobs.json", {**known, **jobs})
        try:
            _wait(sweep, jobs, folder, self.poll_s)
        except KeyboardInterrupt:
            ids = " ".join(sorted({job.split("_")[0] for job in jobs.values()}))
            raise KeyboardInterrupt(
                f"no longer waiting; the jobs stay in Slurm. The same command waits for them again, `scancel {ids}` "
                f"ends them, `famba status {sweep.folder}` shows them"
            ) from None

    def submit(self, runs: list[Run], folder: Path, train: Train) -> dict[str, str]:
        """Submit runs as one array; return their jobs. Raises ConfigError with Slurm's words where it refuses."""
        import submitit

        class Job(submitit.helpers.Checkpointable):  # which submits itself again where Slurm ends it before it trains
            def __call__(self, values: dict[str, Any]) -> float:
                return train(parse(values))["top1"]

        given = {key: value for key, value in asdict(self).items() if value is not None}
        timeouts, python, _ = given.pop("max_num_timeout"), given.pop("python", None), given.pop("poll_s")
        if self.cpus_per_task is not None:
            # Since Slurm 22.05 srun does not take it over from the job.
            given["srun_args"] = [*given.get("srun_args", []), f"--cpus-per-task={self.cpus_per_task}"]
        named = {key if key in _SUBMITITS else f"slurm_{key}": value for key, value in given.items()}
        failures = submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError, NameError, ValueError
        try:
            fixed: dict[str, Any] = {"slurm_max_num_timeout": timeouts, "slurm_python": python}
            executor = submitit.AutoExecutor(folder, cluster="slurm", **fixed)
            executor.update_parameters(**named, stderr_to_stdout=True)
            # submitit also prints Slurm's words.
            with redirect_stderr(io.StringIO()), executor.batch():
                jobs = [executor.submit(Job(), plain(run.config)) for run in runs]
        except failures as error:
            raise ConfigError(f"the jobs cannot be submitted: {error}") from error
        return {run.name: job.job_id for run, job in zip(runs, jobs, strict=True)}


def _wait(sweep: Sweep, jobs: dict[str, str], folder: Path, poll_s: float) -> None:
    """Wait for jobs, and print their states and results."""
    waiting, told, gone = list(sweep.left), dict.fromkeys(jobs, ""), dict[str, float]()
    while waiting:
        states = dict.fromkeys(jobs.values(), "COMPLETING")  # where Slurm does not answer, look again later
        with suppress(TrainingError):
            states = queue()
        for run in list(waiting):
            job, state = jobs[run.name], states.get(jobs[run.name])
            if state is None:
                since = gone.setdefault(run.name, time.monotonic())
                ended = sweep.news(run).get("status") in ("finished", "failed", "interrupted")
                if ended or time.monotonic() - since > _GRACE_S:
                    waiting.remove(run)
                    # The log with an error of famba's is that of the process that failed first.
                    logs = sorted(
                        folder.glob(f"{job}_*_log.out"), key=lambda log: "famba.errors." not in log.read_text()
                    )
                    sweep.conclude(run, (logs or [folder])[0], f"job {job} ended without a word")
            elif state not in (told[run.name], "COMPLETING"):
                held = f"; `scontrol release {job}` lets it go on" if state == "HELD" else ""
                again = " again" if told[run.name] == "RUNNING" else ""
                say(f"{run.name}: {state.lower()}{again}, job {job}{held}")
                told[run.name] = state
        if waiting:
            time.sleep(poll_s)


def choose(settings: DictConfig | None) -> Sequential:
    """Return the launcher of hydra.launcher. Raises ConfigError for one that is not famba's, and for wrong settings."""
    try:
        given: Any = OmegaConf.to_container(settings, resolve=True) if settings is not None else {}
    except OmegaConfBaseException as error:
        raise ConfigError(f"hydra.launcher: {str(error).splitlines()[0]}") from error
    target = given.pop("_target_", None)
    kind = {f"famba.training.sweeps.{kind.__name__}": kind for kind in (Sequential, Local, Slurm)}.get(target)
    if kind is None:
        raise ConfigError(
            f"hydra/launcher has hydra.launcher._target_={target!r}, which does not use run folders; allowed: "
            "sequential, local, slurm, and files of your own that begin with one of them (defaults: [slurm, _self_])"
        )
    try:
        # Strict validation builds dataclasses from JSON alone.
        return TypeAdapter(kind).validate_json(json.dumps(given))
    except ValidationError as error:
        known = [f"hydra.launcher.{field.name}" for field in fields(kind)]
        raise ConfigError("\n".join(explain(error, known, "hydra.launcher."))) from None


def last_error(log: Path) -> str:
    """Return the error with which the last start in a log ends, else its last line; "" where there is none."""
    try:
        text = log.read_bytes()[-_READ:].decode(errors="replace")
    except OSError:
        return ""
    # A start begins with its command.
    lines = re.split(r"^\$ .*\n", text, flags=re.MULTILINE)[-1].strip()
    last = re.split(r"^(?:error|famba\.errors\.\w+): ", lines, flags=re.MULTILINE)
    return last[-1] if len(last) > 1 else lines.rsplit("\n", 1)[-1]


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def _write(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=2) + "\n"
    write_whole(path, lambda file: Path(file).write_text(text))
