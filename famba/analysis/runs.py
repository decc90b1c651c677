"""Runs as a pandas DataFrame, read from run folders and from CSV files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from tabulate import tabulate

from famba.analysis.status import LOADER, Status, status
from famba.errors import DataError
from famba.training.run_folder import METRICS
from famba.training.summary import SUMMARY, Summary, from_cell, from_row, to_row

# What a report adds to the columns of a row; folder is empty for a row of a CSV file, problem for a run that is usable.
_OWN = ("run", "folder", "state", "kind", "problem")
_NEEDED = ("model", "strategy", "top1", "tokens", "schedule", "tokens_per_layer")
_METRICS = ("kind", "step", "epoch", "loss", "test_top1", "validation_top1")


def read_runs(paths: Iterable[str | Path]) -> pd.DataFrame:
    """Read the runs in or below some folders and in some CSV files, each once, sorted by name.

    Returns a row for each run, all text, with an empty cell for what is not known: run (a name that does not depend on
    where the folders lie), folder, state (as `famba status` names it), kind and problem (why a run cannot be used:
    "unfinished" or "damaged", and the reason), and the columns of `famba.training.summary.to_row`.

    Raises DataError for a path without runs and for a file that is no table of runs.
    """
    found: dict[Any, dict[str, str]] = {}
    for path in map(Path, paths):
        is_table = path.suffix == ".csv" and path.is_file()
        for key, row in _from_csv(path) if is_table else _from_folders(path):
            found.setdefault(key, row)
    names: set[str] = set()
    for row in (rows := sorted(found.values(), key=lambda row: (row["run"], row["folder"]))):
        if row["run"] in names:
            row["run"] = f"{row['folder'] or 'CSV'}:{row['run']}"
        names.add(row["run"])
    return pd.DataFrame(rows).fillna("")


def runs_csv(runs: pd.DataFrame) -> str:
    """Return usable runs as CSV, which `read_runs` reads like their folders; curves are not part of it."""
    kept = runs[runs["problem"] == ""].drop(columns=[name for name in _OWN if name != "run"])
    return kept.to_csv(index=False, lineterminator="\n")


def run_table(runs: pd.DataFrame) -> str:
    """Return a line for each run, with time per epoch and tokens left after the last layer, and what is damaged."""

    def line(row: Mapping[str, str]) -> list[Any]:
        parts = [
            float(row[name]) for name in runs if name.startswith("epoch_time_s.") and row[name] not in ("", "null")
        ]
        left = from_cell(row.get("tokens_per_layer", ""))
        top1, seed = row.get("top1"), row.get("provenance.seed")
        return [
            row.get("model") or None,
            row.get("strategy") or None,
            seed or None,
            f"{float(top1):.2f}" if top1 else None,
            f"{sum(parts):.2f}" if parts else None,
            f"{left[-1]} of {row['tokens']}" if left else None,
            row["state"],
        ]

    headers = ("model", "fusion", "seed", "Top-1 %", "time per epoch s", "tokens left", "status")
    sides = ("left", "left", "right", "right", "right", "left", "left")
    lines = [line(row) for row in runs.to_dict("records")]
    table = tabulate(lines, headers=headers, missingval="-", disable_numparse=True, colalign=sides)
    damaged = runs[runs["kind"] == "damaged"]
    return "\n".join(
        [table, *(f"{name}: {problem}" for name, problem in zip(damaged["run"], damaged["problem"], strict=True))]
    )


def read_metrics(folder: str) -> tuple[pd.DataFrame, str]:
    """Read what metrics.jsonl says of loss and evaluations; return it with a remark on what could not be read."""
    lines = []
    if folder:
        try:
            lines = (Path(folder) / METRICS).read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            return pd.DataFrame(columns=_METRICS), f"{METRICS} cannot be read ({error.strerror}): no curves of this run"
    found = [logged for line in lines if (logged := _metric(line))]
    broken = len(lines) - len(found)
    remark = f"{broken} of {len(lines)} lines of {METRICS} cannot be read: gaps in its curves" if broken else ""
    return pd.DataFrame(found, columns=_METRICS), remark


def _metric(line: str) -> dict[str, Any] | None:
    try:
        logged = json.loads(line)
        if logged["kind"] == "train":
            float(logged["loss"])
        return {name: logged.get(name) for name in _METRICS} | {
            "step": int(logged["step"]),
            "epoch": int(logged["epoch"]),
        }
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None


def printable(text: str) -> str:
    """Return a text that UTF-8 can hold and that stays on its line."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _from_folders(path: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    for run in status([path]):
        folder = Path(run.folder)
        below = "" if run.run == str(path) else f"/{run.run}"
        yield folder.resolve(), _read(printable(f"{path.resolve().name}{below}"), run, folder)


