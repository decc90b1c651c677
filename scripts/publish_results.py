"""Make the reports on the runs that are kept, and put their tables into docs/results.md and README.md.

    python scripts/publish_results.py

The documents hold the tables between markers; everything else in them is written by hand.
"""

from __future__ import annotations

import csv
import re
import shutil
import sys
from collections import defaultdict
from pathlib import Path

from famba.analysis.report.cells import difference, spread
from famba.analysis.report.contents import gather
from famba.analysis.report.output import write_report
from famba.analysis.report.statistics import paired

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "docs/results"
TABLE, REPORT = KEPT / "cpu_table", KEPT / "report"
# Beside the table's own runs: other orders and weightings.
OTHER_WAYS = ("cpu_order", "cpu_weighting")
# Made again in a second, and half a megabyte.
NOT_KEPT = ("report.html", "report.tex")
README_COLUMNS = ("fusion", "Top-1, %", "seeds", "difference to none", "training time, min", "of none")
WAY_ROWS = ("all", "upper")
SHELF = {"vim": "`vim_micro`", "vit": "`vit_micro`"}

Texts = dict[tuple[Path, str], str]


def main() -> int:
    """Write the report and both documents."""
    shutil.rmtree(REPORT, ignore_errors=True)
    for (document, name), text in texts(REPORT).items():
        fill(document, name, text)
    for name in NOT_KEPT:
        (REPORT / name).unlink()
    for picture in REPORT.glob("plots/*.png"):
        picture.unlink()
    return 0


def texts(report: Path) -> Texts:
    """Write the report on the table's runs to a folder; return what belongs between each document's markers."""
    write_report([TABLE], report)
    results, costs = tables((report / "report.md").read_text())[:2]
    return {
        (ROOT / "docs/results.md", "tables"): f"{results}\n\n{costs}",
        (ROOT / "docs/results.md", "shares"): shares(report / "report.csv"),
        (ROOT / "docs/results.md", "ways"): ways(),
        (ROOT / "docs/results.md", "shelf"): "\n\n".join(map(shelf, SHELF)),
        (ROOT / "README.md", "results"): columns(results, README_COLUMNS),
    }


def shares(report: Path) -> str:
    """The share of none's multiply-adds, by which `famba plan` predicts a step, beside that of its training time."""
    rows = list(csv.DictReader(report.read_text().splitlines()))
    none = next(row for row in rows if row["fusion"] == "none")
    lines = ["| fusion | multiply-adds, of none | training time, of none |", "| --- | --- | --- |"]
    for row in rows:
        predicted = float(row["macs_per_image"]) / float(none["macs_per_image"])
        measured = row["train_time_share_of_none"]
        lines.append(f"| {row['fusion']} | {predicted:.3f} | {float(measured):.3f} |")
    return "\n".join(lines)


def ways() -> str:
    """Orders and weightings, of the strategies that were trained with them, against the table's own by seed."""
    report = gather([TABLE, *(KEPT / name for name in OTHER_WAYS)])
    lines = [
        "| fusion | seeds | Top-1, % | difference to the first, points (95 % interval) | to none |",
        "| --- | --- | --- | --- | --- |",
    ]
    for strategy in WAY_ROWS:
        rows = [row for row in report.parts[0].table.rows if row.fusion.strategy == strategy]
        for row in rows:
            against = paired(row.by_seed(), rows[0].by_seed()) if row is not rows[0] else None
            cells = [
                row.label,
                str(len(row.seeds)),
                spread(row.top1, 2),
                *("-" if found is None else difference(found) for found in (against, row.difference)),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def shelf(name: str) -> str:
    """Top-1 of a network that was trained without fusion, by tokens removed and the way that they go."""
    found: dict[int, dict[str, str]] = defaultdict(dict)
    speed: dict[int, str] = {}
    rows = (KEPT / "off_the_shelf" / name / "evaluate.csv").read_text().splitlines()
    for row in csv.DictReader(rows):
        removed = int(row["removed"])
        way = f"{row['mode']}, {row['order']}" if removed else ""
        found[removed][way] = f"{float(row['top1']):.2f}"
        if not removed or way == "fuse, sequence":
            speed[removed] = row["images_per_s"]
    of = list(dict.fromkeys(way for cells in found.values() for way in cells if way))
    lines = [f"| {SHELF[name]}: tokens removed | {' | '.join(of)} | images/s, fused |", "| --- " * (len(of) + 2) + "|"]
    for removed, cells in sorted(found.items()):
        shown = [cells.get(way, cells.get("", "")) for way in of]
        times = float(speed[removed]) / float(speed[0])
        lines.append(f"| {removed} | {' | '.join(shown)} | {float(speed[removed]):.0f} ({times:.2f} of none) |")
    return "\n".join(lines)


def tables(report: str) -> list[str]:
    """The report's tables as Markdown, in order."""
    return [block.strip() for block in re.findall(r"(?:^\|.*\n)+", report, re.MULTILINE)]


def columns(table: str, names: tuple[str, ...]) -> str:
    """Those of a table's columns whose names begin so, the first of each."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    header = rows[0]
    chosen = [next(i for i, name in enumerate(header) if name.startswith(start)) for start in names]
    rows[1] = ["---"] * len(header)
    return "\n".join("| " + " | ".join(row[i] for i in chosen) + " |" for row in rows)


def fill(document: Path, name: str, text: str) -> None:
    """Replace what stands between a document's markers."""
    before, _, after = parts(document, name)
    document.write_text(f"{before}<!-- {name} -->\n{text}\n<!-- end of {name} -->{after}")


def parts(document: Path, name: str) -> tuple[str, str, str]:
    """A document before, between and behind the markers of a name."""
    before, rest = document.read_text().split(f"<!-- {name} -->")
    between, after = rest.split(f"<!-- end of {name} -->")
    return before, between.strip(), after


if __name__ == "__main__":
    sys.exit(main())
