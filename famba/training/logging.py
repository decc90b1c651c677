"""Metrics of a run in files and services, and its lines on the terminal."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from famba.errors import CheckpointError
from famba.files import write_whole
from famba.training.config import LoggerConfig
from famba.training.records import METRICS, duration
from famba.training.run_folder import RunFolder

FILE_ONLY = {"file_only": True}
"""Mark a line that is for train.log alone, as `extra` of a logging call."""
_log = logging.getLogger(__name__)
# At the end of a run wandb sends what it could not send before; a scheduler's notice leaves less time for it.
_FINISH_S, _FINISH_IN_HASTE_S = 300.0, 15.0
_PLAIN_SECONDS = 30.0
_WARM_STEPS, _TIMED_STEPS = 2, 8
T = TypeVar("T")


class JsonLines:
    """One object per line in metrics.jsonl. Lines that the disk refuses wait for the next one, and for `sync`."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / METRICS
        self._handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)  # less the umask
        self._waiting = b""
        self._lock = threading.Lock()  # a checkpoint is written, and this synced, beside training

    def log(self, kind: str, step: int, epoch: int, values: dict[str, Any]) -> None:
        """Add a line of values after `step` steps, in epoch `epoch`; kind is "train", "epoch" or "schedule"."""
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

    def close(self) -> None:
        """Write what waits, and close the file. Raises as `sync` does."""
        self.sync()
        os.close(self._handle)

    def _write(self, more: bytes = b"") -> None:
        with self._lock:
            self._waiting += more
            while self._waiting:
                self._waiting = self._waiting[os.write(self._handle, self._waiting) :]


class WandbLogger:
    """Weights & Biases. A run that continues keeps its id; runs of a sweep are one group."""

    def __init__(self, folder: RunFolder, logger: LoggerConfig, config: dict[str, Any]) -> None:
        import wandb

        run_id = folder.path / "wandb_id.txt"
        if not run_id.is_file():
            write_whole(run_id, lambda file: Path(file).write_text(uuid.uuid4().hex))
        self._run = wandb.init(
            project=logger.project,
            entity=logger.entity,
            group=logger.group or folder.sweep,
            mode=logger.mode,
            id=run_id.read_text().strip(),
            resume="allow" if logger.mode == "online" else None,
            name=folder.path.name,
            dir=folder.path,
            config=config,
            # Neither the checkout's remote, whose address may hold a token, nor the machine's names.
            settings=wandb.Settings(silent=True, host="", disable_git=True, disable_code=True, x_disable_meta=True),
        )

    def log(self, kind: str, step: int, epoch: int, values: dict[str, Any]) -> None:
        """Log as kind/name at `step`; wandb ignores steps that it has from before an interruption."""
        self._run.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def finish(self, summary: dict[str, Any]) -> None:
        """Log the summary and close."""
        self._run.summary.update(summary)
        self._run.finish()


class TensorBoardLogger:
    """Event files in the run folder's tensorboard/; steps that are done again replace the earlier ones."""

    def __init__(self, folder: RunFolder, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder.path / "tensorboard"), purge_step=step + 1)

    def log(self, kind: str, step: int, epoch: int, values: dict[str, Any]) -> None:
        """Log as kind/name at `step`."""
        for name, value in values.items():
            self._writer.add_scalar(f"{kind}/{name}", value, step)

    def finish(self, summary: dict[str, Any]) -> None:
        """Close the file; the summary is not logged here."""
        self._writer.close()


class Metrics:
    """All loggers of a run as one; only the main process has any.

    Lines of metrics.jsonl that cannot be written end the run at its next checkpoint; a failure of another logger does
    not.
    """

    def __init__(self, folder: RunFolder, logger: LoggerConfig, config: dict[str, Any], step: int) -> None:
        self._lines = JsonLines(folder.path) if folder.writes else None
        self._name = logger.name
        self._more: WandbLogger | TensorBoardLogger | None = None
        if folder.writes and logger.name == "wandb":
            self._more = self._attempt("start", lambda: WandbLogger(folder, logger, config))
        elif folder.writes and logger.name == "tensorboard":
            self._more = self._attempt("start", lambda: TensorBoardLogger(folder, step))

    def log(self, kind: str, step: int, epoch: int, values: dict[str, Any]) -> None:
        """Log values with every logger."""
        if self._lines is not None:
            self._lines.log(kind, step, epoch, values)
        if (more := self._more) is not None:
            self._attempt("log", lambda: more.log(kind, step, epoch, values))

    def sync(self) -> None:
        """Wait until metrics.jsonl is on the disk. Raises CheckpointError where it cannot be written."""
        if self._lines is not None:
            self._lines.sync()

    def finish(self, summary: dict[str, Any]) -> None:
        """Close every logger; one that takes too long is left behind."""
        if (more := self._more) is not None:
            # In a thread that does not outlive the process.
            finish = threading.Thread(target=self._attempt, args=("finish", lambda: more.finish(summary)), daemon=True)
            finish.start()
            finish.join(_FINISH_S if summary["status"] == "finished" else _FINISH_IN_HASTE_S)
            if finish.is_alive():
                _log.warning("%s does not finish; its last metrics may be missing there", self._name)
            self._more = None
        if self._lines is not None:
            self._lines.close()
            self._lines = None

    def _attempt(self, verb: str, call: Callable[[], T]) -> T | None:
        """Call, and return the result; where that fails, warn and log no more."""
        try:
            return call()
        except Exception as error:  # of a logger's library: training is worth more than its log
            _log.warning("%s failed to %s (%s); the run continues, see its metrics.jsonl", self._name, verb, error)
            self._more = None
            return None


