"""The documents show what the commands beside their tables make of the runs that are kept."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pandas as pd
import pytest

from famba.analysis.report import gather

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
RUNS = DOCS / "results" / "runs.csv"

pytestmark = pytest.mark.skipif(not RUNS.is_file(), reason="docs/results is not part of an installed package")


def test_the_documents_hold_the_report_of_the_kept_runs() -> None:
    spec = importlib.util.spec_from_file_location("keep_runs", ROOT / "scripts" / "keep_runs.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    report = gather([RUNS])
    for (document, name), text in script.texts(report).items():
        assert script.parts(document, name)[1] == text, f"{name} in {document.name}"
    for name in script.PLOTS:
        assert any(plot.name.endswith(name) for plot in report.tables[0].plots)
    assert not any(start in RUNS.read_text() for start in script.PRIVATE)


def test_the_steps_of_the_xeon_are_those_that_were_measured() -> None:
    lines = (DOCS / "performance.md").read_text().partition("## With AVX-512")[2].splitlines()
    rows = {
        cells[1].strip("` ").removeprefix("timm's `"): cells for line in lines if len(cells := line.split("|")) == 9
    }
    for row in pd.read_csv(DOCS / "results" / "avx512_vim_tiny_step.csv").itertuples():
        step, of_none = (rows[row.contestant][i + 3 * (row.precision == "bf16")] for i in (2, 3))
        assert (step.strip(), of_none.strip()) == (f"{row.step_ms / 1000:.2f} s", f"{row.step_of_none:.3f}")
