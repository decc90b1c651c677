"""Ctrl-C, termination and a scheduler's notice as a request that the loop answers at its next step."""

from __future__ import annotations

import logging
import signal
import threading
import time
from types import FrameType

_log = logging.getLogger(__name__)

_SAME_REQUEST_S = 1.0  # torchrun passes a Ctrl-C on to processes that the terminal has sent it already
_NOTICES = (signal.SIGUSR1, signal.SIGUSR2)  # of a time limit or a pre-emption; the run is to go on later
_ANSWERED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, *_NOTICES)


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop by `signal` and has saved itself."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number

    @property
    def on_notice(self) -> bool:
        """Whether the run is meant to go on by itself."""
        return self.signal in _NOTICES


class StopAsked(Exception):  # noqa: N818 - no error
    """A process of the run was asked to stop by `signal`; every process raises it at the same place."""

    def __init__(self, number: int) -> None:
        self.signal = number


class StopRequest:
    """In a `with` block, keeps the number of the first signal that asks to stop; a second Ctrl-C interrupts at once.

    Any other signal that follows is left unanswered: Slurm repeats itself while a run is saving. SIGHUP, the end of the
    terminal, asks to stop too, except under nohup.
    """

    def __init__(self) -> None:
        self.number, self._at = 0, 0.0
        self.ended = False
        """Whether SIGTERM came after the request: time is up."""
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            under_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            answered = set(_ANSWERED) - ({signal.SIGHUP} if under_nohup else set())
            self._previous = {number: signal.signal(number, self._receive) for number in answered}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self.number, self._at = number, time.monotonic()
            hint = " (Ctrl-C once more ends at once, without saving)" if number == signal.SIGINT else ""
            _log.warning("%s: saving at the next step%s", signal.Signals(number).name, hint)
        elif number == signal.SIGTERM:
            self.ended = True
        elif number == signal.SIGINT and time.monotonic() - self._at > _SAME_REQUEST_S:
            raise KeyboardInterrupt
