"""Everything that a benchmark found: tables for the terminal and for a page, and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tabulate import tabulate

from famba.errors import ConfigError

BEGIN, END = (f"<!-- famba benchmark gpu: {word} -->" for word in ("begin", "end"))
_PACKAGES = ("torch", "timm", "triton", "mamba-ssm", "causal-conv1d")
Row = dict[str, Any]


@dataclass
class Report:
    """Hold what one call of `famba benchmark` found; filled while it runs, so that an interruption loses little.

    provenance: as in a run's summary. tables: rows by title. left_out: what was not measured, and why.
    """

    benchmark: str
    provenance: dict[str, Any]
    settings: dict[str, Any]
    tables: dict[str, list[Row]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    complete: bool = False

    def text(self, style: str) -> str:
        """Return everything, with tables in a style of tabulate's."""
        of = self.provenance
        packages = ", ".join(f"{name} {of['packages'][name]}" for name in _PACKAGES if name in of["packages"])
        parts = [
            f"`famba benchmark {self.benchmark}` on {of['device']}, CUDA {of['cuda']}, ops by {of['backend']}; "
            f"{of['started']}, famba {of['famba']} at commit {of['git_commit']}, Python {of['python']}, {packages}; "
            f"medians of {self.settings['rounds']} rounds."
        ]
        parts += [f"{title}:\n\n{table(rows, style)}" for title, rows in self.tables.items() if rows]
        parts += [f"Left out: {name}: {reason}." for name, reason in self.left_out.items()]
        parts += [f"Note: {note}." for note in self.notes]
        parts += [] if self.complete else ["Stopped before the end: this is what had been measured."]
        return "\n\n".join(parts)

    def write(self, file: Path | None) -> None:
        """Write everything as JSON where a file is given, unrounded, every sample included."""
        if file is not None:
            file.write_text(json.dumps(asdict(self), indent=2) + "\n")


def table(rows: list[Row], style: str) -> str:
    """Return rows in a style of tabulate's; samples and columns that no row fills are left out."""
    keys = dict.fromkeys(key for row in rows for key in row if not key.endswith("_samples"))
    shown = [key for key in keys if any(row.get(key) is not None for row in rows)]
    cells = [[_cell(row.get(key)) for key in shown] for row in rows]
    return tabulate(cells, [key.replace("_", " ") for key in shown], style, disable_numparse=True, missingval="-")


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:,.{0 if value >= 1000 else 3}f}"
    return f"{value:,}" if type(value) is int else value


def filled(file: Path, text: str) -> str:
    """Return what a file holds, with `text` between its markers; raises ConfigError where they are not there once."""
    try:
        page = file.read_text()
    except OSError as error:
        raise ConfigError(f"--fill {file} cannot be read ({error.strerror}); name a file with markers") from error
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ConfigError(f"--fill {file}: expected one line {BEGIN} and below it one line {END}")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"
