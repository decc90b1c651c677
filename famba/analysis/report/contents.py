"""A report as a whole, before it is put into any format."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from famba.analysis.report.cells import Sheet, sheets
from famba.analysis.report.comparable import Comparable, differences, sort_out
from famba.analysis.report.conclusion import conclusions
from famba.analysis.report.notes import READING, notes, shared
from famba.analysis.report.plots import Plot, plots
from famba.analysis.report.rows import Table, build_table
from famba.analysis.report.runs import LeftOut, read_runs
from famba.errors import DataError

_KINDS = {
    "unfinished": "Not finished",
    "damaged": "Damaged",
    "other recipe, data or code": "Another recipe, other data or other code than the table of their model",
    "repeated": "The same setting and seed more than once",
    "elsewhere": "Counted for accuracy alone: trained elsewhere, so not for time, throughput and memory",
}
_TOLD = 8


class Group(NamedTuple):
    """Runs that are left out for reasons of one kind. listed: the reasons, and the names of the runs they hold for."""

    title: str
    runs: list[LeftOut]

    @property
    def listed(self) -> list[tuple[str, tuple[str, ...]]]:
        """Names of the runs that share their reasons, and the reasons."""
        same: dict[tuple[str, ...], list[str]] = {}
        for run in self.runs:
            same.setdefault(run.reasons, []).append(run.name)
        return [("; ".join(names), reasons) for reasons, names in same.items()]


@dataclass(frozen=True)
class Part:
    """All that a report has to say of one model."""

    table: Table
    sheets: list[Sheet]
    conclusions: list[str]
    notes: list[str]
    shared: list[tuple[str, str]]
    plots: list[Plot]


@dataclass(frozen=True)
class Report:
    """A part for each model, and the runs that are left out; counted: how many runs are in the tables."""

    parts: list[Part]
    left_out: list[Group]
    counted: int
    headline: str
    reading: Sequence[str] = READING


def gather(paths: Iterable[str | Path]) -> Report:
    """Read runs and work out a report. Raises DataError where no table can be made of them."""
    runs, unusable = read_runs(paths)
    tables, others = sort_out(runs)
    left_out = [*unusable, *others]
    tables = [table for table in tables if table.runs]
    if not tables:
        raise DataError(_nothing(left_out))
    left_out += [remark for table in tables for remark in table.remarks]
    groups = [Group(title, [run for run in left_out if run.kind == kind]) for kind, title in _KINDS.items()]
    groups = [group for group in groups if group.runs]
    counted = sum(len(table.runs) for table in tables)
    across = _across(tables)
    parts = [_part(table, stem, across) for table, stem in zip(tables, _stems(tables), strict=True)]
    return Report(parts, groups, counted, _headline(counted, tables, groups))


def _part(comparable: Comparable, stem: str, across: Sequence[str]) -> Part:
    table = build_table(comparable)
    return Part(
        table=table,
        sheets=sheets(table),
        conclusions=conclusions(table),
        notes=[*notes(table), *across],
        shared=shared(table),
        plots=plots(table, stem),
    )


def _across(tables: Sequence[Comparable]) -> list[str]:
    """A warning where the tables of several models are not of one recipe."""
    first = tables[0]
    found = []
    for table in tables[1:]:
        keys = [line.partition(":")[0] for line in differences(first.what, table.what) if line[:10] != "parameters"]
        if keys:
            found.append(
                f"The runs of {first.model} and {table.model} differ in {', '.join(keys)}: compare within a model only."
            )
        if first.place != table.place:
            found.append(
                f"The runs of {first.model} and {table.model} come from different machines: compare times within a "
                "model only."
            )
    return found


def _headline(counted: int, tables: Sequence[Comparable], groups: Sequence[Group]) -> str:
    models = "one model" if len(tables) == 1 else f"{len(tables)} models"
    said = f"{counted} run{'' if counted == 1 else 's'} of {models} in the tables"
    out = sum(len(group.runs) for group in groups if group.title != _KINDS["elsewhere"])
    if out:
        said += f"; {out} left out, listed below with what differs"
    elsewhere = sum(len(table.remarks) for table in tables)
    if elsewhere:
        said += f"; {elsewhere} counted for accuracy alone"
    return f"{said}."


def _nothing(left_out: Sequence[LeftOut]) -> str:
    lines = [f"  {run.name}: {'; '.join(run.reasons)}" for run in left_out[:_TOLD]]
    more = [f"  and {len(left_out) - _TOLD} more"] if len(left_out) > _TOLD else []
    reasons = "\n".join([*lines, *more])
    return f"no run of these can stand in a table:\n{reasons}\nWait for them, continue them, or name other folders"


def _stems(tables: Sequence[Comparable]) -> list[str]:
    """A name for the files of each model, which differ also where letter cases do not count."""
    stems: list[str] = []
    for table in tables:
        stem = re.sub(r"[^a-z0-9]+", "-", table.model.lower()).strip("-")[:60] or "model"
        stems.append(stem if stem not in stems else f"{stem}-{len(stems) + 1}")
    return stems
