"""Tell how far the runs in some folders are: `famba status`. Only reads, also while the runs go on."""

from __future__ import annotations

import argparse
import fcntl
import json
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

from famba.errors import DataError, FambaError, near_miss
from famba.training.records import (
    METRICS,
    SUMMARY,
    Summary,
    duration,
    first_epoch,
    flatten,
    queue,
    recorded,
    remembered,
    to_cell,
)

# Files that a run leaves behind even if it has no summary yet, or has lost it.
_TRACES = (METRICS, "train.log")
_FILES = (SUMMARY, "config.yaml", *_TRACES, "output.log")
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# Settings that make no run another one, the most that a table shows, and those that it shows first.
_UNTOLD = ("run_dir", "resume", "data.root", "data.workers", "logger.", "trainer.log_every", "trainer.save_every_min")
_COLUMNS = 8
_FIRST = ("model.name", "data.name", "fusion.strategy", "seed")
_TAIL = 1 << 16  # bytes at the end of metrics.jsonl that are read
_ORDER = ("finished", "running", "waiting", "interrupted", "stopped", "failed", "damaged", "not started")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `famba status`."""
    parser.description = __doc__
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

    state: one of `_ORDER`, as docs/clusters.md explains. note: the error of a failed or damaged run. top1: percent of
    the images that top1_of names, test or validation.
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
    updated: float | None
    note: str | None


def status(paths: Iterable[str | Path]) -> list[Status]:
    """Look at all runs in or below some folders. Raises DataError for a path that holds none."""
    found: dict[Path, str] = {}
    for path in map(Path, paths):
        folders = list(_runs_in(path))
        if not folders:
            beside = path.absolute().parent
            close = near_miss(path.name, [one.name for one in beside.iterdir()]) if beside.is_dir() else ""
            why = "" if path.is_dir() else ": it is a file" if path.exists() else f": it is not there{close}"
            raise DataError(
                f"no run in {path}{why}; give the run_dir of a run or of a sweep, or a folder that holds some"
            )
        found |= {folder: str(folder) if folder == path else str(folder.relative_to(path)) for folder in folders}
    queued = _queued({folder.parent for folder in found})
    return [_look(folder, name, queued.get(folder)) for folder, name in found.items()]


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
            if not entry.is_symlink() or _is_run(entry):
                yield from _runs_in(entry)


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
    lines = _last_lines(folder / METRICS)
    last = lines[0] if lines else {}
    state = "damaged" if damage else _state(folder, said.status, queued)
    epoch, measured = last.get("epoch"), [("test", said.top1)]
    if said.status != "finished":
        measured += [(of, line.get(f"{of}_top1")) for line in lines for of in ("test", "validation")]
    top1_of, top1 = next(((of, top1) for of, top1 in measured if top1 is not None), (None, None))
    # A run that was stopped has saved steps that it has not logged.
    step = max((known for known in (said.step, last.get("step")) if known is not None), default=None)
    return Status(
        run=name,
        folder=str(folder),
        state=state,
        epoch=said.epoch if epoch is None else epoch - first_epoch(folder / METRICS) + (last["kind"] == "epoch"),
        epochs=said.epochs,
        step=step,
        steps=said.steps,
        top1=top1,
        top1_of=top1_of,
        updated=max((path.stat().st_mtime for name in _FILES if (path := folder / name).exists()), default=None),
        note=damage or (said.error if state == "failed" else None),
    )


def _state(folder: Path, said: str, queued: str | None) -> str:
    if said == "finished":
        return "finished"
    try:  # a shared lock, which any user may take at once, but not beside that of the run itself
        with open(folder / ".lock", "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return "running"
    except OSError:  # no such file, or no locks on this file system
        pass
    if queued is not None:
        return "running" if queued == "RUNNING" else "waiting"
    if not said:
        return "stopped" if any((folder / name).is_file() for name in _TRACES) else "not started"
    return "stopped" if said == "running" else said


def _last_lines(metrics: Path) -> list[dict[str, Any]]:
    """Return lines of metrics.jsonl, the last first, without those that are damaged or being written."""
    found: list[dict[str, Any]] = []
    with suppress(OSError), open(metrics, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
        for line in reversed(file.read().splitlines()):
            with suppress(ValueError):
                values = json.loads(line)
                found += [values] if isinstance(values, dict) and "kind" in values else []
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """Return what a run's config.yaml holds. Raises ValueError where it is missing or damaged."""
    try:
        config = yaml.load((folder / "config.yaml").read_bytes(), _LOADER)  # noqa: S506 - a safe one
    except FileNotFoundError:
        raise ValueError("config.yaml is missing, so its recipe is not known") from None
    except (OSError, yaml.YAMLError, ValueError) as error:
        raise ValueError(f"config.yaml is damaged: {error}") from error
    if not isinstance(config, dict):
        raise ValueError("config.yaml is damaged: it holds no configuration")
    return config


def settings(folder: Path) -> dict[str, str]:
    """Return the settings of a run by dotted keys, as text; none where its config.yaml cannot be read."""
    with suppress(ValueError):
        return {key: to_cell(value) for key, value in flatten(read_config(folder)).items()}
    return {}


def differing(runs: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """Return the settings that differ between runs: by a short name the value in each, "" where there is none.

    runs: of each its settings by dotted keys as text. Of more than `_COLUMNS` the last column says how many.
    """
    known = [_telling(run) for run in runs]
    keys = [*_FIRST, *sorted({key for run in known for key in run} - {*_FIRST})]
    # A key that an earlier version did not have tells no runs apart.
    differ = [key for key in keys if len({run[key] for run in known if key in run}) > 1]
    short = [key.removesuffix(".name").removesuffix(".strategy").split(".")[-1] for key in differ]
    found = {
        name if short.count(name) == 1 else key: [run.get(key, "").replace("null", "") for run in known]
        for key, name in zip(differ[:_COLUMNS], short, strict=False)
    }
    if (more := len(differ) - _COLUMNS) > 0:
        found["more settings"] = [f"{more} more differ"] * len(runs)
    return found


def _telling(run: Mapping[str, str]) -> dict[str, str]:
    """Return the settings by which a run may differ from others; without fusion, those of fusion are left out."""
    untold = (*_UNTOLD, "fusion.") if run.get("fusion.strategy") == "none" else _UNTOLD
    return {key: text for key, text in run.items() if key == "fusion.strategy" or not key.startswith(untold)}


def status_table(runs: Sequence[Status]) -> str:
    """Return a table of runs, the errors of failed and damaged ones, and the count of each state."""
    told = differing([settings(Path(run.folder)) for run in runs])
    rows = [
        {
            "run": run.run,
            **{name: cells[place] or None for name, cells in told.items()},
            "state": run.state,
            "epoch": None if run.epoch is None else f"{run.epoch} of {run.epochs or '?'}",
            "done": None if not run.steps or run.step is None else f"{100 * run.step / run.steps:.0f} %",
            "Top-1 %": None if run.top1 is None else f"{run.top1:.2f}{' val' if run.top1_of == 'validation' else ''}",
            "updated": None if run.updated is None else f"{duration(max(0.0, time.time() - run.updated))} ago",
        }
        for place, run in enumerate(runs)
    ]
    notes = [f"{run.run}: {run.note}" for run in runs if run.note]
    notes += [""] if notes else []
    counts = Counter(run.state for run in runs)
    listed = ", ".join(f"{counts[state]} {state}" for state in _ORDER if counts[state])
    table = tabulate(rows, headers="keys", missingval="-", disable_numparse=True)
    return "\n".join([table, "", *notes, f"{len(runs)} runs: {listed}"])
