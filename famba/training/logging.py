"""Write a run's metrics to files and services, and its lines to the terminal and train.log."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from famba.errors import CheckpointError
from famba.files import write_whole
from famba.training.config import LoggerConfig
from famba.training.records import METRICS, SWEEP, duration, first_epoch
from famba.training.run_folder import RunFolder

FILE_ONLY = {"file_only": True}  # as `extra` of a logging call: the line is for train.log alone
_log = logging.getLogger(__name__)
T = TypeVar("T")
# Of a logger: what takes values and their step, and what takes the summary at the end.
Sinks = tuple[Callable[[dict[str, Any], int], object], Callable[[dict[str, Any]], object]]
_BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps [{elapsed}, {rate_fmt}{postfix}]"
_SOON_S = 4.0  # after the first batch, for the line with the time left


def _wandb(folder: Path, logger: LoggerConfig, config: dict[str, Any]) -> Sinks:
    """Begin to log to Weights & Biases. A run that continues keeps its id; runs of a sweep are one group."""
    import wandb

    run_id = folder / "wandb_id.txt"
    if not run_id.is_file():
        write_whole(run_id, lambda file: Path(file).write_text(uuid.uuid4().hex))
    sweep = folder.resolve().parent
    run = wandb.init(
        id=run_id.read_text().strip(),
        name=folder.name,
        dir=folder,
        project=logger.project,
        entity=logger.entity,
        group=logger.group or (sweep.name if (sweep / SWEEP).is_file() else None),
        mode=logger.mode,
        resume="allow" if logger.mode == "online" else None,
        config=config,
        # Neither the checkout's remote, whose address may hold a token, nor the machine's names.
        settings=wandb.Settings(silent=True, host="", disable_git=True, disable_code=True, x_disable_meta=True),
    )

    def finish(summary: dict[str, Any]) -> None:
        run.summary.update(summary)
        run.finish()

    return lambda values, step: run.log(values, step=step), finish


def _tensorboard(folder: Path, step: int) -> Sinks:
    """Begin to write event files to the run folder's tensorboard/; steps that are done again replace earlier ones."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def log(values: dict[str, Any], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return log, lambda summary: writer.close()


class Metrics:
    """Log to metrics.jsonl, whose failure ends the run, and to the configured logger, whose failure does not.

    Of several processes the main one alone logs. Raises CheckpointError if the disk refuses.
    """

    def __init__(self, folder: RunFolder, logger: LoggerConfig, config: dict[str, Any], step: int) -> None:
        self._path, self._name, self._writes = folder.path / METRICS, logger.name, folder.writes
        self._first_epoch = first_epoch(self._path)
        self._more: Sinks | None = None
        if folder.writes and logger.name == "wandb":
            self._more = self._attempt("start", lambda: _wandb(folder.path, logger, config))
        elif folder.writes and logger.name == "tensorboard":
            self._more = self._attempt("start", lambda: _tensorboard(folder.path, step))

    def log(self, kind: str, step: int, epoch: int, values: dict[str, Any]) -> None:
        """Log values after `step` steps, in `epoch` from 0; kind is "train", "epoch" or "schedule"."""
        if not self._writes:
            return
        place = {"kind": kind, "step": step, "epoch": epoch + self._first_epoch}
        with self._opened() as file:
            file.write(json.dumps({**place, **values}).encode() + b"\n")
        if self._more is not None:
            log, named = self._more[0], {f"{kind}/{name}": value for name, value in values.items()}
            self._attempt("log", lambda: log(named, step))

    def sync(self) -> None:
        """Wait until what was logged is on the disk."""
        if self._writes:
            with self._opened() as file:
                os.fsync(file)

    def finish(self, summary: dict[str, Any]) -> None:
        """Hand the summary to the logger, which logs no more."""
        if (more := self._more) is not None:
            self._attempt("finish", lambda: more[1](summary))
        self._more = None

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        try:
            with open(self._path, "ab") as file:
                yield file
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


class Progress(tqdm):
    """Show steps, loss and time left by a bar on a terminal; within ten seconds of the first batch in a line too.

    evaluation: about how much longer evaluations make the run, such as 1.1 times.
    """

    def __init__(self, total_steps: int, step: int, shown: bool, evaluation: float) -> None:
        hidden = None if shown else True  # None: shown on a terminal alone
        super().__init__(total=total_steps, initial=step, disable=hidden, bar_format=_BAR, dynamic_ncols=True)
        self._steps_of_run, self._evaluation, self._loss, self._said = total_steps, evaluation, "", not shown
        self._first = self._began = self._seconds = 0.0  # the first batch here, this step; of the steps after the first
        self._steps = -1  # after the first one, in which kernels may be compiled

    def watched(self, batches: Iterator[T]) -> Iterator[T]:
        """Yield the batches of an epoch."""
        self._began = time.monotonic()
        for batch in batches:
            if not self._first:
                self._first = time.monotonic()
                _log.info("the first step begins; kernels may be compiled in it")
            yield batch

    def step(self, step: int, epoch: int, loss: float | None) -> None:
        """Count a step that ended, in an epoch counted from 0; loss: None where it was not looked at."""
        now, self._steps = time.monotonic(), self._steps + 1
        self._seconds += now - self._began if self._steps else 0.0
        self._began = now
        self._loss = self._loss if loss is None else f", loss {loss:.3f}"
        left = self._seconds / max(1, self._steps) * (self._steps_of_run - step) * self._evaluation
        ends = f", about {duration(left)} left with evaluation" if self._steps else ""
        self.set_postfix_str(f"epoch {epoch + 1}{self._loss}{ends}", refresh=False)
        self.update(step - self.n)
        if not self._said and self._steps and now - self._first > _SOON_S:
            self._said = True
            _log.info("step %d of %d%s%s", step, self._steps_of_run, self._loss, ends)


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
    result += f", {values['images_per_s']:.1f} images/s, {duration(seconds)}"
    return f"epoch {epoch + 1} of {epochs}: loss {values['train_loss']:.4f}{result}"


def signed(value: float, digits: int = 2) -> str:
    """Write a number with its sign, and without one if it rounds to 0."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")


@contextmanager
def log_to(folder: RunFolder) -> Iterator[None]:
    """Send log lines to the terminal and to train.log; only warnings from processes other than the main one."""
    root, terminal = logging.getLogger(), logging.StreamHandler(sys.stdout)
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
        logging.raiseExceptions = True
        root.handlers, level = before
        root.setLevel(level)
        with suppress(OSError):
            handlers[-1].close()
