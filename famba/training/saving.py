"""Saving beside training: the training waits while its state is copied, not while it is written."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


class Saver:
    """Runs one write at a time in a thread of its own; an error of it comes out at the next call."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self.blocked_s = 0.0

    def save(self, content: Mapping[str, Any], write: Callable[[dict[str, Any]], object]) -> None:
        """Copy `content`, and let `write` have the copy in the background once the write before it is done.

        Raises what the write before it raised.
        """
        began = time.perf_counter()
        self.wait()
        copy = on_host(content)
        self._thread = threading.Thread(target=self._run, args=(write, copy), name="saving")
        self._thread.start()
        self.blocked_s += time.perf_counter() - began

    def wait(self) -> None:
        """Wait until all is written. Raises what the write raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raise what a write has raised, without waiting for one."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, write: Callable[[dict[str, Any]], object], content: dict[str, Any]) -> None:
        try:
            write(content)
        except Exception as error:
            self._error = error


def on_host(value: Any) -> Any:
    """Copy nested containers with every tensor in them to the host's memory."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: on_host(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(on_host(item) for item in value)
    return value
