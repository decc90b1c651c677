"""`famba report`: the files, the terminal, CSV files of runs, and what makes no report."""

from __future__ import annotations

import csv
import re
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from report_runs import MODEL, left_out, write_pair, write_run

from famba.analysis.report import gather, table_csv
from famba.analysis.runs import read_runs, runs_csv
from famba.cli import main as famba

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A mixed folder with names that every format has to escape, and its report."""
    top = tmp_path_factory.mktemp("mixed")
    write_pair(top / "runs")
    write_run(top / "runs" / "<b>|$x_1 & --> {y}", "upper", 3, 99.0, config={"recipe.lr": 0.001})
    small = {"model.name": "vim_small_patch16_224"}
    write_run(top / "runs" / "small", "upper", 0, 75.0, config=small, parameters=2.6e7)
    write_run(top / "runs" / "waiting", "none", 4, 99.0, status="running")
    assert famba(["report", str(top / "runs"), "--out", str(top / "report")]) == 0
    return top / "runs", top / "report"


def test_the_report_is_these_files_and_they_are_whole(mixed: tuple[Path, Path]) -> None:
    found = {str(path.relative_to(mixed[1])) for path in mixed[1].rglob("*") if path.is_file()}
    kinds = ("accuracy_time", "accuracy_memory", "accuracy_saved", "curves_top1", "curves_loss", "tokens")
    stems = [f"plots/{model}-{kind}" for model in ("vim-micro-patch4-32", "vim-small-patch16-224") for kind in kinds]
    pictures = {f"{stem}.{suffix}" for stem in stems for suffix in ("svg", "png")}
    assert found == {"report.md", "report.csv", "report.tex", "report.html", *pictures}
    for picture in (mixed[1] / "plots").glob("*.svg"):
        ET.parse(picture)
    links = re.findall(r"!\[[^]]*\]\(([^)]*)\)", (mixed[1] / "report.md").read_text())
    assert len(links) == 12
    assert all((mixed[1] / link).is_file() for link in links)


def test_all_formats_hold_the_same_numbers(mixed: tuple[Path, Path]) -> None:
    texts = {suffix: (mixed[1] / f"report.{suffix}").read_text() for suffix in ("md", "tex", "html")}
    texts["tex"] = texts["tex"].replace(r"$\pm$", "±").replace("$-$", "-")
    for text in texts.values():
        for number in ("12.00 ± 0.44", "12.50 ± 0.50", "-0.50 (-1.25 to +0.25)", "0.602", "5 of 17", "75.00"):
            assert number in text.replace("\N{MINUS SIGN}", "-")
    rows = list(csv.DictReader((mixed[1] / "report.csv").read_text().splitlines()))
    small = "vim_small_patch16_224"
    assert [(row["model"], row["fusion"]) for row in rows] == [(MODEL, "none"), (MODEL, "upper"), (small, "upper")]
    assert float(rows[1]["top1_percent_sd"]) == pytest.approx(0.43588989)
    assert float(rows[1]["top1_difference_to_none_points_low95"]) == pytest.approx(-1.2452413)
    assert (rows[1]["seeds"], rows[1]["train_time_s_mean"]) == ("0 1 2", "362.0")


def test_names_are_escaped_in_every_format(mixed: tuple[Path, Path]) -> None:
    page, text, tex = ((mixed[1] / f"report.{suffix}").read_text() for suffix in ("html", "md", "tex"))
    assert "runs/&lt;b&gt;|$x_1 &amp; --&gt; {y}" in page
    assert r"runs/\<b\>\|$x\_1 & --\> \{y\}" in text
    assert not re.search(r"(?<!\\)[_#]|(?<!\\)%(?! needs)", tex)
    assert tex.count(r"\begin{tabular}") == tex.count(r"\end{tabular}") == tex.count(r"\toprule") == 4
    for document in (page, text.replace("\\", "")):
        assert "recipe.lr: 0.001, in the table 0.004" in document
        assert "stopped after step 300 of 300" in document


def test_the_page_needs_nothing_but_itself(mixed: tuple[Path, Path]) -> None:
    page = (mixed[1] / "report.html").read_text()
    assert page.count('<img alt="') == page.count('src="data:image/svg+xml;base64,') == 12
    assert not re.search(r"https?:|@import|url\(|<script|<iframe", page)
    for tag in ("table", "figure", "ul", "li", "details", "div", "tr"):
        assert len(re.findall(rf"<{tag}\b", page)) == page.count(f"</{tag}>"), tag


def test_the_same_runs_give_the_same_bytes_elsewhere(mixed: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(mixed[0], tmp_path / "runs")
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "mine.txt").write_text("mine")
    assert famba(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "report")]) == 0
    first, second = (
        {str(path.relative_to(top)): path.read_bytes() for path in top.rglob("*") if path.is_file()}
        for top in (mixed[1], tmp_path / "report")
    )
    assert second.pop("mine.txt") == b"mine"
    assert first == second


# Tables of runs


def test_a_csv_file_reports_as_the_folders_that_it_was_made_of(mixed: tuple[Path, Path], tmp_path: Path) -> None:
    runs = read_runs([mixed[0]])
    (tmp_path / "runs.csv").write_text(runs_csv(runs))
    assert runs_csv(read_runs([tmp_path / "runs.csv"])) == runs_csv(runs)
    assert table_csv(gather([tmp_path / "runs.csv"])) == table_csv(gather([mixed[0]]))
    write_run(tmp_path / "more", "upper", 4, 12.0)
    both = gather([tmp_path / "runs.csv", tmp_path / "more"]).tables[0]
    assert both.rows.loc["upper", "seeds"] == "0 1 2 4"


def test_a_row_that_is_damaged_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = runs_csv(read_runs([write_pair(tmp_path / "runs")]))
    (tmp_path / "runs.csv").write_text(text.replace("12.3,", "high,"))
    (_, reason) = left_out(tmp_path / "runs.csv")["upper2"]
    assert reason.startswith("its row in runs.csv is damaged: top1 is 'high'")
    for content in ("", "a,b\n1,2\n", "\xff"):
        (tmp_path / "other.csv").write_bytes(content.encode("latin-1"))
        assert famba(["report", str(tmp_path / "other.csv")]) == 2
        assert "other.csv is no table of runs" in capsys.readouterr().err


def test_a_run_of_an_earlier_version_is_read() -> None:
    assert gather([ROOT / "tests" / "earlier" / "0.1"]).tables[0].rows.loc["upper", "top1_percent_mean"] == 25.0


# The terminal, and errors


def test_the_terminal_lists_every_run(
    mixed: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (write_run(tmp_path / "torn") / "summary.json").write_text("{")
    assert famba(["report", str(mixed[0]), str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[2:12]].count("finished") == 8
    assert any("99.00" in line and line.endswith("stopped") for line in lines)
    assert "torn: summary.json is damaged: it holds no summary" in lines[-1]


def test_nothing_to_report_on_is_an_error_that_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "report"
    write_run(tmp_path / "runs" / "failed", status="failed", error="the loss is nan")
    (write_run(tmp_path / "runs" / "damaged") / "summary.json").write_text("[]")
    assert famba(["report", str(tmp_path / "runs"), "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert "no run of these can stand in a table" in message
    assert "runs/failed: failed after step 300 of 300: the loss is nan" in message
    assert "runs/damaged: summary.json is damaged: it holds no summary" in message
    assert not (tmp_path / "new").exists()


def test_paths_are_looked_at_first_and_errors_say_what_to_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path / "runs" / "sweep" / "one")
    (tmp_path / "file").write_text("mine")
    for arguments, said in (
        (["runs/swep"], "no run in runs/swep: it is not there"),
        (["runs/swep"], "holds the folders sweep"),
        ([str(run / "summary.json")], f"is a file; give the folder of a run, or one that holds some: {run}"),
        (["absent", "--out", "file"], "is a file; name a folder to write to"),
        (["absent", "--out", "file/below"], "cannot be written (Not a directory)"),
    ):
        assert famba(["report", *arguments]) == 2
        assert said in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"
