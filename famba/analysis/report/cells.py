"""What the tables show: columns, their headers with units, and the text of each cell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from famba.analysis.report.paper import has_model
from famba.analysis.report.rows import Row, Table
from famba.analysis.report.statistics import Difference, Sample

MINUS, TIMES = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
EMPTY = ""
GAP = "-"
_UNITS = ((5400.0, 3600.0, "h"), (90.0, 60.0, "min"), (0.0, 1.0, "s"))
_ELSEWHERE = " *"


class Sheet(NamedTuple):
    """A table as text: rows of cells under headers; numeric columns are set to the right."""

    title: str
    headers: list[str]
    is_numeric: list[bool]
    rows: list[list[str]]


class _Column(NamedTuple):
    header: str
    is_numeric: bool
    cell: Callable[[Row], str]


_PAPER = (
    _Column("paper: Top-1, %", True, lambda row: EMPTY if row.printed.top1 is None else f"{row.printed.top1:.1f}"),
    _Column("paper: time", True, lambda row: row.printed.time or EMPTY),
)


def sheets(table: Table) -> list[Sheet]:
    """Return the two tables of a model: results as the paper has them, and what they cost in detail.

    Columns for the paper's own figures are there for the models of which it has some.
    """
    factor, unit = _time_unit(table.rows)
    results = [
        _Column("fusion", False, lambda row: row.label),
        _Column("seeds", True, lambda row: str(len(row.runs))),
        _Column("Top-1, %", True, lambda row: spread(row.top1, 2)),
        _Column("difference to none, points (95 % interval)", True, _difference_cell),
        _Column("Top-5, %", True, lambda row: spread(row.top5, 2)),
        _Column(f"training time, {unit}", True, lambda row: spread(row.time_s, 1, 1 / factor) + _mark(row)),
        _Column("of none", True, lambda row: share(row.time_share)),
        _Column("peak memory, MiB", True, lambda row: spread(row.memory_mib, 0) + _mark(row)),
        _Column("of none", True, lambda row: share(row.memory_share)),
    ]
    if any(has_model(run.model) for row in table.rows for run in row.runs):
        results += _PAPER
    costs = [
        _Column("fusion", False, lambda row: row.label),
        _Column("images/s", True, lambda row: spread(row.images_per_s, 1) + _mark(row)),
        _Column("saved for the backward, kB/image", True, lambda row: _mean(row.saved_bytes, 0, 1e-3) + _mark(row)),
        _Column("of none", True, lambda row: share(row.saved_share)),
        _Column("FLOPs (multiply-adds), M/image", True, lambda row: _mean(row.macs, 1, 1e-6)),
        _Column("parameters, M", True, lambda row: _mean(row.parameters, 2, 1e-6)),
        _Column("tokens left", True, lambda row: f"{_count(row.tokens_left)} of {row.tokens}"),
        _Column("token-layers, of all", True, lambda row: f"{row.token_layers:.3f}"),
    ]
    return [_sheet("Results", results, table.rows), _sheet("Cost", costs, table.rows)]


def spread(found: Sample | None, digits: int, factor: float = 1.0) -> str:
    """Write a mean and its standard deviation; the mean alone for one seed, a dash for none."""
    if found is None:
        return GAP
    mean = f"{factor * found.mean:.{digits}f}"
    return mean if found.sd is None else f"{mean} ± {factor * found.sd:.{digits}f}"


def share(value: float | None) -> str:
    """Write a share of none, a dash where there is none."""
    return GAP if value is None else f"{value:.3f}"


def signed(value: float, digits: int = 2) -> str:
    """Write a number with its sign, and none for what rounds to 0."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", MINUS)


def difference(found: Difference) -> str:
    """Write a difference and its interval, or that one seed has none."""
    if found.low is None or found.high is None:
        return f"{signed(found.mean)} (one seed)"
    low, high = (_away_from_zero(value) for value in (found.low, found.high))
    return f"{signed(found.mean)} ({low} to {high})"


def _away_from_zero(value: float) -> str:
    """Write an end of an interval with as many digits as show on which side of 0 it lies, up to four."""
    return next((text for digits in (2, 3, 4) if (text := signed(value, digits))[0] in f"+{MINUS}"), signed(value))


def _difference_cell(row: Row) -> str:
    return GAP if row.difference is None else difference(row.difference)


def _time_unit(rows: Sequence[Row]) -> tuple[float, str]:
    longest = max((row.time_s.mean for row in rows if row.time_s), default=0.0)
    return next((seconds, name) for least, seconds, name in _UNITS if longest >= least)


def time_unit(table: Table) -> tuple[float, str]:
    """Return the seconds of the unit that a table's times are written in, and its name."""
    return _time_unit(table.rows)


def _mean(found: Sample | None, digits: int, factor: float) -> str:
    return GAP if found is None else f"{factor * found.mean:,.{digits}f}"


def _count(found: Sample) -> str:
    return f"{found.mean:.0f}" if found.mean == round(found.mean) else f"{found.mean:.1f}"


def _mark(row: Row) -> str:
    return _ELSEWHERE if row.is_elsewhere else ""


def _sheet(title: str, columns: Sequence[_Column], rows: Sequence[Row]) -> Sheet:
    return Sheet(
        title,
        [column.header for column in columns],
        [column.is_numeric for column in columns],
        [[column.cell(row) for column in columns] for row in rows],
    )
