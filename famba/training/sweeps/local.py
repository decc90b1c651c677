"""Several runs at once on this machine, each a process of its own that a user could have started."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from filelock import FileLock, Timeout
from hydra.core.utils import JobReturn

from famba.errors import ConfigError, FambaError, TrainingError
from famba.training import slurm
from famba.training.compose import quoted
from famba.training.interrupts import Interrupted, StopRequest
from famba.training.sweeps.limits import Limits
from famba.training.sweeps.logs import last_error
from famba.training.sweeps.plan import Run, Sweep, say, short

if TYPE_CHECKING:
    from hydra_plugins.famba_launchers import FambaLauncher

_LOOK_S = 0.1
_REQUEUED_S = 60.0  # a file system may hold the lock of a job's last start for a while
_QUOTED = re.compile(r"""[^"$`\\!]*'[^"$`\\!]*""")
_ANSWERED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def launch(launcher: FambaLauncher, job_overrides: Sequence[Sequence[str]], first: int) -> list[JobReturn]:
    """Do the runs that are not finished, as many at once as the machine has room for."""
    sweep = Sweep(launcher, job_overrides, first)
    limits = Limits.of(launcher.config.hydra.launcher)
    pool = _Pool(sweep, limits, _config_dir(launcher))
    try:
        with _alone(sweep.folder):
            sweep.announce()
            if sweep.left:
                pool.run()
    except Interrupted as stopped:
        if stopped.on_notice and slurm.in_job():
            _back_to_the_queue(stopped, pool.progressed)
        raise
    return sweep.returns()


def command_of(run: Run, processes: int, config_dir: str | None) -> list[str]:
    """Return the command that does a run by itself."""
    python = [sys.executable, "-m"]
    if processes > 1:
        python += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    own = [] if config_dir is None else ["--config-dir", config_dir]
    overrides = [line for line in run.overrides if not line.startswith(("run_dir=", "hydra.", "hydra/"))]
    return [*python, "famba", "train", *own, *overrides, f"run_dir={quoted(str(run.folder))}"]


@dataclass
class _Going:
    """A run that goes on; log_from is where its output begins in the log, place how far it was before."""

    run: Run
    process: subprocess.Popen[bytes]
    gpus: tuple[str, ...]
    log: Path
    log_from: int
    place: tuple[int, float]


class _Pool:
    """The processes of a sweep. Signals to this process are passed on once each, and waited for."""

    def __init__(self, sweep: Sweep, limits: Limits, config_dir: str | None) -> None:
        self._sweep, self._limits, self._config_dir = sweep, limits, config_dir
        at_once = min(limits.jobs, len(sweep.left))
        self._threads = limits.threads_of(at_once)
        self._places = limits.places()[:at_once]
        self._waiting = list(reversed(sweep.left))
        self._going: list[_Going] = []
        self._asked: list[int] = []
        self._stopped = 0
        self.progressed = False
        """Whether a run has come further since the start."""

    def run(self) -> None:
        """Start runs as places become free, until all are done. Raises Interrupted where asked to stop."""
        each = f"{self._threads} thread{'s' if self._threads != 1 else ''}"
        say(f"{len(self._places)} at once, each with {each}")
        with self._answering():
            try:
                while self._going or (self._waiting and not self._stopped):
                    self._pass_on()
                    while self._places and self._waiting and not self._stopped:
                        self._start(self._waiting.pop(), self._places.pop(0))
                    self._look()
                    time.sleep(_LOOK_S)
            finally:
                self._end()
        if self._stopped:
            raise Interrupted("stopped; the same command goes on where the runs have saved themselves", self._stopped)

    def _start(self, run: Run, gpus: tuple[str, ...]) -> None:
        given = {"OMP_NUM_THREADS": str(self._threads)}
        if gpus:
            given["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        path = run.folder / "output.log"
        try:
            going = _begin(run, command_of(run, self._limits.gpus_per_run, self._config_dir), given, gpus)
        except (OSError, FambaError) as error:
            self._places.append(gpus)
            self._sweep.fail(run, TrainingError(f"it cannot be started: {error}"), path)
            return
        self._going.append(going)
        on = f" on GPU {','.join(gpus)}" if gpus else ""
        say(f"{run.name}: started{on}, output in {short(path)}")

    def _look(self) -> None:
        for going in [going for going in self._going if going.process.poll() is not None]:
            self._going.remove(going)
            self._places.append(going.gpus)
            self._conclude(going)

    def _conclude(self, going: _Going) -> None:
        run, status = going.run, going.process.returncode
        try:
            summary = run.done() if status == 0 else None
            said = run.summary()
        except FambaError as error:
            self._sweep.fail(run, error, going.log)
            return
        self.progressed |= summary is not None or _place(said) != going.place
        if summary is not None:
            self._sweep.finish(run, summary)
        elif self._stopped:
            # The exit status says little: torchrun has its own, and a run that is still importing has none yet.
            say(f"{run.name}: {_where_it_stopped(said)}")
        else:
            ended = f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
            self._sweep.fail(run, TrainingError(last_error(going.log, going.log_from) or ended), going.log)

    def _pass_on(self) -> None:
        asked, self._asked = self._asked, []
        for number in asked:
            first, self._stopped = not self._stopped, self._stopped or number
            self._send(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)
            if first:
                say(f"stopping {len(self._going)} runs, which save themselves first")

    def _end(self) -> None:
        """Leave no run behind, whatever ended the sweep."""
        if self._going:
            self._send(signal.SIGTERM)
        while any(going.process.poll() is None for going in self._going):
            time.sleep(_LOOK_S)
            asked, self._asked = self._asked, []
            for number in asked:
                self._send(number)

    def _send(self, number: int) -> None:
        for going in self._going:
            going.process.send_signal(number)

    @contextmanager
    def _answering(self) -> Iterator[None]:
        def receive(number: int, frame: FrameType | None) -> None:
            self._asked.append(number)

        before = {number: signal.signal(number, receive) for number in _ANSWERED}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _begin(run: Run, command: Sequence[str], given: Mapping[str, str], gpus: tuple[str, ...]) -> _Going:
    run.folder.mkdir(parents=True, exist_ok=True)
    path = run.folder / "output.log"
    # The job is the launcher's: it is this process that puts it back into Slurm's queue, once for all runs.
    inherited = {key: value for key, value in os.environ.items() if key != "SLURM_JOB_ID"}
    with open(path, "a") as log:
        begin = log.tell()
        log.write(f"$ {' '.join(f'{key}={value}' for key, value in given.items())} {_typed(command)}\n")
        log.flush()
        # In a session of its own the terminal's Ctrl-C does not reach it beside the one that is passed on.
        process = subprocess.Popen(  # noqa: S603 - this Python with checked overrides
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**inherited, **given},
            start_new_session=True,
        )
    return _Going(run, process, gpus, path, begin, _place(run.summary()))


def _place(said: Mapping[str, Any] | None) -> tuple[int, float]:
    """How far a summary says that a run is: steps, and seconds of evaluation."""
    said = said or {}
    return said.get("step") or 0, said.get("eval_time_s") or 0.0


def _where_it_stopped(said: Mapping[str, Any] | None) -> str:
    if said is None:
        return "stopped before it began"
    if said.get("status") == "interrupted":
        return f"stopped after step {said.get('step')}, saved"
    if said.get("status") == "failed":
        return f"stopped; its summary says: {said.get('error')}"
    return "stopped without saving itself; it goes on from its last checkpoint"


def _back_to_the_queue(stopped: Interrupted, progressed: bool) -> NoReturn:
    """Answer Slurm's notice as a single run does."""
    if not progressed:
        raise TrainingError(
            f"{stopped.args[0]}. The job is not requeued: Slurm gave notice before any run had come further, and would "
            "again; raise the job's time limit"
        )
    with StopRequest() as stop:
        stop.number = stopped.signal
        slurm.requeue()
        say("back in Slurm's queue")
        slurm.wait_for_the_end(stop)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep a second start of the same sweep out."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=_REQUEUED_S if "SLURM_RESTART_COUNT" in os.environ else 0):
            yield
    except Timeout:
        raise ConfigError(
            f"another process is running the sweep in {folder}; wait for it, or choose another run_dir"
        ) from None


def _typed(command: Sequence[str]) -> str:
    """Write a command as a user would; an argument in Hydra's quotes goes into the shell's other ones."""
    return " ".join(f'"{word}"' if _QUOTED.fullmatch(word) else shlex.quote(word) for word in command)


def _config_dir(launcher: FambaLauncher) -> str | None:
    """The user's own folder of configuration files, as --config-dir gave it."""
    sources = launcher.config.hydra.runtime.config_sources
    return next((str(source.path) for source in sources if source.provider == "command-line"), None)
