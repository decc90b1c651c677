"""`famba report --out`: the files, and what makes none."""

from __future__ import annotations

import csv
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_runs import (
    MODEL,
    sorted_out,
    write_pair,
    write_run,
)

from famba.analysis.report import cells, gather
from famba.cli import main as famba
from famba.errors import DataError

# Files


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A mixed folder with names that every format has to escape, and its report."""
    top = tmp_path_factory.mktemp("mixed")
    write_pair(top / "runs")
    write_run(top / "runs" / "<b>|$x_1 & --> {y}", "upper", 3, 99.0, config={"recipe.lr": 0.001})
    write_run(
        top / "runs" / "small", "upper", 0, 75.0, config={"model.name": "vim_small_patch16_224"}, parameters=2.6e7
    )
    write_run(top / "runs" / "waiting", "none", 4, 99.0, status="running")
    assert famba(["report", str(top / "runs"), "--out", str(top / "report")]) == 0
    return top / "runs", top / "report"


def test_the_report_is_these_files(mixed: tuple[Path, Path]) -> None:
    found = {str(path.relative_to(mixed[1])) for path in mixed[1].rglob("*") if path.is_file()}
    kinds = ("accuracy_time", "accuracy_memory", "accuracy_saved", "curves_top1", "curves_loss", "tokens")
    stems = [f"plots/{model}-{kind}" for model in ("vim-micro-patch4-32", "vim-small-patch16-224") for kind in kinds]
    pictures = {f"{stem}.{suffix}" for stem in stems for suffix in ("svg", "png")}
    assert found == {"report.md", "report.csv", "report.tex", "report.html", *pictures}


def test_all_formats_hold_the_same_numbers(mixed: tuple[Path, Path]) -> None:
    report = mixed[1]
    texts = {suffix: (report / f"report.{suffix}").read_text() for suffix in ("md", "tex", "html")}
    texts["tex"] = texts["tex"].replace(r"$\pm$", "±").replace("$-$", "-")
    for text in texts.values():
        for number in ("12.00 ± 0.44", "12.50 ± 0.50", "-0.50 (-1.25 to +0.25)", "0.602", "5 of 17", "75.00"):
            assert number in text.replace(cells.MINUS, "-")
    rows = list(csv.DictReader((report / "report.csv").read_text().splitlines()))
    assert [(row["model"], row["fusion"]) for row in rows] == [
        (MODEL, "none"), (MODEL, "upper"), ("vim_small_patch16_224", "upper"),
    ]  # fmt: skip
    upper = rows[1]
    assert float(upper["top1_percent_mean"]) == pytest.approx(12.0, abs=1e-12)
    assert float(upper["top1_percent_sd"]) == pytest.approx(0.43588989)
    assert float(upper["top1_difference_to_none_points_low95"]) == pytest.approx(-1.2452413)
    assert float(upper["train_time_s_mean"]) == 362.0
    # The other model is one of the paper's, the setting is not.
    assert (upper["seeds"], upper["paper_top1_percent"], rows[2]["paper_top1_percent"]) == ("0 1 2", "", "")


def test_odd_runs_stand_in_every_document(mixed: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    page, text = ((mixed[1] / f"report.{suffix}").read_text() for suffix in ("html", "md"))
    assert "runs/&lt;b&gt;|$x_1 &amp; --&gt; {y}" in page
    assert r"runs/\<b\>\|$x\_1 & --\> \{y\}" in text
    for document in (page, text.replace("\\", "")):
        assert "recipe.lr: 0.001, in the table 0.004" in document
        assert "stopped after step 300 of 300" in document
    assert famba(["report", str(mixed[0])]) == 0
    assert "99.00" in capsys.readouterr().out


class _Elements(HTMLParser):
    VOID = frozenset(("meta", "link", "br"))

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        values = dict(attrs)
        self.ids += [values["id"]] if values.get("id") else []  # type: ignore[list-item]
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "data") and v]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_parses_and_needs_nothing_but_itself(mixed: tuple[Path, Path]) -> None:
    page = (mixed[1] / "report.html").read_text()
    found = _Elements()
    found.feed(page)
    found.close()
    assert not found.open
    assert not found.tags & {"script", "img", "iframe", "object", "b"}
    assert len(found.ids) == len(set(found.ids))
    assert all(link == "data:," or link.removeprefix("#") in found.ids for link in found.links)
    assert all(name in found.ids for name in re.findall(r"url\(#([^)]*)\)", page))
    assert not re.search(r"https?:|@import|url\((?!#)", page)
    assert page.count("<svg") == 12
    for picture in (mixed[1] / "plots").glob("*.svg"):
        ET.parse(picture)


def test_links_of_the_markdown_lead_to_pictures(mixed: tuple[Path, Path]) -> None:
    links = re.findall(r"!\[[^]]*\]\(([^)]*)\)", (mixed[1] / "report.md").read_text())
    assert len(links) == 12
    assert all((mixed[1] / link).is_file() for link in links)


def test_latex_is_balanced_and_escaped(mixed: tuple[Path, Path]) -> None:
    text = (mixed[1] / "report.tex").read_text()
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == text.count(r"\toprule") == 4
    plain = re.sub(r"\\[{}]", "", text)
    assert plain.count("{") == plain.count("}")
    body = re.findall(r"^[^%\\].* \\\\$", text, re.MULTILINE)
    assert len(body) == 2 * (1 + 2) + 2 * (1 + 1)
    assert all(not re.search(r"(?<!\\)[%_#]", line) for line in body)
    assert {line.count(" & ") for line in body} == {7, 8, 10}  # with the paper's columns for the paper's model alone


def test_the_same_runs_give_the_same_bytes_elsewhere(
    mixed: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "mine.txt").write_text("mine")
    (tmp_path / "report" / "report.md").write_text("old")
    monkeypatch.chdir(mixed[0].parent)
    assert famba(["report", "runs", "--out", str(tmp_path / "report")]) == 0
    first, second = (
        {str(path.relative_to(top)): path.read_bytes() for path in top.rglob("*") if path.is_file()}
        for top in (mixed[1], tmp_path / "report")
    )
    assert second.pop("mine.txt") == b"mine"
    assert first == second


# Errors


def test_nothing_to_report_on_is_an_error_that_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    out = tmp_path / "new" / "report"
    assert famba(["report", str(tmp_path / "empty"), "--out", str(out)]) == 2
    assert "no run in" in capsys.readouterr().err
    write_run(tmp_path / "runs" / "failed", status="failed", error="the loss is nan")
    (write_run(tmp_path / "runs" / "damaged") / "summary.json").write_text("[]")
    assert famba(["report", str(tmp_path / "runs"), "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert "no run of these can stand in a table" in message
    assert "runs/failed: failed after step 300 of 300: the loss is nan" in message
    assert "runs/damaged: summary.json is damaged: it does not say a status" in message
    assert not (tmp_path / "new").exists()


def test_out_is_looked_at_before_any_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    assert famba(["report", str(tmp_path / "absent"), "--out", str(tmp_path / "file")]) == 2
    assert "is a file; name a folder to write to" in capsys.readouterr().err
    assert famba(["report", str(tmp_path / "absent"), "--out", str(tmp_path / "file" / "below")]) == 2
    assert "cannot be written (Not a directory)" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_conflicts_alone_make_no_table(tmp_path: Path) -> None:
    write_run(tmp_path / "a", top1=1.0)
    write_run(tmp_path / "b", top1=2.0)
    with pytest.raises(DataError, match="none of them counts"):
        gather([tmp_path])


@pytest.mark.parametrize("options", [[], ["--out", "report"]])
def test_a_path_that_is_no_folder_of_runs_is_said_with_what_to_give(
    tmp_path: Path, options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path / "runs" / "sweep" / "one")
    (tmp_path / "runs" / "nothing").mkdir()
    assert famba(["report", "runs/swep", *options]) == 2
    error = capsys.readouterr().err
    assert "no run in runs/swep: it is not there" in error
    assert "holds the folders nothing, sweep" in error
    assert famba(["report", str(run / "summary.json"), *options]) == 2
    assert f"is a file; give the folder of a run, or one that holds some: {run}" in capsys.readouterr().err
    assert famba(["report", "runs/nothing", *options]) == 2
    assert "no run in runs/nothing" in capsys.readouterr().err
    assert not Path("report").exists()


@pytest.mark.parametrize("text", ["[]", "{", "", "\xff"])
def test_a_damaged_summary_is_named_in_the_plain_table(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "one")
    (run / "summary.json").write_bytes(text.encode("latin-1"))
    assert famba(["report", str(tmp_path)]) == 2
    assert "one/summary.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[", "model: 1\n", "\x00", "- a\n"])
def test_a_damaged_configuration_is_named(tmp_path: Path, text: str) -> None:
    write_pair(tmp_path)
    (tmp_path / "none0" / "config.yaml").write_text(text)
    _, others = sorted_out(tmp_path)
    assert others["none0"].kind == "damaged"
    assert others["none0"].reasons[0].startswith("config.yaml is damaged")
