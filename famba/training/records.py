"""Read what runs and sweeps leave in folders and in Slurm's queue; without torch, so that `famba status` is quick."""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, TypeAdapter, ValidationError

from famba.errors import TrainingError

METRICS = "metrics.jsonl"
SWEEP = "sweep.json"
SUMMARY = "summary.json"
FORMAT = 2

# NaN and infinity stand for a number that is not known, as in the loss of a run that diverged.
Number = Annotated[float | None, AfterValidator(lambda value: value if value is None or math.isfinite(value) else None)]


@dataclass(frozen=True)
class Summary:
    """Hold the result of a run, or of its part that is done. None stands for what is not known.

    status is running, interrupted (it saved itself), failed or finished; format the version of these fields, 0 for
    Famba 0.1. top1, top5 and loss are of the test images after the last step, accuracies in percent; ema_ of the
    averaged weights; selected of the weights that validation selected, with their epoch from 1. Times are seconds:
    train_time_s without evaluation and the capture of CUDA graphs, epoch_time_s means of data, step and evaluation.
    schedule has the tokens removed in each layer, tokens_per_layer those left after each, tokens those before the
    first, adapted each measurement of an adaptive schedule. budget_matched tells whether other strategies remove as
    many. weights_sha256 is of model.safetensors; times_left_out says why a kept summary has no times.
    """

    status: str
    format: int = 0
    model: str | None = None
    data: str | None = None
    strategy: str | None = None
    top1: Number = None
    top5: Number = None
    loss: Number = None
    ema_top1: Number = None
    ema_top5: Number = None
    selected: dict[str, Any] | None = None
    epoch: int | None = None
    epochs: int | None = None
    step: int | None = None
    steps: int | None = None
    train_time_s: Number = None
    eval_time_s: Number = None
    epoch_time_s: dict[str, float] | None = None
    images_per_s: Number = None
    peak_memory_mib: Number = None
    saved_bytes_per_image: int | None = None
    macs_per_image: int | None = None
    parameters: int | None = None
    image_size: int | None = None
    precision: str | None = None
    tokens: int | None = None
    schedule: tuple[int, ...] | None = None
    adapted: tuple[dict[str, Any], ...] | None = None
    started_from: dict[str, Any] | None = None
    budget_matched: bool | None = None
    tokens_per_layer: tuple[int, ...] | None = None
    tokens_removed: int | None = None
    updated: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    images: dict[str, int] | None = None
    classes: tuple[str, ...] | None = None
    weights_sha256: str | None = None
    times_left_out: str | None = None
    error: str | None = None

    @classmethod
    def parse(cls, content: str | bytes) -> Summary:
        """Read a summary from JSON. Raises ValueError for what is no summary, or of a later format."""
        try:
            found = _ADAPTER.validate_json(content)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            start = f"{name} is {first['input']!r:.100}" if name else "it is no summary"
            raise ValueError(f"{start}: {first['msg']}") from None
        if found.format > FORMAT:
            raise ValueError(f"its format is {found.format}, this version of Famba reads up to {FORMAT}; update Famba")
        selected = found.selected or {}
        if found.format < 2 and isinstance(selected.get("epoch"), int):  # it counted from 0
            return replace(found, format=FORMAT, selected={**selected, "epoch": selected["epoch"] + 1})
        return found

    def values(self) -> dict[str, Any]:
        """Return plain values by name, as JSON holds them."""
        return _ADAPTER.dump_python(self, mode="json")


_ADAPTER = TypeAdapter(Summary)


def recorded(folder: Path) -> list[dict[str, Any]]:
    """Return the runs that a sweep's folder lists, each with its folder's name and its overrides.

    A folder that is not inside the sweep's is left out; a damaged list is empty.
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
        raise TrainingError(f"squeue does not answer: {getattr(error, 'stderr', None) or error}".strip()) from error
    rows = [line.split("|") for line in done.stdout.splitlines() if line.count("|") == 2]
    return {job: "HELD" if state == "PENDING" and "held" in reason.lower() else state for job, state, reason in rows}


def remembered(folder: Path) -> dict[str, str]:
    """Return the last submitted job of each run, from a sweep's slurm folder."""
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
    """Write seconds for people: "45 s", "12 min", "3.5 h", "2.2 days"."""
    for size, unit in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.{0 if unit == 'min' else 1}f} {unit}"
    return f"{seconds:.0f} s"


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