def _read(name: str, run: Status, folder: Path) -> dict[str, str]:
    row = dict(zip(_OWN, (name, printable(str(folder)), run.state, "", ""), strict=True))
    if run.state == "damaged":
        return row | _damaged((run.note or "").removeprefix(f"{folder}/"))
    how_far = "" if run.step is None else f" after step {run.step}{'' if run.steps is None else f' of {run.steps}'}"
    unfinished = printable(f"{run.state}{how_far}{f': {run.note}' if run.note else ''}")
    try:
        summary, config = Summary.parse((folder / SUMMARY).read_bytes()), {}
        if run.state == "finished":
            _check(summary)
            config = _config(folder)
    except OSError as error:
        return row | (
            _damaged(str(error)) if run.state == "finished" else {"kind": "unfinished", "problem": unfinished}
        )
    except ValueError as error:
        return row | _damaged(str(error))
    row |= to_row(summary, config)
    return row if run.state == "finished" else row | {"kind": "unfinished", "problem": unfinished}


def _from_csv(path: Path) -> Iterator[tuple[tuple[Path, int], dict[str, str]]]:
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        if missing := [name for name in ("run", "status", *_NEEDED) if name not in table]:
            raise ValueError(f"it has no column {', '.join(missing)}")
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
        raise DataError(f"{path} is no table of runs ({error}); write one by scripts/keep_runs.py") from error
    for index, cells in enumerate(table.to_dict("records")):
        row = dict(zip(_OWN, (printable(cells.pop("run")), "", "finished", "", ""), strict=True))
        try:
            summary, config = from_row(cells)
            _check(summary)
            if summary.status != "finished":
                raise ValueError(f"status is {summary.status}, not finished")
            row |= to_row(summary, config)
        except ValueError as error:
            row |= _damaged(f"its row in {path.name} is damaged: {error}")
        yield (path.resolve(), index), row


def _damaged(reason: str) -> dict[str, str]:
    return {"state": "damaged", "kind": "damaged", "problem": printable(" ".join(reason.split()))}


def _check(summary: Summary) -> None:
    """Raise ValueError where a finished run lacks what every table needs."""
    unknown = [name for name in _NEEDED if getattr(summary, name) is None]
    if unknown or not isinstance(summary.provenance.get("seed"), int):
        raise ValueError(f"{SUMMARY} does not say {', '.join(unknown) or 'provenance.seed'}")
    if len(summary.schedule or ()) != len(summary.tokens_per_layer or ()) or not summary.schedule or not summary.tokens:
        raise ValueError(f"{SUMMARY} has a schedule and tokens_per_layer that contradict each other")


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = yaml.load((folder / "config.yaml").read_bytes(), LOADER)  # noqa: S506 - a safe one
    except FileNotFoundError:
        raise ValueError("config.yaml is missing, so its recipe is not known") from None
    except (OSError, yaml.YAMLError, ValueError) as error:
        raise ValueError(f"config.yaml is damaged: {error}") from error
    if not isinstance(config, dict) or not config.keys() >= {"model", "fusion", "data", "trainer"}:
        raise ValueError("config.yaml is damaged: it holds no configuration")
    return config
