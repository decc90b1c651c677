"""What a report knows of each run, read from its folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from famba.analysis.status import Status, status
from famba.errors import ConfigError
from famba.fusion import Fusion
from famba.fusion.schedules import ADAPTIVE
from famba.training.config import flatten, with_added_keys
from famba.training.run_folder import METRICS

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# Which images an evaluation may be of, as keys of metrics.jsonl.
IMAGES = ("test", "validation")


@dataclass(frozen=True)
class Run:
    """A finished run. None stands for what its summary does not say.

    Top-1 and Top-5 are percent, times seconds, config maps dotted keys to values. fusion is the
    setting as it turned out: its budget is the tokens that are removed in all, and an adaptive schedule, which is a
    result, is no part of it. tokens_per_layer has an entry for
    each layer, after fusing. evaluations: for "test" and "validation", the epochs that were done and Top-1 then.
    losses: steps, and the training loss then. started_from: what the summary
    tells of weights that it began with. gaps: what in the folder could not be read.
    """

    name: str
    folder: Path
    started: str
    model: str
    strategy: str
    seed: int
    top1: float
    top5: float | None
    train_time_s: float | None
    images_per_s: float | None
    peak_memory_mib: float | None
    saved_bytes_per_image: float | None
    macs_per_image: float | None
    parameters: float | None
    image_size: int | None
    precision: str | None
    steps: int | None
    tokens: int
    schedule: tuple[int, ...]
    tokens_per_layer: tuple[int, ...]
    adapted: tuple[Mapping[str, Any], ...]
    started_from: Mapping[str, Any]
    provenance: Mapping[str, Any]
    config: Mapping[str, Any]
    fusion: Fusion
    evaluations: Mapping[str, tuple[tuple[int, float], ...]]
    losses: tuple[tuple[int, float], ...]
    gaps: tuple[str, ...]


@dataclass(frozen=True)
class LeftOut:
    """A run that some or all of the report does without, and why: a reason a line."""

    name: str
    kind: str
    reasons: tuple[str, ...]


def read_runs(paths: Iterable[str | Path]) -> tuple[list[Run], list[LeftOut]]:
    """Read all runs in or below some folders, each once: those that are finished, and those that cannot be used.

    Raises DataError for a path that holds none.
    """
    runs: list[Run] = []
    others: list[LeftOut] = []
    for name, found in _named(paths).items():
        if found.state != "finished":
            others.append(_unfinished(name, found))
            continue
        try:
            runs.append(_read(name, Path(found.folder)))
        except _DamageError as error:
            others.append(LeftOut(name, "damaged", (str(error),)))
    return runs, others


def _named(paths: Iterable[str | Path]) -> dict[str, Status]:
    """Each folder once, under a name that does not depend on where the folders lie."""
    found: dict[Path, tuple[str, Status]] = {}
    for path in map(Path, paths):
        for run in status([path]):
            top, below = path.resolve().name, "" if run.run == str(path) else f"/{run.run}"
            found.setdefault(Path(run.folder).resolve(), (f"{top}{below}", run))
    named: dict[str, Status] = {}
    for name, run in sorted(found.values(), key=lambda pair: (pair[0], pair[1].folder)):
        shown = printable(name)
        named[shown if shown not in named else printable(run.folder)] = run
    return named


def printable(text: str) -> str:
    """Return a text that UTF-8 can hold and that stays on its line."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _unfinished(name: str, run: Status) -> LeftOut:
    if run.state == "damaged":
        reason = (run.note or "").removeprefix(f"{Path(run.folder) / 'summary.json'} is ")
        return LeftOut(name, "damaged", (printable(f"summary.json is {reason}"),))
    how_far = "" if run.step is None else f" after step {run.step}{'' if run.steps is None else f' of {run.steps}'}"
    note = f": {run.note}" if run.note else ""
    return LeftOut(name, "unfinished", (printable(f"{run.state}{how_far}{note}"),))


class _DamageError(Exception):
    """A file of a run that does not hold what it should; the message says which and why."""


def _read(name: str, folder: Path) -> Run:
    summary, config = _summary(folder), _config(folder)
    provenance = summary.get("provenance")
    if not isinstance(provenance, Mapping):
        raise _DamageError("summary.json has no provenance")
    schedule, left = (_needed(summary, key, _counts) for key in ("schedule", "tokens_per_layer"))
    if len(schedule) != len(left):
        raise _DamageError("summary.json has a schedule and tokens_per_layer of different lengths")
    adapted, strategy = summary.get("adapted"), _needed(summary, "strategy", _text)
    evaluations, losses, gaps = _metrics(folder / METRICS)
    return Run(
        name=name,
        folder=folder,
        started=str(provenance.get("started")),
        model=_needed(summary, "model", _text),
        strategy=strategy,
        seed=_needed(provenance, "seed", _whole),
        top1=_needed(summary, "top1", _percent),
        top5=_percent(summary.get("top5")),
        train_time_s=_positive(summary.get("train_time_s")),
        images_per_s=_positive(summary.get("images_per_s")),
        peak_memory_mib=_positive(summary.get("peak_memory_mib")),
        saved_bytes_per_image=_positive(summary.get("saved_bytes_per_image")),
        macs_per_image=_positive(summary.get("macs_per_image")),
        parameters=_positive(summary.get("parameters")),
        image_size=_whole(summary.get("image_size")),
        precision=_text(summary.get("precision")),
        steps=_whole(summary.get("steps")),
        tokens=_needed(summary, "tokens", _natural),
        schedule=schedule,
        tokens_per_layer=left,
        adapted=tuple(entry for entry in adapted if isinstance(entry, Mapping)) if isinstance(adapted, list) else (),
        started_from=started if isinstance(started := summary.get("started_from"), Mapping) else {},
        provenance=provenance,
        config=config,
        fusion=_fusion(config, strategy, schedule),
        evaluations=evaluations,
        losses=losses,
        gaps=gaps,
    )


