"""Where metrics go: to metrics.jsonl always, and to one more place where the configuration says so."""

from __future__ import annotations

import json
import logging
import os
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from famba.errors import CheckpointError
from famba.files import write_whole
from famba.training.config import LoggerConfig
from famba.training.run_folder import METRICS, RunFolder

_log = logging.getLogger(__name__)

# At the end of a run wandb sends what it could not send before; a scheduler's notice leaves less time for it.
_FINISH_S = {"finished": 300.0}
_FINISH_IN_HASTE_S = 15.0


class Logger(Protocol):
    """Takes what a run measures."""

    def log(self, kind: str, step: int, epoch: int, values: dict[str, Any]) -> None:
        """Take values after `step` steps, in epoch `epoch`; kind is "train", "epoch" or "schedule"."""

    def finish(self, summary: dict[str, Any]) -> None:
        """Take the summary and close."""


class JsonLines:
    """One object per line in metrics.jsonl. What the disk refuses waits for the next line, and for `sync`."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / METRICS
        self._handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._waiting = b""
        self._lock = threading.Lock()  # a checkpoint is written, and this synced, beside training

    def log(self, kind: str, step: int, epoch: int, values: dict[str, Any]) -> None:
        """Add a line."""
        line = json.dumps({"kind": kind, "step": step, "epoch": epoch, **values})
        try:
            self._write(line.encode() + b"\n")
        except OSError as error:
            _log.warning("cannot write %s (%s); its lines wait for the next try", self._path, error)

    def sync(self) -> None:
        """Wait until all lines are on the disk. Raises CheckpointError where it refuses them."""
        try:
            self._write()
            os.fsync(self._handle)
        except OSError as error:
            raise CheckpointError(f"cannot write {self._path}: {error}") from error

    def finish(self, summary: dict[str, Any]) -> None:
        """Close the file; the summary has one of its own."""
        self.sync()
        os.close(self._handle)

    def _write(self, more: bytes = b"") -> None:
        with self._lock:
            self._waiting += more
            while self._waiting:
                self._waiting = self._waiting[os.write(self._handle, self._waiting) :]


class WandbLogger:
    """Weights & Biases. A run that goes on keeps its id; runs of a sweep are one group."""

    def __init__(self, folder: RunFolder, logger: LoggerConfig, config: dict[str, Any]) -> None:
        import wandb

        online = logger.mode == "online"
        self._run = wandb.init(
            project=logger.project,
            entity=logger.entity,
            group=logger.group or folder.sweep,
            mode=logger.mode,
            id=_run_id(folder.path),
            resume="allow" if online else None,
            name=folder.path.name,
            dir=folder.path,
            config=config,
            # Neither the checkout's remote, whose address may hold a token, nor the machine's names.
            settings=wandb.Settings(silent=True, host="", disable_git=True, disable_code=True, x_disable_meta=True),
        )

    def log(self, kind: str, step: int, epoch: int, values: dict[str, Any]) -> None:
        """Log as kind/name at `step`; wandb passes over steps that it has from before an interruption."""
        self._run.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def finish(self, summary: dict[str, Any]) -> None:
        """Hand the summary over and close."""
        self._run.summary.update(summary)
        self._run.finish()


class TensorBoardLogger:
    """Event files in the run folder's tensorboard/; what an interruption made void is marked so."""

    def __init__(self, folder: RunFolder, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder.path / "tensorboard"), purge_step=step + 1)

    def log(self, kind: str, step: int, epoch: int, values: dict[str, Any]) -> None:
        """Log as kind/name at `step`."""
        for name, value in values.items():
            self._writer.add_scalar(f"{kind}/{name}", value, step)

    def finish(self, summary: dict[str, Any]) -> None:
        """Close the file; the summary has one of its own."""
        self._writer.close()


class Metrics:
    """All loggers of a run as one; only the main process has any.

    metrics.jsonl is part of the run: lines that cannot be written end it at its next checkpoint. No other logger's
    failure does.
    """

    def __init__(self, folder: RunFolder, logger: LoggerConfig, config: dict[str, Any], step: int) -> None:
        self._lines = JsonLines(folder.path) if folder.writes else None
        self._name = logger.name
        self._more: Logger | None = None
        if folder.writes:
            self._attempt("start", lambda: self._start(folder, logger, config, step))

    def log(self, kind: str, step: int, epoch: int, values: dict[str, Any]) -> None:
        """Hand values to every logger."""
        if self._lines is not None:
            self._lines.log(kind, step, epoch, values)
        if self._more is not None:
            more = self._more
            self._attempt("log", lambda: more.log(kind, step, epoch, values))

    def sync(self) -> None:
        """Wait until metrics.jsonl is on the disk. Raises CheckpointError where it is not to be had."""
        if self._lines is not None:
            self._lines.sync()

    def finish(self, summary: dict[str, Any]) -> None:
        """Close every logger; one that takes too long is left behind."""
        if self._more is not None:
            more = self._more
            seconds = _FINISH_S.get(summary["status"], _FINISH_IN_HASTE_S)
            self._attempt("finish", lambda: _within(seconds, lambda: more.finish(summary)))
            self._more = None
        if self._lines is not None:
            self._lines.finish(summary)
            self._lines = None

    def _start(self, folder: RunFolder, logger: LoggerConfig, config: dict[str, Any], step: int) -> None:
        if logger.name == "wandb":
            self._more = WandbLogger(folder, logger, config)
        elif logger.name == "tensorboard":
            self._more = TensorBoardLogger(folder, step)

    def _attempt(self, what: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # whatever a logger's library raises: training is worth more than its log
            _log.warning(
                "%s failed to %s (%s); the run goes on, its metrics are in the run folder", self._name, what, error
            )
            self._more = None


def _run_id(folder: Path) -> str:
    """The id under which wandb knows the run in this folder, made up once."""
    path = folder / "wandb_id.txt"
    if not path.is_file():
        write_whole(path, lambda file: Path(file).write_text(uuid.uuid4().hex))
    return path.read_text().strip()


def _within(seconds: float, call: Callable[[], None]) -> None:
    """Call in a thread, and raise TimeoutError where that takes longer."""
    errors: list[Exception] = []

    def run() -> None:
        try:
            call()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="finish", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"not done after {seconds:.0f} s")
    if errors:
        raise errors[0]
