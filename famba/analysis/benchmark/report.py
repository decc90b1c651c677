"""What a benchmark found, as tables for the terminal and as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tabulate import tabulate

# Packages whose versions the terminal is told; JSON has all.
_TOLD = ("torch", "timm", "mambapy", "mamba-ssm")
_TOLD_ON_CUDA = ("triton", "causal-conv1d")


@dataclass
class Table:
    """Rows under a title.

    columns: header to key in a row, whose ending says how it is shown ("_ms", "_us", "_bytes", "_mib"; other floats
    are ratios). rows: what JSON holds, more than is shown.
    """

    title: str
    columns: dict[str, str]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def text(self) -> str:
        """The title and the rows; a column that no row fills is left out, "-" stands for what one row lacks."""
        shown = {h: key for h, key in self.columns.items() if any(row.get(key) is not None for row in self.rows)}
        cells = [[_cell(row, key) for key in shown.values()] for row in self.rows]
        sides = ["left" if isinstance(self.rows[0].get(key), str) else "right" for key in shown.values()]
        return f"{self.title}\n\n" + tabulate(cells, headers=list(shown), disable_numparse=True, colalign=sides)


@dataclass
class Report:
    """Everything one call of `famba benchmark` has to say; filled while it runs, so that an interruption loses little.

    provenance: what `machine.describe` returns. settings: what was asked for. notes: what a reader has to know.
    left_out: what was not measured, and why. tables: by their name in JSON.
    """

    benchmark: str
    provenance: dict[str, Any]
    settings: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    tables: dict[str, Table] = field(default_factory=dict)
    complete: bool = False

    @property
    def measured(self) -> bool:
        """Whether there is anything to show."""
        return any(table.rows for table in self.tables.values())

    def leave_out(self, reasons: dict[str, str]) -> None:
        """Say why something was not measured, each reason once."""
        for name, reason in reasons.items():
            line = f"{name}: {reason}"
            if line not in self.left_out:
                self.left_out.append(line)

    def text(self) -> str:
        """Everything for the terminal."""
        parts = [_origin(self.provenance), *(table.text() for table in self.tables.values() if table.rows)]
        if self.left_out:
            parts.append("Left out:\n" + "\n".join(f"- {line}" for line in self.left_out))
        parts += [f"Note: {note}." for note in self.notes]
        if not self.complete:
            parts.append("Stopped before the end: this is what had been measured.")
        return "\n\n".join(parts)

    def entries(self) -> dict[str, Any]:
        """Everything, unrounded, every sample included."""
        return {
            "benchmark": self.benchmark,
            "complete": self.complete,
            "provenance": self.provenance,
            "settings": self.settings,
            "notes": self.notes,
            "left_out": self.left_out,
            **{name: table.rows for name, table in self.tables.items()},
        }

    def write_json(self, path: Path) -> None:
        """Write all entries."""
        path.write_text(json.dumps(self.entries(), indent=2) + "\n")


def told_packages(provenance: dict[str, Any]) -> str:
    """Names and versions of the packages that matter for a time."""
    packages = provenance["packages"]
    told = _TOLD if provenance["cuda"] is None else _TOLD + _TOLD_ON_CUDA
    return ", ".join(f"{name} {packages[name]}" for name in told if name in packages)


def _origin(provenance: dict[str, Any]) -> str:
    packages = told_packages(provenance)
    native = f"native kernels: {provenance['native_isa']}"
    kernels = native if provenance["cuda"] is None else f"CUDA {provenance['cuda']}, backend: {provenance['backend']}"
    return (
        f"{provenance['device']}, {kernels}\n"
        f"famba {provenance['famba']}, commit {provenance['git_commit']}, Python {provenance['python']}, {packages}\n"
        f"{provenance['started']}; medians, in brackets the first and third quartile"
    )


def _cell(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if value is None:
        return "-"
    if isinstance(value, str | int):
        return f"{value:,}" if key.endswith("_bytes") else str(value)
    if f"{key}_quartiles" in row:
        low, high = row[f"{key}_quartiles"]
        return f"{short(value)} ({short(low)}-{short(high)})"
    return f"{value:.0f}" if key.endswith(("_mib", "_bytes")) else short(value)


def short(value: float) -> str:
    """Three digits that count, and no fewer than stand before the point."""
    digits = next((n for n, limit in enumerate((100, 10, 1, 0.1)) if abs(value) >= limit), 4)
    return f"{value:.{digits}f}"
