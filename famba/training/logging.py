"""Write a run's metrics to files and services, and its lines to the terminal and train.log."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
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
from famba.training.records import METRICS, SWEEP, duration, first_epoch
from famba.training.run_folder import RunFolder

FILE_ONLY = {"file_only": True}
"""Mark a line that is for train.log alone, as `extra` of a logging call."""
_log = logging.getLogger(__name__)
T = TypeVar("T")
_BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps [{elapsed}, {rate_fmt}{postfix}]"
_SOON_S = 4.0  # after the first batch, for the line with the time left
_SLOW_S = 2.0  # a step that is worth a word


class WandbLogger:
    """Log to Weights & Biases. A run that continues keeps its id; runs of a sweep are one group."""

    def __init__(self, folder: RunFolder, logger: LoggerConfig, config: dict[str, Any]) -> None:
        import wandb

        run_id = folder.path / "wandb_id.txt"
        if not run_id.is_file():
            write_whole(run_id, lambda file: Path(file).write_text(uuid.uuid4().hex))
        above = folder.path.resolve().parent
        sweep = above.name if (above / SWEEP).is_file() else None
        # Neither the checkout's remote, whose address may hold a token, nor the machine's names.
        private = wandb.Settings(silent=True, host="", disable_git=True, disable_code=True, x_disable_meta=True)
        self._run = wandb.init(
            id=run_id.read_text().strip(),
            name=folder.path.name,
            dir=folder.path,
            project=logger.project,
            entity=logger.entity,
            group=logger.group or sweep,
            mode=logger.mode,
            resume="allow" if logger.mode == "online" else None,
            config=config,
            settings=private,
        )

    def log(self, kind: str, step: int, values: dict[str, Any]) -> None:
        self._run.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def finish(self, summary: dict[str, Any]) -> None:
        self._run.summary.update(summary)
        self._run.finish()


class TensorBoardLogger:
    """Write event files to the run folder's tensorboard/; steps that are done again replace the earlier ones."""

    def __init__(self, folder: RunFolder, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder.path / "tensorboard"), purge_step=step + 1)

    def log(self, kind: str, step: int, values: dict[str, Any]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{kind}/{name}", value, step)

    def finish(self, summary: dict[str, Any]) -> None:
        self._writer.close()


class Metrics:
    """Log to metrics.jsonl, whose failure ends the run, and to the configured logger, whose failure does not.

    Of several processes the main one alone logs. Raises CheckpointError if the disk refuses.
    """

    def __init__(self, folder: RunFolder, logger: LoggerConfig, config: dict[str, Any], step: int) -> None:
        self._path, self._name = folder.path / METRICS, logger.name
        self._more: WandbLogger | TensorBoardLogger | None = None
        self._file: io.FileIO | None = None
        if folder.writes:
            self._first_epoch = first_epoch(self._path)
            self._file = io.FileIO(self._path, "ab")
            if logger.name == "wandb":
                self._more = self._attempt("start", lambda: WandbLogger(folder, logger, config))
            elif logger.name == "tensorboard":
                self._more = self._attempt("start", lambda: TensorBoardLogger(folder, step))

    def log(self, kind: str, step: int, epoch: int, values: dict[str, Any]) -> None:
        """Log values after `step` steps, in `epoch` from 0; kind is "train", "epoch" or "schedule"."""
        if self._file is None:
            return
        place = {"kind": kind, "step": step, "epoch": epoch + self._first_epoch}
        line = json.dumps({**place, **values}).encode() + b"\n"
        with self._refused():
            while line:
                line = line[self._file.write(line) :]
        if (more := self._more) is not None:
            self._attempt("log", lambda: more.log(kind, step, values))

    def sync(self) -> None:
        """Wait until what was logged is on the disk."""
        if self._file is not None:
            with self._refused():
                os.fsync(self._file)

    def finish(self, summary: dict[str, Any]) -> None:
        """Close the files, and hand the summary to the logger."""
        if (more := self._more) is not None:
            self._attempt("finish", lambda: more.finish(summary))
        self.sync()
        if self._file is not None:
            self._file.close()
        self._file = self._more = None

    @contextmanager
    def _refused(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(f"cannot write {self._path}: {error}") from error

    def _attempt(self, verb: str, call: Callable[[], T]) -> T | None:
        """Call, and return the result; if that fails, warn and log no more."""
        try:
            return call()
        except Exception as error:  # of a logger's library: training is worth more than its log
            _log.warning("%s failed to %s (%s); the run continues, see its metrics.jsonl", self._name, verb, error)
            self._more = None
            return None


class Progress:
    """Show steps, loss and time left by a bar on a terminal; within ten seconds of the first batch in a line too.

    left estimates the seconds to the end of the run, None while it cannot.
    """

    def __init__(self, total_steps: int, step: int, shown: bool, left: Callable[[], float | None]) -> None:
        hidden = None if shown else True  # None: shown on a terminal alone
        self._bar = tqdm(total=total_steps, initial=step, disable=hidden, bar_format=_BAR, dynamic_ncols=True)
        self._total, self._left, self._loss, self._said = total_steps, left, "", not shown
        self._first = self._began = self._took = 0.0  # the first batch, the running step; seconds of the one before

    def watched(self, batches: Iterator[T]) -> Iterator[T]:
        """Yield the batches of an epoch."""
        self._began = time.monotonic()
        for batch in batches:
            if not self._first:
                self._first = self._began = time.monotonic()
                _log.info("the first step begins; kernels may be compiled in it")
            yield batch

    def step(self, step: int, epoch: int, loss: float | None) -> None:
        """Count a step that ended, in an epoch counted from 0; loss: None where it was not looked at."""
        now = time.monotonic()
        self._took, self._began = now - self._began, now
        self._loss = self._loss if loss is None else f", loss {loss:.3f}"
        left = self._left()
        ends = "" if left is None else f", about {duration(left)} left with evaluation"
        self._bar.set_postfix_str(f"epoch {epoch + 1}{self._loss}{ends}", refresh=False)
        self._bar.update(step - self._bar.n)
        if not self._said and left is not None and (now - self._first > _SOON_S or self._took > _SLOW_S):
            self._said = True
            _log.info("step %d of %d%s%s", step, self._total, self._loss, ends)

    def running(self) -> str:
        """Say how long the running step has taken, where steps take long."""
        running = time.monotonic() - self._began
        if not self._first or max(running, self._took) < _SLOW_S:
            return ""
        usual = f"; the one before took {duration(self._took)}" if self._took else ""
        return f", which has been running for {duration(running)}{usual}"

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()


def top1_text(images: str, values: Mapping[str, Any], prefix: str = "") -> str:
    """Say Top-1 on the "test" or "validation" images, by the last weights and by averaged and selected ones."""
    text = f"{images} Top-1 {values[f'{prefix}top1']:.2f} % by the last weights"
    if values.get(f"{prefix}ema_top1") is not None:
        text += f", {values[f'{prefix}ema_top1']:.2f} % by their average (EMA)"
    selected = values.get("selected") or {}
    if "top1" in selected:
        text += f", {selected['top1']:.2f} % by those of epoch {selected['epoch']}, which validation selected"
    return text


def epoch_line(epoch: int, epochs: int, images: str, values: Mapping[str, float]) -> str:
    """Describe an epoch, counted from 0: loss, Top-1 on the evaluated images, speed and time."""
    result = f", {top1_text(images, values, f'{images}_')}" if f"{images}_top1" in values else ""
    seconds = values["time_data_s"] + values["time_step_s"] + values.get("time_eval_s", 0.0)
    speed = f"{values['images_per_s']:.1f} images/s"
    return f"epoch {epoch + 1} of {epochs}: loss {values['train_loss']:.4f}{result}, {speed}, {duration(seconds)}"


def signed(value: float, digits: int = 2) -> str:
    """Write a number with its sign, and without one if it rounds to 0."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")


@contextmanager
def log_to(folder: RunFolder) -> Iterator[None]:
    """Send log lines to the terminal and to train.log; only warnings from processes other than the main one."""
    root, terminal = logging.getLogger(), logging.StreamHandler(sys.stdout)
    terminal.setFormatter(logging.Formatter("%(message)s"))
    terminal.addFilter(lambda record: not hasattr(record, "file_only"))
    handlers: list[logging.Handler] = [terminal]
    if folder.writes:
        handlers.append(logging.FileHandler(folder.path / "train.log"))
        handlers[-1].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for handler in handlers:
        handler.addFilter(lambda record: record.name.startswith("famba") or record.levelno >= logging.WARNING)
    before, root.handlers = (root.handlers, root.level), handlers
    logging.raiseExceptions = False  # if the disk is full, the error that ends the run is shown elsewhere
    root.setLevel(logging.INFO if folder.writes else logging.WARNING)
    try:
        with logging_redirect_tqdm():
            yield
    finally:
        root.handlers, logging.raiseExceptions = before[0], True
        root.setLevel(before[1])
        for handler in handlers:
            with suppress(OSError):
                handler.close()
