"""Read what runs and sweeps leave in folders and in Slurm's queue; without torch, so that `famba status` is quick."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from famba.errors import TrainingError

METRICS = "metrics.jsonl"
SWEEP = "sweep.json"


def recorded(folder: Path) -> list[dict[str, Any]]:
    """Return the runs that a sweep's folder lists, each with its folder's name and its overrides.

    A damaged entry is left out, and so is a folder that is not inside the sweep's.
    """
    try:
        runs = json.loads((folder / SWEEP).read_text())["runs"]
        found = [(PurePosixPath(run["folder"]), [str(line) for line in run["overrides"]]) for run in runs]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [
        {"folder": str(path), "overrides": lines}
        for path, lines in found
        if path.parts and not path.is_absolute() and not {"..", "\0"} & {*path.parts, *str(path)}
    ]


def queue() -> dict[str, str]:
    """Return the state of each of the user's jobs that waits or runs, by its id; HELD for one that waits in vain.

    Raises TrainingError where Slurm does not answer.
    """
    command = ["squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%i|%T|%r"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)  # noqa: S603 - Slurm's own
    except (OSError, subprocess.SubprocessError) as error:
        said = str(getattr(error, "stderr", None) or error).strip()
        raise TrainingError(f"squeue does not answer: {said}") from error
    rows = [line.split("|") for line in done.stdout.splitlines() if line.count("|") == 2]
    return {job: "HELD" if state == "PENDING" and "held" in reason.lower() else state for job, state, reason in rows}


def remembered(folder: Path) -> dict[str, str]:
    """Return the job of each run that was submitted last, from a sweep's slurm folder."""
    try:
        return {str(name): str(job) for name, job in json.loads((folder / "jobs.json").read_text()).items()}
    except (OSError, ValueError, AttributeError):
        return {}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Map dotted keys to values: {"trainer": {"epochs": 1}} to {"trainer.epochs": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `flatten`. Raises ValueError for a key that holds a value and others below it."""
    values: dict[str, Any] = {}
    for key, value in flat.items():
        *groups, name = key.split(".")
        place = values
        for group in groups:
            place = place.setdefault(group, {})
            if not isinstance(place, dict):
                raise ValueError(f"column {key} contradicts column {group}")
        place[name] = value
    return values


def first_epoch(metrics: Path) -> int:
    """Return the number of the first epoch in metrics.jsonl: 1, but 0 in the files that version 0.1 began."""
    try:
        with open(metrics, "rb") as file:
            return int(json.loads(file.readline())["epoch"] != 0)
    except (OSError, ValueError, KeyError, TypeError):
        return 1


def duration(seconds: float) -> str:
    """Write seconds for people: "45 s", "12 min", "3 h 20 min", "2 d 4 h"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def from_cell(cell: str) -> Any:
    """Return the value that a cell of a row stands for."""
    try:
        return json.loads(cell)
    except ValueError:
        return cell


def to_cell(value: Any) -> str:
    """Return the cell of a row that stands for a value."""
    is_plain = isinstance(value, str) and value != "" and from_cell(value) is value
    return value if is_plain else json.dumps(value, ensure_ascii=False)
