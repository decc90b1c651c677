"""Read runs into a pandas DataFrame, from run folders and from CSV files, and write such CSV files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from famba.analysis.status import Status, differing, read_config, settings, status
from famba.errors import DataError
from famba.training.config import with_added_keys
from famba.training.records import SUMMARY, Summary, flatten, from_cell, nested, to_cell

# What is added to the columns of a row; folder is empty for a row of a CSV file, problem for a run that is usable.
_OWN = ("run", "folder", "state", "kind", "problem")
_CONFIG = "config."
_NEEDED = ("model", "strategy", "top1", "tokens", "schedule", "tokens_per_layer")


def read_runs(paths: Iterable[str | Path]) -> pd.DataFrame:
    """Read the runs in or below some folders and in some CSV files, each once, sorted by name.

    Returns a row for each run, all text, empty where unknown: run (a name that does not depend on where folders lie),
    folder, state (as `famba status` names it), kind and problem (why a run cannot be used: "unfinished" or "damaged",
    and the reason), and the columns of `to_row`. Raises DataError for a path without runs, or a file of something else.
    """
    found: dict[Any, dict[str, str]] = {}
    for path in map(Path, paths):
        is_table = path.suffix == ".csv" and path.is_file()
        for key, row in _from_csv(path) if is_table else _from_folders(path):
            found.setdefault(key, row)
    rows = sorted(found.values(), key=lambda row: (row["run"], row["folder"]))
    runs = pd.DataFrame(rows).fillna("")
    runs = runs.reindex(columns=list(dict.fromkeys([*runs, *_NEEDED])), fill_value="")
    again = runs.groupby("run").cumcount()
    return runs.assign(run=runs["run"].where(again == 0, runs["run"] + " (" + (again + 1).astype(str) + ")"))


def runs_csv(runs: pd.DataFrame) -> str:
    """Return usable runs as CSV, which `read_runs` reads like their folders; curves are not part of it."""
    kept = runs[runs["problem"] == ""].drop(columns=[name for name in _OWN if name != "run"])
    return kept.to_csv(index=False, lineterminator="\n")


def run_table(runs: pd.DataFrame) -> str:
    """Return a line for each run: what differs between them, and results; below it what they share, and is damaged."""
    kept = runs[[name for name in runs if name.startswith(_CONFIG)]].rename(columns=lambda name: name[len(_CONFIG) :])
    known = [{key: cell for key, cell in cells.items() if cell} for cells in kept.to_dict("records")]
    known = [own or settings(Path(folder)) for own, folder in zip(known, runs["folder"], strict=True)]
    table = pd.DataFrame(differing(known), index=runs.index)
    above = runs["run"].str.rpartition("/")[0]
    if above.nunique() > 1:
        table.insert(0, "folder", above)
    if table.duplicated().any() or table.empty:
        table.insert(0, "run", runs["run"])
    sides = ["left"] * len(table.columns) + ["right", "right", "left", "left"]
    table["Top-1 %"] = runs["top1"].map(lambda cell: f"{float(cell):.2f}" if cell else "")
    times = runs.filter(regex=r"^epoch_time_s\.").apply(pd.to_numeric, errors="coerce").sum(axis=1, min_count=1)
    table["time per epoch s"] = times.map("{:.2f}".format).replace("nan", "")
    table["tokens left"] = runs["tokens_per_layer"].str.extract(r"(\d+)\]$", expand=False) + " of " + runs["tokens"]
    table = table.fillna("").assign(status=runs["state"]).replace("", "-")
    text = table.to_markdown(index=False, tablefmt="simple", disable_numparse=True, colalign=sides)
    damaged = runs[runs["kind"] == "damaged"]
    note = "Top-1 is of the test images, by the weights of the last step."
    return "\n".join([text, "", note, *(damaged["run"] + ": " + damaged["problem"])])


def to_row(summary: Summary, config: Mapping[str, Any]) -> dict[str, str]:
    """Return a run as one flat row of text, for CSV files: its summary and, behind "config.", its settings."""
    known = {name: value for name, value in summary.values().items() if value is not None}
    settings = flatten(with_added_keys(config), _CONFIG)
    return {name: to_cell(value) for name, value in [*flatten(known).items(), *settings.items()]}


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
    step = "" if run.step is None else f" after step {run.step}{'' if run.steps is None else f' of {run.steps}'}"
    if run.state != "finished":
        row |= {"kind": "unfinished", "problem": printable(f"{run.state}{step}{f': {run.note}' if run.note else ''}")}
    try:
        summary, config = Summary.parse((folder / SUMMARY).read_bytes()), {}
        if run.state == "finished":
            _check(summary)
            if not (config := read_config(folder)).keys() >= {"model", "fusion", "data", "trainer"}:
                raise ValueError("config.yaml is damaged: it holds no configuration")
        return row | to_row(summary, config)
    except FileNotFoundError as error:  # not begun, or gone by now
        return row if row["problem"] else row | _damaged(str(error))
    except (OSError, ValueError) as error:
        return row | _damaged((run.note or str(error)).removeprefix(f"{folder}/"))


def _from_csv(path: Path) -> Iterator[tuple[tuple[Path, int], dict[str, str]]]:
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        if missing := [name for name in ("run", "status", *_NEEDED) if name not in table]:
            raise ValueError(f"it has no column {', '.join(missing)}")
        if table.empty:
            raise ValueError("it has no rows")
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
        raise DataError(f"{path} is no table of runs ({error}); write one by scripts/keep_runs.py") from error
    for index, cells in enumerate(table.to_dict("records")):
        row = dict(zip(_OWN, (printable(cells.pop("run")), "", "finished", "", ""), strict=True))
        try:
            values = nested({name: from_cell(cell) for name, cell in cells.items() if cell != ""})
            config, summary = values.pop(_CONFIG.removesuffix("."), {}), Summary.parse(json.dumps(values))
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
        raise ValueError(f"the summary does not say {', '.join(unknown) or 'provenance.seed'}")
