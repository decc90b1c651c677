"""Answer signals that ask a run to stop, and go back into Slurm's queue."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
import time
from types import FrameType
from typing import Any, NoReturn

from famba.errors import TrainingError

_log = logging.getLogger(__name__)
_SAME_REQUEST_S = 1.0  # torchrun passes a Ctrl-C on to processes that the terminal has sent it already
_ENDED_BY_SLURM_S = 300.0
_NOTICES = (signal.SIGUSR1, signal.SIGUSR2)  # of a time limit or a pre-emption; the run is to go on later
_ANSWERED = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, *_NOTICES}


class Interrupted(KeyboardInterrupt):
    """Say that the run was asked to stop by `signal`; every process of a run raises it at the same place."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number

    @property
    def goes_on(self) -> bool:
        """Return whether Slurm gave notice and is to start the run again."""
        return self.signal in _NOTICES and "SLURM_JOB_ID" in os.environ


class StopRequest:
    """In a `with` block, keep the number of the first signal that asks to stop; a second Ctrl-C interrupts at once.

    Later signals change nothing: Slurm repeats itself while a run is saving. Under nohup SIGHUP is ignored.
    """

    def __init__(self) -> None:
        self.number, self._at = 0, 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            under_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            answered = _ANSWERED - ({signal.SIGHUP} if under_nohup else set())
            self._previous = {number: signal.signal(number, self._receive) for number in answered}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self.number, self._at = number, time.monotonic()
            hint = " (Ctrl-C once more ends at once, without saving)" if number == signal.SIGINT else ""
            _log.warning("%s: saving at the end of this step%s", signal.Signals(number).name, hint)
        elif number == signal.SIGINT and time.monotonic() - self._at > _SAME_REQUEST_S:
            raise KeyboardInterrupt


def restarts() -> int:
    """Return how often Slurm has started this job again."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def starts_anew(resume: str) -> bool:
    """Return whether a run with this `resume` looks at no earlier one; a job that Slurm starts again goes on."""
    return resume == "never" and not restarts()


def requeue() -> None:
    """Put this job back into Slurm's queue, which ends it here. Raises TrainingError if Slurm refuses."""
    given = os.environ
    array = given.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{given['SLURM_ARRAY_TASK_ID']}" if array is not None else given["SLURM_JOB_ID"]
    try:
        subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60, check=True)  # noqa: S603, S607
    except (OSError, subprocess.SubprocessError) as error:
        told = f"the run is saved, but Slurm does not requeue job {job}: {getattr(error, 'stderr', None) or error}"
        raise TrainingError(f"{told.strip()}. Submit the same command again") from error


def wait_for_the_end(number: int) -> NoReturn:
    """Wait until Slurm ends this process, so that the job does not count as finished; number: of the signal."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(_ENDED_BY_SLURM_S)
    raise SystemExit(128 + number)
