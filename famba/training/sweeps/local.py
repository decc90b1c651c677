"""Several runs at once on this machine, each a process of its own that a user could have started."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout
from hydra.core.utils import JobReturn

from famba.errors import ConfigError, TrainingError
from famba.training.compose import quoted
from famba.training.interrupts import Interrupted
from famba.training.sweeps.limits import Limits
from famba.training.sweeps.logs import last_error
from famba.training.sweeps.plan import Run, Sweep, say, short

if TYPE_CHECKING:
    from hydra_plugins.famba_launchers import FambaLauncher

_LOOK_S = 0.1
_QUOTED = re.compile(r"""[^"$`\\!]*'[^"$`\\!]*""")
_INTERRUPTED = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # a run's exit status
_ANSWERED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def launch(launcher: FambaLauncher, job_overrides: Sequence[Sequence[str]], first: int) -> list[JobReturn]:
    """Do the runs that are not finished, as many at once as the machine has room for."""
    sweep = Sweep(launcher, job_overrides, first)
    limits = Limits.of(launcher.config.hydra.launcher)
    with _alone(sweep.folder):
        sweep.announce()
        if sweep.left:
            _Pool(sweep, limits, _config_dir(launcher)).run()
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
    """A run that goes on; log_from is where its output begins in the log."""

    run: Run
    process: subprocess.Popen[bytes]
    gpus: tuple[str, ...]
    log: Path
    log_from: int


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

    def run(self) -> None:
        """Start runs as places become free, until all are done. Raises Interrupted where asked to stop."""
        each = f"{self._threads} thread{'s' if self._threads != 1 else ''}"
        say(f"{len(self._places)} at once, each with {each}")
        with self._answering():
            while self._going or (self._waiting and not self._stopped):
                self._pass_on()
                while self._places and self._waiting and not self._stopped:
                    self._start(self._waiting.pop(), self._places.pop(0))
                for going in [going for going in self._going if going.process.poll() is not None]:
                    self._going.remove(going)
                    self._places.append(going.gpus)
                    self._conclude(going)
                time.sleep(_LOOK_S)
        if self._stopped:
            raise Interrupted("stopped; the same command goes on where the runs have saved themselves", self._stopped)

    def _start(self, run: Run, gpus: tuple[str, ...]) -> None:
        given = {"OMP_NUM_THREADS": str(self._threads)}
        if gpus:
            given["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        command = command_of(run, self._limits.gpus_per_run, self._config_dir)
        run.folder.mkdir(parents=True, exist_ok=True)
        path = run.folder / "output.log"
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
                env={**os.environ, **given},
                start_new_session=True,
            )
        self._going.append(_Going(run, process, gpus, path, begin))
        on = f" on GPU {','.join(gpus)}" if gpus else ""
        say(f"{run.name}: started{on}, output in {short(path)}")

    def _conclude(self, going: _Going) -> None:
        run, status = going.run, going.process.returncode
        summary = run.done() if status == 0 else None
        if summary is not None:
            self._sweep.finish(run, summary)
        elif self._stopped and status in _INTERRUPTED:
            say(f"{run.name}: {last_error(going.log, going.log_from) or 'stopped'}")
        else:
            ended = f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
            self._sweep.fail(run, TrainingError(last_error(going.log, going.log_from) or ended), going.log)

    def _pass_on(self) -> None:
        asked, self._asked = self._asked, []
        for number in asked:
            if not self._stopped:
                say(f"stopping {len(self._going)} runs, which save themselves first")
            self._stopped = self._stopped or number
            for going in self._going:
                going.process.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

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


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep a second start of the same sweep out."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
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
