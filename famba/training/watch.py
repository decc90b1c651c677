"""Processes that train together hear of one another's end, so that none waits for one that is gone."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from types import TracebackType

import torch.distributed as dist

from famba.errors import FambaError, TrainingError
from famba.training.devices import out_of_memory
from famba.training.distributed import connect, rank, world_size

_log = logging.getLogger(__name__)

_POLL_S = 1.0
# Polls, not seconds: a job that is suspended as a whole counts none.
_SILENT_POLLS = 25
# Nodes that import from a busy file system come late.
_JOIN_POLLS = 300
# Where a collective broke, a shorter silence tells why.
_SUSPICIOUS_POLLS = 5
_HEARSAY_S = 2 * _SUSPICIOUS_POLLS * _POLL_S
# What a process may take to end by itself once it has heard of a failure.
_GRACE_S = 15.0
_FAILURE = "failure"


class Watch:
    """In a `with` block, tells the other processes of an error and learns of theirs; alone, it does nothing.

    A process that dies or is frozen is noticed by its silence within a minute, and one that waits for it in vain on its
    device is ended. One that is alive and makes no progress is not noticed before a collective's time limit.
    """

    def __init__(self) -> None:
        self._alone = world_size() == 1
        self._rank = rank()
        self._stopped = threading.Event()
        self._failure: str | None = None
        self._beats: dict[int, tuple[int, int]] = {}
        self._polls = 0
        self.before_exit: Callable[[str], object] = lambda reason: None
        """Called with the reason before this process is ended from outside its main thread."""

    def __enter__(self) -> Watch:
        if not self._alone:
            self._store = connect("watch")
            # Heard of from now on: joining the others is where a process that is lost would be waited for longest.
            self._store.add(f"beat/{self._rank}", 1)
            for watching in (self._run, self._guard):
                threading.Thread(target=watching, name="watch", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            self._leave_in_time()
        self._stopped.set()

    def explained(self, error: Exception) -> Exception:
        """Tell the others of this process's error and return it, or return the failure of another that it follows."""
        if self._alone:
            return error
        own = isinstance(error, FambaError) or out_of_memory(error)
        deadline = time.monotonic() + (0.0 if own else _HEARSAY_S)
        # A collective that breaks comes out sooner than word of what broke it.
        while self._failure is None and time.monotonic() < deadline:
            self._tell_of_silence(_SUSPICIOUS_POLLS)
            time.sleep(_POLL_S / 4)
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        mine = f"process {self._rank} failed: {text}"
        first = self._failure or self._tell(mine)
        return error if first == mine else TrainingError(first)

    def _run(self) -> None:
        while self._failure is None and not self._stopped.wait(_POLL_S):
            try:
                self._poll()
            except (RuntimeError, dist.DistError):
                # The connection is broken, and the store was in process 0 or in torchrun beside it.
                self._failure = "lost process 0, which holds the others together: killed, or its node died"
            self._polls += 1
        if self._failure is not None:
            self._leave_in_time()

    def _guard(self) -> None:
        """See to it that the questions to process 0 are answered: one that is frozen leaves them open without end."""
        seen, silent = self._polls, 0
        while self._failure is None and not self._stopped.wait(_POLL_S):
            seen, silent = self._polls, silent + 1 if seen == self._polls else 0
            if silent >= _SILENT_POLLS:
                self._failure = "lost process 0, which holds the others together: it does not answer"
                self._leave_in_time()

    def _poll(self) -> None:
        self._store.add(f"beat/{self._rank}", 1)
        if self._store.check([_FAILURE]):
            self._failure = self._store.get(_FAILURE).decode()
            return
        # The main process watches all, the others the main process: few questions however many they are.
        for other in range(1, world_size()) if self._rank == 0 else (0,):
            beat, silent = self._store.add(f"beat/{other}", 0), 0
            if other in self._beats and self._beats[other][0] == beat:
                silent = self._beats[other][1] + 1
            self._beats[other] = beat, silent
        self._tell_of_silence(_SILENT_POLLS)
        absent = [other for other, (beat, silent) in self._beats.items() if beat == 0 and silent >= _JOIN_POLLS]
        if absent:
            self._tell(f"{_named(absent)} did not join the others in {_JOIN_POLLS * _POLL_S / 60:.0f} minutes")

    def _tell_of_silence(self, polls: int) -> None:
        """Tell of processes that have been heard of, but not for so many polls."""
        lost = [other for other, (beat, silent) in list(self._beats.items()) if beat > 0 and silent >= polls]
        if lost:
            self._tell(f"lost {_named(lost)}: killed, out of memory, or its node died")

    def _tell(self, text: str) -> str:
        """Tell of a failure; return the one that was told of first, which all hear."""
        try:
            first = self._store.compare_set(_FAILURE, "", text).decode()
        except (RuntimeError, dist.DistError):
            first = text
        self._failure = first
        return first

    def _leave_in_time(self) -> None:
        """End this process from outside its main thread should that not come to its end."""
        if self._alone or self._stopped.is_set():
            return
        self._stopped.set()
        threading.Thread(target=self._end, name="end", daemon=True).start()

    def _end(self) -> None:
        time.sleep(_GRACE_S)
        reason = self._failure or "the run failed"
        try:
            _log.error("%s", reason)
            self.before_exit(reason)
        finally:
            os._exit(1)


def _named(ranks: list[int]) -> str:
    return f"process{'es' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} of {world_size()}"
