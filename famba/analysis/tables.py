"""Run folders side by side in a table."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tabulate import tabulate

from famba.analysis.folders import check_folder
from famba.errors import DataError

_COLUMNS = ("model", "fusion", "seed", "Top-1 %", "time per epoch s", "tokens left", "status")


def find_runs(paths: Iterable[str | Path]) -> list[Path]:
    """Folders with a summary.json in or below the given ones. Raises DataError for a path that has none."""
    runs: list[Path] = []
    for path in map(Path, paths):
        check_folder(path)
        found = sorted(file.parent for file in path.rglob("summary.json"))
        if not found:
            raise DataError(
                f"no run in {path} has a summary.json yet; give the run_dir of a run or of a sweep, or look at what is "
                f"there by famba status {path}"
            )
        runs += found
    return runs


def run_table(runs: Iterable[Path]) -> str:
    """Return a table of runs: Top-1, time per epoch, tokens left after the last layer; "-" where a run has none yet."""
    rows = [_row(_read(run)) for run in runs]
    return tabulate(rows, headers=_COLUMNS, floatfmt=".2f", missingval="-")


def _read(run: Path) -> dict[str, Any]:
    try:
        found = json.loads((run / "summary.json").read_text())
        if not isinstance(found, dict):
            raise ValueError("it holds no summary")
    except (OSError, ValueError) as error:
        raise DataError(f"{run / 'summary.json'} is damaged ({error}); leave this run out, or run it again") from error
    return found


def _row(summary: dict[str, Any]) -> list[Any]:
    """One run; a run that failed before its first step knows little of itself."""
    times, left = summary.get("epoch_time_s"), summary.get("tokens_per_layer")
    return [
        summary.get("model"),
        summary.get("strategy"),
        summary.get("provenance", {}).get("seed"),
        summary.get("top1"),
        sum(times.values()) if times else None,
        f"{left[-1]} of {summary.get('tokens', '?')}" if left else None,
        summary.get("status"),
    ]
