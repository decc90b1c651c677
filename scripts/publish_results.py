"""Make the report on the runs that are kept, and put its tables into docs/results.md and README.md.

    python scripts/publish_results.py

The documents hold the tables between markers; everything else in them is written by hand.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from famba.analysis.report.output import write_report

ROOT = Path(__file__).resolve().parents[1]
RUNS, REPORT = ROOT / "docs/results/cpu_table", ROOT / "docs/results/report"
# Made again in a second, and half a megabyte.
NOT_KEPT = ("report.html", "report.tex")
README_COLUMNS = ("fusion", "Top-1, %", "seeds", "difference to none", "training time, min", "of none")


def main() -> int:
    """Write the report and both documents."""
    shutil.rmtree(REPORT, ignore_errors=True)
    write_report([RUNS], REPORT)
    for name in NOT_KEPT:
        (REPORT / name).unlink()
    for picture in REPORT.glob("plots/*.png"):
        picture.unlink()
    results, costs = tables((REPORT / "report.md").read_text())[:2]
    fill(ROOT / "docs/results.md", "tables", f"{results}\n\n{costs}")
    fill(ROOT / "README.md", "results", columns(results))
    return 0


def tables(report: str) -> list[str]:
    """The report's tables as Markdown, in order."""
    return [block.strip() for block in re.findall(r"(?:^\|.*\n)+", report, re.MULTILINE)]


def columns(table: str) -> str:
    """Those of a table's columns that the README shows, the first of each name."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    header = rows[0]
    chosen = [next(i for i, name in enumerate(header) if name.startswith(start)) for start in README_COLUMNS]
    rows[1] = ["---"] * len(header)
    return "\n".join("| " + " | ".join(row[i] for i in chosen) + " |" for row in rows)


def fill(document: Path, name: str, text: str) -> None:
    """Replace what stands between a document's markers."""
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, rest = document.read_text().split(start)
    document.write_text(f"{before}{start}\n{text}\n{end}{rest.split(end)[1]}")


if __name__ == "__main__":
    sys.exit(main())
