"""Tell how far the runs in some folders are: `famba status`. Only reads, also while the runs go on."""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import which
from typing import Any

import yaml
from tabulate import tabulate

from famba.errors import DataError, FambaError
from famba.training.records import METRICS, duration, queue, recorded, remembered
from famba.training.summary import SUMMARY, Summary

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_COLUMNS = ("run", "state", "epoch", "done", "Top-1 %", "time left", "updated")
# Files that a run leaves behind even if it has no summary yet, or has lost it.
_TRACES = (METRICS, "train.log")
_FILES = (SUMMARY, "config.yaml", *_TRACES, "output.log")
_TAIL = 1 << 16  # bytes at the end of metrics.jsonl that are read
_ORDER = ("finished", "running", "waiting", "interrupted", "stopped", "failed", "damaged", "not started")
_TOLD = 8  # folders that an error lists
_GIVE = "give the run_dir of a run or of a sweep, or a folder that holds some"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `famba status`."""
    parser.description = "Show how far runs are, in a table of all in some folders, and the count of each state."
    parser.add_argument("runs", nargs="+", metavar="FOLDER", help="runs, sweeps, or folders that hold some")
    parser.add_argument("--json", action="store_true", help="print a list of JSON objects instead")


def run(options: argparse.Namespace) -> int:
    """Print the status of all runs."""
    found = status(options.runs)
    print(json.dumps([asdict(run) for run in found], indent=2) if options.json else status_table(found))
    return 0


@dataclass(frozen=True)
class Status:
    """Describe how far one run is. None stands for what is not known; updated is in seconds since 1970.

    state: not started, waiting (in Slurm), running, interrupted (it saved itself), stopped (it ended without a word),
    failed, finished, or damaged where the summary cannot be read. note: the error of a failed or damaged run.
    top1: percent of the images that top1_of names, test or validation.
    """

    run: str
    folder: str
    state: str
    epoch: int | None
    epochs: int | None
    step: int | None
    steps: int | None
    top1: float | None
    top1_of: str | None
    seconds_left: float | None
    updated: float | None
    note: str | None


def status(paths: Iterable[str | Path]) -> list[Status]:
    """Look at all runs in or below some folders. Raises DataError for a path that holds none."""
    found: dict[Path, str] = {}
    for path in map(Path, paths):
        folders = list(_runs_in(path))
        if not folders:
            raise DataError(f"no run in {path}{_why_none(path)}")
        found |= {folder: str(folder) if folder == path else str(folder.relative_to(path)) for folder in folders}
    queued = _queued({folder.parent for folder in found})
    return [_look(folder, name, queued.get(folder)) for folder, name in found.items()]


def _why_none(path: Path) -> str:
    """Say why a path holds no run, and what to give instead."""
    if path.is_dir():
        return f"; {_GIVE}"
    if path.exists():
        return f": it is a file; give the folder of a run, or one that holds some: {path.parent}, perhaps"
    there = next((parent for parent in path.absolute().parents if parent.is_dir()), path)
    names: list[str] = []
    with suppress(OSError):
        names = sorted(entry.name for entry in there.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    listed = f"the folders {', '.join(names[:_TOLD])}{', ...' * (len(names) > _TOLD)}" if names else "no folder"
    return f": it is not there; {there} holds {listed}; {_GIVE}"


def _runs_in(path: Path) -> Iterator[Path]:
    """Yield the folders of runs in or below a folder, with those that a sweep has yet to make."""
    if _is_run(path):
        yield path
        return
    known = [path / run["folder"] for run in recorded(path)]
    yield from known
    with suppress(OSError):
        for entry in sorted(entry for entry in path.iterdir() if entry.is_dir() and entry not in known):
            # A link may lead back up, so only a link to a run itself is followed.
            if not entry.is_symlink():
                yield from _runs_in(entry)
            elif _is_run(entry):
                yield entry


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in _FILES)


def _queued(sweeps: Iterable[Path]) -> dict[Path, str]:
    """Return the state in Slurm of the runs that were submitted; nothing where Slurm cannot be asked."""
    jobs = {sweep / name: job for sweep in sweeps for name, job in remembered(sweep / "slurm").items()}
    states: dict[str, str] = {}
    if jobs and which("squeue") is not None:
        with suppress(FambaError):
            states = queue()
    return {folder: states[job] for folder, job in jobs.items() if job in states}


def _look(folder: Path, name: str, queued: str | None) -> Status:
    path, said, damage = folder / SUMMARY, Summary(status=""), None
    try:
        said = Summary.parse(path.read_bytes())
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        damage = f"{path} is damaged: {error}"
    last, ended = _last_lines(folder / METRICS)
    state = "damaged" if damage else _state(folder, said.status, queued)
    step, epoch = _number(last, "step"), _number(last, "epoch")
    known = {"test": said.top1}
    if said.status != "finished":
        logged = {of: _number(ended, f"{of}_top1") for of in ("test", "validation")}
        known = {of: top1 for of, top1 in [*logged.items(), *known.items()] if top1 is not None}
    top1_of, top1 = next(iter(known.items()), (None, None))
    # A run that was stopped has saved steps that it has not logged.
    step = max((int(known) for known in (said.step, step) if known is not None), default=None)
    return Status(
        run=name,
        folder=str(folder),
        state=state,
        epoch=said.epoch if epoch is None else int(epoch) + (last["kind"] == "epoch"),
        epochs=said.epochs,
        step=step,
        steps=said.steps,
        top1=top1,
        top1_of=top1_of if top1 is not None else None,
        seconds_left=_seconds_left(folder, last, ended, step, said.steps) if state == "running" else None,
        updated=max((path.stat().st_mtime for name in _FILES if (path := folder / name).exists()), default=None),
        note=damage or (said.error if state == "failed" else None),
    )


def _state(folder: Path, said: str, queued: str | None) -> str:
    if said == "finished":
        return "finished"
    if _held(folder / ".lock"):
        return "running"
    if queued is not None:
        return "running" if queued == "RUNNING" else "waiting"
    if not said:
        return "stopped" if any((folder / name).is_file() for name in _TRACES) else "not started"
    return "stopped" if said == "running" else said


def _held(lock: Path) -> bool:
    """Return whether a process holds a run's lock, as famba.training.run_folder takes it."""
    try:
        with open(lock, "rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # held, no such file, or no locks on this file system
        return isinstance(error, BlockingIOError)
    return False


def _last_lines(metrics: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the last line of metrics.jsonl, and the last with an evaluation; {} where there is none."""
    lines: list[bytes] = []
    with suppress(OSError), open(metrics, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
        lines = file.read().splitlines()
    logged = [values for line in reversed(lines) if (values := parse_line(line))]
    ended = (values for values in logged if any(name in values for name in ("test_top1", "validation_top1")))
    return logged[0] if logged else {}, next(ended, {})


def parse_line(line: str | bytes) -> dict[str, Any] | None:
    """Return a line of metrics.jsonl; None for one that is damaged, or being written."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    return values if isinstance(values, dict) and "kind" in values else None


def _seconds_left(
    folder: Path, last: Mapping[str, Any], ended: Mapping[str, Any], step: int | None, steps: int | None
) -> float | None:
    """Return the time of the steps and evaluations that are left, at the speed of the current epoch."""
    speed = _number(last, "images_per_s")
    if not speed or not step or steps is None:
        return None
    try:
        trainer = yaml.load((folder / "config.yaml").read_text(), LOADER)["trainer"]  # noqa: S506 - a safe one
        batch, every = int(trainer["batch_size"]), int(trainer["eval_every"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return None
    left, epoch, ended_at = max(0, steps - step), _number(ended, "epoch"), _number(ended, "step")
    evaluations = left / (ended_at / (epoch + 1)) / every if epoch is not None and ended_at else 0.0
    return left * batch / speed + evaluations * (_number(ended, "time_eval_s") or 0.0)


def _number(values: Mapping[str, Any], key: str) -> float | None:
    """Return a finite number; None for anything else, such as a whole number that no float holds."""
    try:
        value = float(values[key])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return value if math.isfinite(value) else None


def status_table(runs: Sequence[Status]) -> str:
    """Return a table of runs, the errors of failed and damaged ones, and the count of each state."""
    rows = [
        [
            run.run,
            run.state,
            None if run.epoch is None else f"{run.epoch} of {'?' if run.epochs is None else run.epochs}",
            None if not run.steps or run.step is None else f"{100 * run.step / run.steps:.0f} %",
            None if run.top1 is None else f"{run.top1:.2f}{' val' if run.top1_of == 'validation' else ''}",
            None if run.seconds_left is None else duration(run.seconds_left),
            None if run.updated is None else f"{duration(max(0.0, time.time() - run.updated))} ago",
        ]
        for run in runs
    ]
    notes = [f"{run.run}: {run.note}" for run in runs if run.note]
    counts = Counter(run.state for run in runs)
    listed = ", ".join(f"{counts[state]} {state}" for state in _ORDER if counts[state])
    table = tabulate(rows, headers=_COLUMNS, missingval="-", disable_numparse=True)
    total = f"{len(runs)} run{'s' if len(runs) != 1 else ''}: {listed}"
    return "\n".join([table, "", *notes, *([""] if notes else []), total])
