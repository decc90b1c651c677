"""`python train.py`: a command line in, a run folder out."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from tqdm.contrib.logging import logging_redirect_tqdm

from famba import ops
from famba.errors import ConfigError, FambaError, TrainingError
from famba.ops.registry import AUTO, explain
from famba.training import slurm
from famba.training.checks import check_files
from famba.training.compose import Command, config_dir
from famba.training.config import RunConfig, flatten, plain
from famba.training.distributed import Process, start_process, world_size
from famba.training.estimate import Alike, estimate
from famba.training.help import help_text
from famba.training.interrupts import Interrupted, StopRequest
from famba.training.loop import Training
from famba.training.reporting import duration
from famba.training.resuming import as_begun
from famba.training.run_folder import RunFolder, finished
from famba.training.setup import Setup, prepare
from famba.training.sweeps import Sweep

_log = logging.getLogger(__name__)
_STALLED_STARTS = 3
_FILE_ONLY = {"file_only": True}  # the terminal gets the error from the command itself
# Hydra answers these itself.
_QUESTIONS = ("hydra_help", "cfg", "info", "shell_completion")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns the exit status: 0, 1 for a defect, 2 for what the user can mend, 128 + n where signal n stopped it.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if {"--help", "-h"} & set(arguments):
            print(help_text(), end="")
        elif any(getattr(get_args_parser().parse_args(arguments), name) for name in _QUESTIONS):
            _answer(arguments)
        elif (command := Command.parse(arguments)).multirun:
            sweep, alike = plan(command)
            print(estimate(alike), end="", flush=True)
            sweep.launch(train)
        else:
            train(command.config())
    except FambaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(str(stop) or "interrupted", file=sys.stderr)
        return 128 + stop.signal if isinstance(stop, Interrupted) else 130
    return 0


def plan(command: Command) -> tuple[Sweep, list[Alike]]:
    """Return a sweep whose runs are all checked, and these as far as they are not alike but for their seeds.

    Raises FambaError for the first that cannot work, with what is allowed; no folder is made.
    """
    if world_size() > 1:
        raise ConfigError("-m does not go with torchrun; sweep without it, or start one run at a time")
    sweep = Sweep(command)
    found: dict[str, Alike] = {}
    for run in sweep.runs.values():
        config, processes = sweep.launcher.check(replace(run.config, seed=0, run_dir=str(sweep.folder)))
        alike = found.get(repr(config)) or Alike(config, prepare(config, processes), 0)
        found[repr(config)] = replace(alike, runs=alike.runs + 1)
    return sweep, list(found.values())


def _answer(question: list[str]) -> None:
    # Errors come back whole; Hydra would print them cut.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv[1:] = question
    try:
        hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="config")(lambda values: None)()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(str(error)) from error


def train(config: RunConfig, run_dir: Path | None = None) -> dict[str, Any]:
    """Train as configured in `run_dir`, or where None in the configuration's own; return the summary.

    Raises Interrupted where the run was asked to stop and has saved itself; after a notice of Slurm's it is back in the
    queue by then.
    """
    with StopRequest() as stop:
        check_files(config)  # which tell where the run was begun
        # Before the processes join, and so before any of them writes to the folder.
        asked, config = config, as_begun(config, run_dir or Path(config.run_dir))
        setup = prepare(config)
        process = start_process(setup.device)
        try:
            folder = RunFolder(Path(process.from_main(str(run_dir or config.run_dir))), writes=process.is_main)
            with folder, _logging(folder), logging_redirect_tqdm():
                _tell_what_stays(asked, config)
                summary = _train_in(folder, config, setup, process, stop)
            process.wait_for_all()
        except Interrupted:
            process.part()
            raise
        except Exception as error:
            failure = process.first_failure(error)
            raise failure from (None if failure is error else error)
    process.part()
    return summary


def _tell_what_stays(asked: RunConfig, config: RunConfig) -> None:
    """Log the keys that are as they were in the version that began the run."""
    now, then = flatten(plain(asked)), flatten(plain(config))
    if kept := [f"{key}={value}" for key, value in then.items() if value != now[key]]:
        _log.info("this run goes on as an earlier version of Famba began it: %s", ", ".join(kept))


def _train_in(
    folder: RunFolder, config: RunConfig, setup: Setup, process: Process, stop: StopRequest
) -> dict[str, Any]:
    done = process.from_main(finished(folder, config) if process.is_main else None)
    if done is not None:
        _log.info("%s is finished already (Top-1 %.2f %%)", folder.path, done["top1"])
        return done
    known = folder.summary
    training = None
    try:
        with nullcontext() if config.ops.backend == AUTO else ops.use_backend(config.ops.backend):
            _announce(config, setup, folder)
            training = Training(config, setup, folder, process, stop)
            summary = training.run()
    except Interrupted as stopped:
        assert training is not None
        _leave(training, stopped, (known or {}).get("stalled_starts", 0))
        raise
    except Exception as error:
        reason = str(process.first_failure(error))
        # A start that is refused leaves the summary of the run that is there as it was.
        if training is not None or known is None:
            failed = _record_failure(folder.path, config, reason)
            if training is not None:
                training.metrics.finish(failed)
        _log.error("%s", reason, extra=_FILE_ONLY)
        raise
    took = duration(summary["train_time_s"])
    results = summary["top1"], summary["top5"]
    _log.info("finished: Top-1 %.2f %%, Top-5 %.2f %%, trained in %s; all of it in %s", *results, took, folder.path)
    return summary


def _leave(training: Training, stopped: Interrupted, stalled: int) -> None:
    """Go back to Slurm's queue where it gave notice, and close the loggers.

    stalled: starts before this one, in a row, that came to their end without a step or an evaluation.
    """
    _log.info("%s", stopped, extra=_FILE_ONLY)
    goes_on = stopped.on_notice and slurm.in_job()
    summary = training.summary("interrupted")
    if goes_on and not training.has_progressed:
        stalled += 1
        training.folder.write_summary({**summary, "stalled_starts": stalled})
        if stalled >= _STALLED_STARTS:
            raise TrainingError(
                f"{stopped.args[0]}. It is not requeued: {stalled} starts in a row were stopped before a step or an "
                "evaluation was done; raise the job's time limit"
            )
    if goes_on and training.process.is_main:
        slurm.requeue()
        _log.info("back in Slurm's queue")
    training.metrics.finish(summary)
    if goes_on:
        training.folder.release()
        slurm.wait_for_the_end(training.stop)
    # Whoever started the processes may end all of them as soon as one ends.
    training.process.wait_for_all()


def _record_failure(path: Path, config: RunConfig, reason: str) -> dict[str, Any]:
    """Write that the run failed and why into its summary; return that."""
    # By any process: the main one may be killed before it can, by what started them.
    folder = RunFolder(path, writes=True)
    failed: dict[str, Any] = {"model": config.model.name, "strategy": config.fusion.strategy}
    with suppress(FambaError):
        failed = folder.summary or failed
    failed = {**failed, "status": "failed", "error": reason}
    with suppress(FambaError):
        folder.write_summary(failed)
    return failed


def _announce(config: RunConfig, setup: Setup, folder: RunFolder) -> None:
    matched = "" if setup.matched else " (counts per layer as given, their total is not matched between strategies)"
    size, removed, left = setup.image_size, sum(setup.schedule), setup.tokens - sum(setup.schedule)
    precision = "float32" if setup.autocast is None else f"{str(setup.autocast).removeprefix('torch.')} autocast"
    network = f"{config.model.name} at {size} x {size}, fusion {config.fusion.strategy}"
    _log.info("run folder: %s", folder.path)
    _log.info(
        "%s: %d tokens, %d removed, %d left after the last layer%s", network, setup.tokens, removed, left, matched
    )
    _log.info("device %s, %s, ops by %s", setup.device, precision, explain(setup.device.type, setup.dtype))


@contextmanager
def _logging(folder: RunFolder) -> Iterator[None]:
    """Send log lines to the terminal and to train.log; warnings alone from other processes than the main one."""
    root = logging.getLogger()
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    handlers[0].setFormatter(logging.Formatter("%(message)s"))
    handlers[0].addFilter(lambda record: not hasattr(record, "file_only"))
    if folder.writes:
        file = logging.FileHandler(folder.path / "train.log")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        handlers.append(file)
    handlers_before, level_before = root.handlers, root.level
    for handler in handlers:
        handler.addFilter(_ours_or_warning)
    root.handlers = handlers
    # A full disk cuts the log short without a word: the error that ends the run is told elsewhere.
    logging.raiseExceptions = False
    # Not by the attribute: loggers remember what they were allowed before.
    root.setLevel(logging.INFO if folder.writes else logging.WARNING)
    try:
        yield
    finally:
        root.handlers = handlers_before
        root.setLevel(level_before)
        logging.raiseExceptions = True
        for handler in handlers:
            with suppress(OSError):
                handler.close()


def _ours_or_warning(record: logging.LogRecord) -> bool:
    return record.name.startswith("famba") or record.levelno >= logging.WARNING
