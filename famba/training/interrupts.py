"""Ctrl-C and termination as a request that the loop answers at its next step."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType, TracebackType

_log = logging.getLogger(__name__)


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop and has saved itself."""


class StopRequest:
    """In a `with` block, the first SIGINT or SIGTERM sets `made`; a second one interrupts at once."""

    def __init__(self) -> None:
        self.made = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for kind in (signal.SIGINT, signal.SIGTERM):
                self._previous[kind] = signal.signal(kind, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.made:
            raise KeyboardInterrupt
        self.made = True
        _log.warning("asked to stop: saving at the next step (once more ends at once, without saving)")
