"""Run `python train.py`: a command line in, a run folder out."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from famba import ops
from famba.errors import ConfigError, FambaError
from famba.ops.registry import AUTO, explain
from famba.training import interrupts
from famba.training.compose import Command, help_text
from famba.training.config import RunConfig, flatten, plain
from famba.training.devices import has_bf16
from famba.training.distributed import Process, start_process, world_size
from famba.training.interrupts import Interrupted, StopRequest
from famba.training.logging import FILE_ONLY, log_to
from famba.training.records import duration
from famba.training.run_folder import RunFolder, as_begun, finished
from famba.training.setup import Setup, check_files, prepare
from famba.training.sweeps import Sweep
from famba.training.trainer import Training

_log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status, 2 for errors that the user can mend, 128 + n after signal n."""
    try:
        command = Command.parse(sys.argv[1:] if arguments is None else arguments)
        if command.question == "help":
            print(help_text(command.config_dir), end="")
        elif command.question is not None:
            print(yaml.safe_dump(plain(command.config()), sort_keys=False), end="")
        elif command.multirun:
            plan(command).launch(train)
        else:
            train(command.config())
    except FambaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(str(stop) or "interrupted", file=sys.stderr)
        return 128 + stop.signal if isinstance(stop, Interrupted) else 130
    return 0


def plan(command: Command) -> Sweep:
    """Return the sweep of a command line, with every run checked. Raises FambaError for the first that cannot work."""
    if world_size() > 1:
        raise ConfigError("-m does not go with torchrun; sweep without it, or start one run at a time")
    sweep = Sweep(command)
    checked: set[str] = set()
    for run in sweep.runs.values():
        config, processes = sweep.launcher.check(replace(run.config, seed=0, run_dir=str(sweep.folder)))
        if repr(config) not in checked:
            checked.add(repr(config))
            prepare(config, processes)
    return sweep


def train(config: RunConfig, run_dir: Path | None = None) -> dict[str, Any]:
    """Train as configured, in `run_dir` instead of the configuration's own if it is given; return the summary.

    Raises Interrupted if the run was asked to stop and has saved itself; after a notice of Slurm's it is back in the
    queue by then.
    """
    path = run_dir or Path(config.run_dir)
    with StopRequest() as stop:
        check_files(config)
        # Before the processes join, and so before any of them writes to the folder.
        asked, config = config, as_begun(config, path)
        setup = prepare(config)
        process = start_process(setup.device)
        try:
            folder = RunFolder(process.from_main(path), writes=process.is_main)
            with folder, log_to(folder):
                now, then = flatten(plain(asked)), flatten(plain(config))
                if kept := ", ".join(f"{key}={value}" for key, value in then.items() if value != now[key]):
                    _log.info("this run continues as an earlier version of Famba began it: %s", kept)
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


def _train_in(
    folder: RunFolder, config: RunConfig, setup: Setup, process: Process, stop: StopRequest
) -> dict[str, Any]:
    done = process.from_main(finished(folder, config) if process.is_main else None)
    if done is not None:
        _log.info("%s is finished already (Top-1 %.2f %%)", folder.path, done["top1"])
        return done
    is_new, training = folder.summary is None, None
    try:
        with nullcontext() if config.ops.backend == AUTO else ops.use_backend(config.ops.backend):
            _announce(config, setup, folder)
            training = Training(config, setup, folder, process, stop)
            summary = training.run()
    except Interrupted as stopped:
        assert training is not None
        _leave(training, stopped)
        raise
    except Exception as error:
        reason = str(process.first_failure(error))
        # A start that is refused leaves the summary of the run that is there as it was.
        if training is not None or is_new:
            with suppress(FambaError):
                failed = _record_failure(folder.path, config, reason)
                if training is not None:
                    training.metrics.finish(failed)
        _log.error("%s", reason, extra=FILE_ONLY)
        raise
    results, took = (summary["top1"], summary["top5"]), duration(summary["train_time_s"])
    _log.info("finished: Top-1 %.2f %%, Top-5 %.2f %%, trained in %s, in %s", *results, took, folder.path)
    return summary


def _announce(config: RunConfig, setup: Setup, folder: RunFolder) -> None:
    size, removed = setup.image_size, sum(setup.schedule)
    counts = f"{setup.tokens} tokens, {removed} removed, {setup.tokens - removed} left after the last layer"
    precision = str(setup.dtype).removeprefix("torch.")
    _log.info("run folder: %s", folder.path)
    _log.info("%s at %d x %d, fusion %s: %s", config.model.name, size, size, config.fusion.strategy, counts)
    _log.info("device %s, %s, ops by %s", setup.device, precision, explain(setup.device.type, setup.dtype))
    if setup.device.type == "cuda" and setup.autocast is None and has_bf16(setup.device):
        _log.info("trainer.precision=bf16 would be faster on this GPU, with other rounding")


def _leave(training: Training, stopped: Interrupted) -> None:
    """Close the loggers, and go back to Slurm's queue if it gave notice."""
    _log.info("%s", stopped, extra=FILE_ONLY)
    if stopped.goes_on and training.process.is_main:
        interrupts.requeue()
        _log.info("back in Slurm's queue")
    training.metrics.finish(training.summary("interrupted"))
    if stopped.goes_on:
        training.folder.release()
        interrupts.wait_for_the_end(training.stop)
    # Whoever started the processes may end all of them as soon as one ends.
    training.process.wait_for_all()


def _record_failure(path: Path, config: RunConfig, reason: str) -> dict[str, Any]:
    """Write the failure into the run's summary, by any process: the main one may be killed first; return that."""
    folder = RunFolder(path, writes=True)
    before = folder.summary or {"model": config.model.name, "strategy": config.fusion.strategy}
    failed = {**before, "status": "failed", "error": reason}
    folder.write_summary(failed)
    return failed
