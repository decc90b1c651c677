"""What goes on in run folders: how far each run is, and what became of it. Only reads, also while runs go on."""

from __future__ import annotations

import fcntl
import json
import os
import sys
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

from famba.analysis.folders import check_folder
from famba.errors import DataError, FambaError
from famba.training.reporting import duration
from famba.training.run_folder import METRICS
from famba.training.sweeps import queue, recorded, remembered

_COLUMNS = ("run", "state", "epoch", "done", "Top-1 %", "time left", "updated")
_FILES = ("summary.json", "config.yaml", METRICS, "train.log", "output.log")
_TAIL = 1 << 16
# What a run that has lost its summary, or has not written one yet, leaves behind.
_TRACES = (METRICS, "train.log")
_ORDER = ("finished", "running", "waiting", "interrupted", "stopped", "failed", "damaged", "not started")


@dataclass(frozen=True)
class Status:
    """One run. None stands for what is not known; updated is seconds since the epoch, note says more of the state.

    top1 is of the images that top1_of names: test, or validation.

    state: not started, waiting (in Slurm), running, interrupted (saved itself), stopped (ended without saying so),
    failed, finished, or damaged where its summary cannot be read.
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
        check_folder(path)
        folders = list(_runs_in(path))
        if not folders:
            raise DataError(f"no run in {path}; give the run_dir of a run or of a sweep, or a folder that holds some")
        found |= {folder: _name(folder, path) for folder in folders}
    queued = _queued({folder.parent for folder in found})
    return [_look(folder, name, queued.get(folder)) for folder, name in found.items()]


def status_table(runs: Sequence[Status]) -> str:
    """Return a table of runs, what there is to say of those in trouble, and the count of each state."""
    table = tabulate([_row(run) for run in runs], headers=_COLUMNS, missingval="-", disable_numparse=True)
    notes = [f"{run.run}: {run.note}" for run in runs if run.note]
    counts = Counter(run.state for run in runs)
    listed = ", ".join(f"{counts[state]} {state}" for state in _ORDER if counts[state])
    total = f"{len(runs)} run{'s' if len(runs) != 1 else ''}: {listed}"
    return "\n".join([table, "", *notes, *([""] if notes else []), total])


def status_json(runs: Sequence[Status]) -> str:
    """Return the same as a list of JSON objects."""
    return json.dumps([asdict(run) for run in runs], indent=2)


def _runs_in(path: Path) -> Iterator[Path]:
    """Folders of runs in or below a folder, and those that a sweep has yet to make."""
    if _is_run(path):
        yield path
        return
    known = [path / run["folder"] for run in recorded(path)]
    yield from known
    with suppress(OSError):
        # A link may lead back up; a sweep of links to runs is a sweep all the same.
        below = sorted(entry for entry in path.iterdir() if entry.is_dir() and entry not in known)
        for entry in below:
            if not entry.is_symlink():
                yield from _runs_in(entry)
            elif _is_run(entry):
                yield entry


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in _FILES)


def _name(folder: Path, given: Path) -> str:
    return str(folder) if folder == given else str(folder.relative_to(given))


def _queued(sweeps: Iterable[Path]) -> dict[Path, str]:
    """What Slurm does with the runs that were submitted; nothing where it cannot be asked."""
    jobs = {sweep / name: job for sweep in sweeps for name, job in remembered(sweep / "slurm").items()}
    if not jobs or which("squeue") is None:
        return {}
    try:
        states = queue()
    except FambaError:
        return {}
    return {folder: states[job] for folder, job in jobs.items() if job in states}


def _look(folder: Path, name: str, queued: str | None) -> Status:
    summary, damage = _summary(folder)
    last, ended = _last_lines(folder / METRICS)
    state = "damaged" if damage else _state(folder, summary, queued)
    step = _number(last, "step", int) or _number(summary, "step", int)
    steps = _number(summary, "steps", int)
    top1, top1_of = _top1(summary, ended)
    return Status(
        run=name,
        folder=str(folder),
        state=state,
        epoch=_epochs_done(last, summary),
        epochs=_number(summary, "epochs", int),
        step=step,
        steps=steps,
        top1=top1,
        top1_of=top1_of,
        seconds_left=_seconds_left(folder, last, ended, step, steps) if state == "running" else None,
        updated=_updated(folder),
        note=damage or (str(summary["error"]) if state == "failed" and summary.get("error") else None),
    )


def _summary(folder: Path) -> tuple[dict[str, Any], str | None]:
    path = folder / "summary.json"
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict) or not isinstance(found.get("status"), str):
            raise ValueError("it does not say a status")
    except FileNotFoundError:
        return {}, None
    except (OSError, ValueError) as error:
        return {}, f"{path} is damaged: {error}"
    return found, None


def _state(folder: Path, summary: Mapping[str, Any], queued: str | None) -> str:
    said = summary.get("status")
    if said == "finished":
        return "finished"
    if _held(folder / ".lock"):
        return "running"
    if queued is not None:
        return "running" if queued == "RUNNING" else "waiting"
    if said is None:
        return "stopped" if any((folder / name).is_file() for name in _TRACES) else "not started"
    return "stopped" if said == "running" else said


def _held(lock: Path) -> bool:
    """Whether a process holds a run's lock, as famba.training.run_folder takes it."""
    try:
        handle = os.open(lock, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no locks on this file system
        return False
    finally:
        os.close(handle)
    return False


def _last_lines(metrics: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the last line of metrics.jsonl, and the last with an evaluation; {} where there is none."""
    last: dict[str, Any] = {}
    for line in reversed(_tail(metrics)):
        try:
            logged = json.loads(line)
            evaluated = logged["kind"] == "epoch" and any(key in logged for key in ("test_top1", "validation_top1"))
        except (ValueError, KeyError, TypeError):  # a line that is being written, or damaged
            continue
        last = last or logged
        if evaluated:
            return last, logged
    return last, {}


def _tail(path: Path) -> list[str]:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            return file.read().decode(errors="replace").splitlines()
    except OSError:
        return []


def _epochs_done(last: Mapping[str, Any], summary: Mapping[str, Any]) -> int | None:
    epoch = _number(last, "epoch", int)
    if epoch is None:
        return _number(summary, "epoch", int)
    return epoch + (last.get("kind") == "epoch")


def _top1(summary: Mapping[str, Any], ended: Mapping[str, Any]) -> tuple[float | None, str | None]:
    """Top-1, and of which images: a summary's own is always of the test images."""
    places = [(summary, "top1", "test")]
    if summary.get("status") != "finished":
        places = [(ended, "test_top1", "test"), (ended, "validation_top1", "validation"), *places]
    for source, key, images in places:
        if (value := _number(source, key, float)) is not None:
            return value, images
    return None, None


def _seconds_left(
    folder: Path, last: Mapping[str, Any], ended: Mapping[str, Any], step: int | None, steps: int | None
) -> float | None:
    """Time of the steps and evaluations that are left, at the speed of the epoch under way."""
    speed = _number(last, "images_per_s", float)
    if not speed or not step or steps is None:
        return None
    try:
        trainer = yaml.load((folder / "config.yaml").read_text(), _LOADER)["trainer"]  # noqa: S506 - a safe one
        batch, every = int(trainer["batch_size"]), int(trainer["eval_every"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return None
    seconds = max(0, steps - step) * batch / speed
    epoch, ended_at = _number(ended, "epoch", int), _number(ended, "step", int)
    if epoch is not None and ended_at:
        evaluations = max(0, steps - step) / (ended_at / (epoch + 1)) / every
        seconds += evaluations * (_number(ended, "time_eval_s", float) or 0.0)
    return seconds


_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _updated(folder: Path) -> float | None:
    times = []
    for name in _FILES:
        with suppress(OSError):
            times.append((folder / name).stat().st_mtime)
    return max(times, default=None)


def _number(values: Mapping[str, Any], key: str, kind: type) -> Any:
    value = values.get(key)
    # Not math.isfinite: JSON's whole numbers may be too large for a float.
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return kind(value) if is_number else None


def _row(run: Status) -> list[Any]:
    done = None if not run.steps or run.step is None else f"{100 * run.step / run.steps:.0f} %"
    return [
        run.run,
        run.state,
        None if run.epoch is None else f"{run.epoch} of {'?' if run.epochs is None else run.epochs}",
        done,
        None if run.top1 is None else f"{run.top1:.2f}{' val' if run.top1_of == 'validation' else ''}",
        None if run.seconds_left is None else duration(run.seconds_left),
        None if run.updated is None else f"{duration(max(0.0, time.time() - run.updated))} ago",
    ]