class Progress:
    """A bar on a terminal, a plain line every half minute elsewhere, and a first estimate of the time left."""

    def __init__(self, total_steps: int, step: int, images_per_step: int, shown: bool) -> None:
        self._total, self._images, self._first, self._shown = total_steps, images_per_step, step, shown
        self._bar = tqdm(
            total=total_steps, initial=step, disable=None if shown else True, unit="step", dynamic_ncols=True
        )
        self._started = self._last_line = time.monotonic()

    def step(self, step: int, epoch: int, loss: float | None) -> None:
        """Show that `step` steps are done; loss where it is known."""
        if not self._shown:
            return
        self._estimate(step)
        if not self._bar.disable:
            self._bar.update(step - self._bar.n)
            if loss is not None:
                self._bar.set_postfix_str(f"epoch {epoch + 1} loss {loss:.3f}", refresh=False)
        elif loss is not None and time.monotonic() - self._last_line > _PLAIN_SECONDS:
            self._last_line = time.monotonic()
            rate = (step - self._first) / (self._last_line - self._started)
            told = (
                f"step {step} of {self._total}, epoch {epoch + 1}, loss {loss:.4f}, {rate * self._images:.1f} images/s"
            )
            _log.info("%s, %s left", told, duration((self._total - step) / rate))

    def _estimate(self, step: int) -> None:
        done = step - self._first
        if done == _WARM_STEPS:
            self._warm = time.monotonic()
        if done == _WARM_STEPS + _TIMED_STEPS:
            seconds, left = (time.monotonic() - self._warm) / _TIMED_STEPS, self._total - step
            text = duration(seconds * left)
            _log.info("%.2f s per step: about %s for the %d steps left, without evaluation", seconds, text, left)

    def close(self) -> None:
        """Remove the bar from the terminal."""
        self._bar.close()


def epoch_line(epoch: int, epochs: int, images: str, values: Mapping[str, float]) -> str:
    """Describe an epoch, counted from 0: loss, Top-1 on the evaluated images, speed and time."""
    top1, averaged = values.get(f"{images}_top1"), values.get(f"{images}_ema_top1")
    result = "" if top1 is None else f", {images} Top-1 {top1:.2f} %"
    if averaged is not None:
        result += f" (EMA {averaged:.2f} %)"
    seconds = values["time_data_s"] + values["time_step_s"] + values.get("time_eval_s", 0.0)
    speed = f"{values['images_per_s']:.1f} images/s"
    return f"epoch {epoch + 1} of {epochs}: loss {values['train_loss']:.4f}{result}, {speed}, {duration(seconds)}"


def signed(value: float, digits: int = 2) -> str:
    """Write a number with its sign, and without one where it rounds to 0."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")


@contextmanager
def log_to(folder: RunFolder) -> Iterator[None]:
    """Send log lines to the terminal and to train.log; only warnings from processes other than the main one."""
    root = logging.getLogger()
    terminal = logging.StreamHandler(sys.stdout)
    terminal.setFormatter(logging.Formatter("%(message)s"))
    terminal.addFilter(lambda record: not hasattr(record, "file_only"))
    handlers: list[logging.Handler] = [terminal]
    if folder.writes:
        file = logging.FileHandler(folder.path / "train.log")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        handlers.append(file)
    for handler in handlers:
        handler.addFilter(lambda record: record.name.startswith("famba") or record.levelno >= logging.WARNING)
    handlers_before, level_before = root.handlers, root.level
    root.handlers = handlers
    # Where the disk is full, the error that ends the run is shown elsewhere.
    logging.raiseExceptions = False
    root.setLevel(logging.INFO if folder.writes else logging.WARNING)
    try:
        with logging_redirect_tqdm():
            yield
    finally:
        root.handlers = handlers_before
        root.setLevel(level_before)
        logging.raiseExceptions = True
        for handler in handlers:
            with suppress(OSError):
                handler.close()
