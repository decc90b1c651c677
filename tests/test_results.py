"""What docs/results.md shows is what `famba report` makes of the runs that are kept there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from famba.analysis.report.output import write_report

DOCS = Path(__file__).parents[1] / "docs"
RUNS = DOCS / "results" / "cpu_table"

pytestmark = pytest.mark.skipif(not RUNS.is_dir(), reason="docs/results is not part of an installed package")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report on the runs that are kept, as the document's command makes it."""
    folder = tmp_path_factory.mktemp("report")
    write_report([RUNS], folder)
    return folder


def test_the_report_is_made_again_from_the_runs(made: Path) -> None:
    kept = DOCS / "results" / "report"
    for name in ("report.md", "report.csv"):
        assert (made / name).read_text() == (kept / name).read_text(), name
    assert {plot.name for plot in made.glob("plots/*.svg")} == {plot.name for plot in kept.glob("plots/*.svg")}


def test_every_row_of_the_documents_tables_is_in_the_report(made: Path) -> None:
    report = (made / "report.md").read_text().splitlines()
    shown = [line for line in (DOCS / "results.md").read_text().splitlines() if line.startswith("|")]
    assert shown
    assert set(shown) <= set(report)
    pictures = [part.split(")")[0] for part in (DOCS / "results.md").read_text().split("](")[1:]]
    assert all((DOCS / picture).exists() for picture in pictures if not picture.startswith("http"))


def test_the_readme_shows_rows_of_the_report(made: Path) -> None:
    report = (made / "report.md").read_text()
    readme = (DOCS.parent / "README.md").read_text()
    section = readme.split("<!-- results -->")[1].split("<!-- end of results -->")[0]
    rows = [line for line in section.splitlines() if line.startswith("|") and "---" not in line][1:]
    assert rows
    for row in rows:
        name, top1 = (cell.strip() for cell in row.split("|")[1:3])
        assert any(line.startswith(f"| {name} ") and f" {top1} " in line for line in report.splitlines()), row


@pytest.mark.parametrize("run", sorted(RUNS.parent.glob("*/*/summary.json")), ids=lambda path: path.parent.name)
def test_kept_runs_are_finished_and_name_no_folder_of_a_machine(run: Path) -> None:
    assert json.loads(run.read_text())["status"] == "finished"
    for name in ("summary.json", "config.yaml", "metrics.jsonl"):
        text = (run.parent / name).read_text()
        assert not any(start in text for start in ("/home/", "/root/", "/tmp/", "/mnt/", "/Users/"))
