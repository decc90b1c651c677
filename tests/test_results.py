"""What the documents show is what the commands beside it make of the runs that are kept."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
RUNS = DOCS / "results" / "cpu_table"

pytestmark = pytest.mark.skipif(not RUNS.is_dir(), reason="docs/results is not part of an installed package")


@pytest.fixture(scope="module")
def publish() -> ModuleType:
    """scripts/publish_results.py as a module."""
    spec = importlib.util.spec_from_file_location("publish_results", ROOT / "scripts" / "publish_results.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_reports_and_documents_are_made_again_from_the_runs(
    publish: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> None:
    made = tmp_path_factory.mktemp("report")
    for (document, name), text in publish.texts(made).items():
        assert publish.parts(document, name)[1] == text, f"{name} in {document.name}"
    kept = DOCS / "results" / "report"
    for name in ("report.md", "report.csv"):
        assert (made / name).read_text() == (kept / name).read_text(), name
    assert {plot.name for plot in made.glob("plots/*.svg")} == {plot.name for plot in kept.glob("plots/*.svg")}


def test_every_picture_of_the_document_is_there() -> None:
    pictures = [part.split(")")[0] for part in (DOCS / "results.md").read_text().split("](")[1:]]
    assert pictures
    assert all((DOCS / picture).exists() for picture in pictures if not picture.startswith("http"))


@pytest.mark.parametrize("run", sorted(RUNS.parent.glob("*/*/summary.json")), ids=lambda path: path.parent.name)
def test_kept_runs_are_finished_and_name_no_folder_of_a_machine(run: Path) -> None:
    assert json.loads(run.read_text())["status"] == "finished"
    for name in ("summary.json", "config.yaml", "metrics.jsonl"):
        text = (run.parent / name).read_text()
        assert not any(start in text for start in ("/home/", "/root/", "/tmp/", "/mnt/", "/Users/"))


def test_the_steps_of_the_xeon_are_those_that_were_measured() -> None:
    found = json.loads((DOCS / "results" / "cpu_avx512" / "vim_tiny_step.json").read_text())["times"]
    lines = (DOCS / "performance.md").read_text().partition("## With AVX-512")[2].splitlines()
    rows = {
        cells[1].strip("` ").removeprefix("timm's `"): cells for line in lines if len(cells := line.split("|")) == 9
    }
    for row in found:
        step, of_none = (rows[row["contestant"]][i + 3 * (row["precision"] == "bf16")] for i in (2, 3))
        assert (step.strip(), of_none.strip()) == (f"{row['step_ms'] / 1000:.2f} s", f"{row['step_of_none']:.3f}")