def _summary(folder: Path) -> Mapping[str, Any]:
    try:
        return json.loads((folder / "summary.json").read_bytes())
    except (OSError, ValueError) as error:  # gone or changed since its state was looked at
        raise _DamageError(f"summary.json is damaged: {error}") from error


def _config(folder: Path) -> Mapping[str, Any]:
    try:
        config = yaml.load((folder / "config.yaml").read_bytes(), _LOADER)  # noqa: S506 - a safe one
        if not isinstance(config, Mapping) or not config.keys() >= {"model", "fusion", "data", "trainer"}:
            raise ValueError("it holds no configuration")
    except FileNotFoundError:
        raise _DamageError("config.yaml is missing, so its recipe is not known") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise _DamageError(printable(f"config.yaml is damaged: {' '.join(str(error).split())}")) from error
    return flatten(with_added_keys(config))


def _fusion(config: Mapping[str, Any], strategy: str, schedule: tuple[int, ...]) -> Fusion:
    given = {one.name: config.get(f"fusion.{one.name}") for one in fields(Fusion)}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    if strategy != ADAPTIVE:
        values |= dict.fromkeys(("adapt_at", "adapt_images"))
    try:
        return Fusion().changed(**{**values, "strategy": strategy}).resolved(schedule)
    except (ConfigError, TypeError) as error:
        raise _DamageError(printable(f"its fusion cannot be read: {error}")) from error


_Evaluations = dict[str, tuple[tuple[int, float], ...]]
_Losses = tuple[tuple[int, float], ...]


def _metrics(path: Path) -> tuple[_Evaluations, _Losses, tuple[str, ...]]:
    evaluations: dict[str, dict[int, float]] = {images: {} for images in IMAGES}
    losses: dict[int, float] = {}
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        return {}, (), (f"{METRICS} cannot be read ({error.strerror}): no curves of this run",)
    broken = 0
    for line in lines:
        try:
            broken += not _take(json.loads(line), evaluations, losses)
        except (ValueError, KeyError, TypeError):
            broken += 1
    gaps = (f"{broken} of {len(lines)} lines of {METRICS} cannot be read: gaps in its curves",) if broken else ()
    found = {images: tuple(sorted(values.items())) for images, values in evaluations.items() if values}
    return found, tuple(sorted(losses.items())), gaps


def _take(logged: Mapping[str, Any], evaluations: dict[str, dict[int, float]], losses: dict[int, float]) -> bool:
    """Put a line of metrics.jsonl in its place; return whether it could be read. Raises where it is none."""
    kind = logged["kind"]
    if kind == "train":
        step, loss = _whole(logged["step"]), _number(logged["loss"])
        if step is None or loss is None:
            return False
        losses[step] = loss
    elif kind == "epoch":
        epoch = _whole(logged["epoch"])
        if epoch is None:
            return False
        for images in IMAGES:
            if (top1 := _percent(logged.get(f"{images}_top1"))) is not None:
                evaluations[images][epoch + 1] = top1
    return True


def _needed(values: Mapping[str, Any], key: str, convert: Any) -> Any:
    value = convert(values.get(key))
    if value is None:
        raise _DamageError(printable(f"summary.json says {key} is {values.get(key)!r}"))
    return value


def _text(value: object) -> str | None:
    return printable(value) if isinstance(value, str) and value else None


def _number(value: object) -> float | None:
    # Not math.isfinite: JSON's whole numbers may be too large for a float.
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return float(value) if is_number else None  # type: ignore[arg-type]


def _percent(value: object) -> float | None:
    number = _number(value)
    return number if number is not None and 0 <= number <= 100 else None


def _positive(value: object) -> float | None:
    number = _number(value)
    return number if number is not None and number > 0 else None


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _natural(value: object) -> int | None:
    number = _whole(value)
    return number if number is not None and number > 0 else None


def _counts(value: object) -> tuple[int, ...] | None:
    whole = isinstance(value, list) and value and all(_whole(entry) is not None for entry in value)
    return tuple(value) if whole else None  # type: ignore[arg-type]
