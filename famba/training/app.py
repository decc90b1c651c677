"""`python train.py`: Hydra in, a run folder out."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tqdm.contrib.logging import logging_redirect_tqdm

from famba import ops
from famba.errors import ConfigError, FambaError, TrainingError
from famba.ops.registry import AUTO, explain
from famba.training import slurm
from famba.training.compose import check_command, compose, config_dir, is_question, name_by_sweep
from famba.training.config import RunConfig, flatten, parse, plain
from famba.training.distributed import Process, part, start_process, world_size
from famba.training.estimate import estimate
from famba.training.help import help_text
from famba.training.interrupts import Interrupted, StopRequest
from famba.training.loop import Training
from famba.training.reporting import duration
from famba.training.resuming import as_begun
from famba.training.run_folder import RunFolder, finished
from famba.training.setup import Setup, prepare
from famba.training.watch import Watch

_log = logging.getLogger(__name__)
_STALLED_STARTS = 3
_FILE_ONLY = {"file_only": True}  # the terminal gets the error from the command itself


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns the exit status: 0, 1 for a defect, 2 for what the user can mend, 128 + n where signal n stopped it.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Errors come back here whole; Hydra would print them cut.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        if {"--help", "-h"} & set(arguments):
            print(help_text(), end="")
        elif is_question(arguments):
            _answer(arguments)
        else:
            together = world_size() > 1 and not {"-m", "--multirun"} & set(arguments)
            if together:
                # Checked once the processes have joined, so that all hear of one that cannot take part.
                train(compose(arguments), None)
            else:
                if asked := check_command(arguments):
                    print(estimate(asked), end="", flush=True)
                _hydra_main([*arguments, name_by_sweep(arguments)])
    except FambaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signal
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def train(config: RunConfig, run_dir: Path | None) -> dict[str, Any]:
    """Train as configured in `run_dir`, or where None in the configuration's own; return the summary.

    Raises Interrupted where the run was asked to stop and has saved itself; after a notice of Slurm's it is back in the
    queue by then.
    """
    with StopRequest() as stop, Watch() as watch:
        try:
            # Before the processes join, and so before any of them writes to the folder.
            asked, config = config, as_begun(config, run_dir or Path(config.run_dir))
            setup = prepare(config)
            process = start_process(setup.device)
            path = process.from_main(str(run_dir or config.run_dir))
            with _claimed(Path(path), process) as folder, _logging(folder), logging_redirect_tqdm():
                watch.before_exit = lambda reason: _record_failure(folder, config, reason)
                _tell_what_stays(asked, config)
                summary = _train_in(folder, config, setup, process, stop, watch)
            process.wait_for_all()
        except Interrupted:
            part(process)
            raise
        except Exception as error:
            failure = watch.explained(error)
            if failure is error:
                raise
            raise failure from error
    part(process)
    return summary


def _tell_what_stays(asked: RunConfig, config: RunConfig) -> None:
    """Log the keys that are as they were in the version that began the run."""
    now, then = flatten(plain(asked)), flatten(plain(config))
    if kept := [f"{key}={value}" for key, value in then.items() if value != now[key]]:
        _log.info("this run goes on as an earlier version of Famba began it: %s", ", ".join(kept))


def _train_in(
    folder: RunFolder, config: RunConfig, setup: Setup, process: Process, stop: StopRequest, watch: Watch
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
        reason = str(watch.explained(error))
        # A start that is refused leaves the summary of the run that is there as it was.
        if training is not None or known is None:
            failed = _record_failure(folder, config, reason)
            if training is not None:
                training.metrics.finish(failed)
        _log.error("%s", reason, extra=_FILE_ONLY)
        raise
    _log.info(
        "finished: Top-1 %.2f %%, Top-5 %.2f %%, trained in %s; all of it in %s",
        summary["top1"],
        summary["top5"],
        duration(summary["train_time_s"]),
        folder.path,
    )
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


def _record_failure(folder: RunFolder, config: RunConfig, reason: str) -> dict[str, Any]:
    """Write that the run failed and why into its summary; return that."""
    failed: dict[str, Any] = {"model": config.model.name, "strategy": config.fusion.strategy}
    with suppress(FambaError):
        failed = folder.summary or failed
    failed = {**failed, "status": "failed", "error": reason}
    with suppress(FambaError):
        folder.write_summary(failed)
    return failed


def _announce(config: RunConfig, setup: Setup, folder: RunFolder) -> None:
    matched = "" if setup.matched else " (counts per layer as given, their total is not matched between strategies)"
    _log.info("run folder: %s", folder.path)
    _log.info(
        "%s at %d x %d, fusion %s: %d tokens, %d removed, %d left after the last layer%s",
        config.model.name,
        setup.image_size,
        setup.image_size,
        config.fusion.strategy,
        setup.tokens,
        sum(setup.schedule),
        setup.tokens - sum(setup.schedule),
        matched,
    )
    precision = "float32" if setup.autocast is None else f"{str(setup.autocast).removeprefix('torch.')} autocast"
    _log.info("device %s, %s, ops by %s", setup.device, precision, explain(setup.device.type, setup.dtype))


@contextmanager
def _claimed(path: Path, process: Process) -> Iterator[RunFolder]:
    folder = RunFolder(path, writes=process.is_main)
    folder.claim()
    try:
        yield folder
    finally:
        folder.release()


@contextmanager
def _logging(folder: RunFolder) -> Iterator[None]:
    """Send log lines to the terminal and to train.log; warnings alone from other processes than the main one."""
    root = logging.getLogger()
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    handlers[0].setFormatter(logging.Formatter("%(message)s"))
    handlers[0].addFilter(lambda record: not hasattr(record, "file_only"))
    if folder.writes:
        file = _LogFile(folder.path / "train.log")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        handlers.append(file)
    handlers_before, level_before = root.handlers, root.level
    for handler in handlers:
        handler.addFilter(_ours_or_warning)
    root.handlers = handlers
    # Not by the attribute: loggers remember what they were allowed before.
    root.setLevel(logging.INFO if folder.writes else logging.WARNING)
    try:
        yield
    finally:
        root.handlers = handlers_before
        root.setLevel(level_before)
        for handler in handlers:
            handler.close()


class _LogFile(logging.FileHandler):
    """A log that a full disk cuts short without a word: the error that ends the run is told elsewhere."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Let the line go."""

    def close(self) -> None:
        """Close the file; what it could not take is let go."""
        with suppress(OSError):
            super().close()


def _ours_or_warning(record: logging.LogRecord) -> bool:
    return record.name.startswith("famba") or record.levelno >= logging.WARNING


def _task(values: DictConfig) -> float:
    summary = train(parse(OmegaConf.to_container(values, resolve=True)), Path(HydraConfig.get().runtime.output_dir))  # type: ignore[arg-type]
    return summary["top1"]


def _answer(question: list[str]) -> None:
    try:
        _hydra_main(question)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(str(error)) from error


def _hydra_main(arguments: list[str]) -> None:
    """Let Hydra compose the configuration and do the run, or the runs of a sweep. Raises what the run raised."""
    errors: list[Exception] = []

    def task(values: DictConfig) -> float | None:
        try:
            return _task(values)
        except Exception as error:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                raise  # the sweep goes on with its other runs
            errors.append(error)  # Hydra would print a line of its own above it
            return None

    sys.argv[1:] = arguments
    hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="config")(task)()
    if errors:
        raise errors[0]
