"""Everything that a benchmark found: tables for the terminal and for a page, and as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from tabulate import tabulate

from famba.errors import ConfigError

BEGIN, END = (f"<!-- famba benchmark gpu: {word} -->" for word in ("begin", "end"))
_PACKAGES = ("torch", "timm", "triton", "mamba-ssm", "causal-conv1d")


@dataclass
class Table:
    """Rows under a title; columns are the keys that are shown, rows are what JSON holds."""

    title: str
    columns: tuple[str, ...]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def text(self, style: str) -> str:
        """Return title and rows in a style of tabulate's; a column that no row fills is left out."""
        shown = [key for key in self.columns if any(row.get(key) is not None for row in self.rows)]
        cells = [[_cell(row.get(key)) for key in shown] for row in self.rows]
        heads = [key.replace("_", " ") for key in shown]
        return f"{self.title}:\n\n" + tabulate(cells, headers=heads, tablefmt=style, disable_numparse=True)


@dataclass
class Report:
    """What one call of `famba benchmark` has to say; filled while it runs, so that an interruption loses little.

    provenance: as in a run's summary. tables: by their names in JSON. left_out: what was not measured, and why.
    """

    benchmark: str
    provenance: dict[str, Any]
    settings: dict[str, Any]
    tables: dict[str, Table] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    complete: bool = False

    def leave_out(self, name: str, reason: str) -> None:
        """Say why something was not measured, each reason once."""
        if (line := f"{name}: {reason}") not in self.left_out:
            self.left_out.append(line)

    def text(self, style: str) -> str:
        """Return everything, with tables in a style of tabulate's."""
        of = self.provenance
        packages = ", ".join(f"{name} {of['packages'][name]}" for name in _PACKAGES if name in of["packages"])
        parts = [
            f"`famba benchmark {self.benchmark}` on {of['device']}, CUDA {of['cuda']}, ops by {of['backend']}; "
            f"{of['started']}, famba {of['famba']} at commit {of['git_commit']}, Python {of['python']}, {packages}; "
            f"medians of {self.settings['rounds']} rounds."
        ]
        parts += [table.text(style) for table in self.tables.values() if table.rows]
        parts += ["\n".join(["Left out:\n", *(f"- {line}" for line in self.left_out)])] if self.left_out else []
        parts += [f"Note: {note}." for note in self.notes]
        parts += [] if self.complete else ["Stopped before the end: this is what had been measured."]
        return "\n\n".join(parts)

    def write(self, file: Path | None) -> None:
        """Write everything as JSON where a file is given, unrounded, every sample included."""
        if file is not None:
            shown = {name: [table.title, table.columns] for name, table in self.tables.items()}
            rows = {name: table.rows for name, table in self.tables.items()}
            file.write_text(json.dumps({**vars(self), "tables": shown, **rows}, indent=2) + "\n")

    @classmethod
    def read(cls, file: Path) -> Report:
        """Return what `write` wrote to a file; raises ConfigError for another file."""
        try:
            found = json.loads(file.read_text())
            tables = {
                name: Table(title, tuple(columns), found[name]) for name, (title, columns) in found["tables"].items()
            }
            return cls(**{member.name: found[member.name] for member in fields(cls)} | {"tables": tables})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"--from {file} is not what famba benchmark --json writes ({error!r})") from error


def filled(file: Path, text: str) -> str:
    """Return what a file holds, with `text` between its markers.

    Raises:
        ConfigError: it cannot be read, or the markers are not there once each, in order.
    """
    try:
        page = file.read_text()
    except OSError as error:
        raise ConfigError(f"--fill {file} cannot be read ({error.strerror}); name a file with markers") from error
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ConfigError(
            f"--fill {file}: expected one line {BEGIN} and below it one line {END}; tables go between them"
        )
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def _cell(value: Any) -> str:
    """Write a number with three digits that count, and no fewer than stand before the point."""
    if isinstance(value, float):
        return f"{value:,.{next((n for n, limit in enumerate((100, 10, 1, 0.1)) if abs(value) >= limit), 4)}f}"
    return "-" if value is None else f"{value:,}" if type(value) is int else str(value)
