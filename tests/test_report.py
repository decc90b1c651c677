"""`famba report`: what is compared with what, the numbers, the files, and tables of runs."""

from __future__ import annotations

import copy
import csv
import json
import math
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from earlier import KEPT
from omegaconf import OmegaConf
from scipy.stats import ttest_rel

from famba.analysis.report import Table, gather, interval, table_csv
from famba.analysis.runs import read_runs, runs_csv
from famba.cli import main as famba

Printed = pytest.CaptureFixture[str]
MODEL = "vim_micro_patch4_32"
SCHEDULES = {"none": [0, 0, 0, 0], "all": [3, 3, 3, 3], "lower": [4, 4, 4, 0], "upper": [0, 4, 4, 4]}
CONFIG = OmegaConf.load(KEPT / "config.yaml")
SUMMARY: dict[str, Any] = json.loads((KEPT / "summary.json").read_text())
NONE = {0: 12.0, 1: 13.0, 2: 12.5}
UPPER = {0: 11.5, 1: 12.2, 2: 12.3}


def write_run(folder: Path, strategy: str = "none", seed: int = 0, top1: float = 12.0, **summary: Any) -> Path:
    """A finished run; in summary, config changes dotted keys and origin the provenance."""
    config, origin = summary.pop("config", {}), summary.pop("origin", {})
    folder.mkdir(parents=True)
    schedule = summary.pop("schedule", SCHEDULES[strategy])
    own = {"fusion.strategy": strategy, "model.depth": 4, "data.name": "cifar100", "data.subset": None}
    told = copy.deepcopy(CONFIG)
    for key, value in {**own, "seed": seed, "run_dir": str(folder), **config}.items():
        OmegaConf.update(told, key, value)
    found = {
        **SUMMARY, "model": told.model.name, "strategy": strategy, "top1": top1, "schedule": schedule, "tokens": 17,
        "tokens_per_layer": [17 - sum(schedule[: i + 1]) for i in range(len(schedule))],
        "train_time_s": 600.0 + seed if strategy == "none" else 360.0 + 2 * seed,
        "provenance": {**SUMMARY["provenance"], "seed": seed, **origin}, **summary,
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(found))
    OmegaConf.save(told, folder / "config.yaml")
    return folder


def write_seeds(folder: Path, strategy: str, top1: Iterable[float]) -> None:
    for seed, value in enumerate(top1):
        write_run(folder / f"{strategy}{seed}", strategy, seed, value)


def write_pair(folder: Path) -> Path:
    """Without fusion and upper, three seeds each."""
    write_seeds(folder, "none", NONE.values())
    write_seeds(folder, "upper", UPPER.values())
    return folder


def table_of(*paths: Path) -> Table:
    (table,) = gather(paths).tables
    return table


def left_out(*paths: Path) -> dict[str, tuple[str, str]]:
    """Kind and reason by the name of each run that is left out, or counted for accuracy alone."""
    listed = [(kind, *runs) for kind, found in gather(paths).left_out.items() for runs in found]
    return {name.partition("/")[2]: (kind, reason) for kind, names, reason in listed for name in names.split("; ")}


def test_the_interval_is_that_of_a_paired_t_test_over_the_seeds_that_both_have() -> None:
    found = interval(pd.Series(UPPER), pd.Series(NONE))
    # Differences -0.5, -0.8, -0.2: mean -0.5, deviation 0.3; t(0.975, 2) is 4.3027.
    assert found[""] == pytest.approx(-0.5)
    assert found["_high95"] == pytest.approx(-0.5 + 4.302653 * 0.3 / math.sqrt(3), abs=1e-5)
    expected = ttest_rel(list(UPPER.values()), list(NONE.values())).confidence_interval(0.95)
    assert (found["_low95"], found["_high95"]) == pytest.approx((expected.low, expected.high))
    found = interval(pd.Series({0: 1.0, 1: 2.0, 7: 100.0}), pd.Series({0: 0.5, 1: 1.0, 3: -50.0}))
    assert (found[""], found["_seeds"]) == (0.75, "0 1")
    assert math.isnan(interval(pd.Series({0: 1.0}), pd.Series({1: 1.0}))[""])


def test_what_a_summary_lacks_is_a_dash(tmp_path: Path) -> None:
    gaps = dict.fromkeys(("top5", "train_time_s", "peak_memory_mib", "images_per_s", "macs_per_image"))
    write_run(tmp_path / "run", "upper", 0, 12.0, **gaps)
    table = table_of(tmp_path)
    assert table.sheets["Results"].iloc[0].to_list() == ["upper", "1", "12.00", "-", "-", "-", "-", "-", "-"]
    assert table.sheets["Cost"].iloc[0, 1] == "-"
    assert any("No run without fusion" in note for note in table.notes)
    write_run(tmp_path / "none", "none", 0, 10.0)
    table = table_of(tmp_path)
    assert table.sheets["Results"].iloc[:, 3].to_list() == ["-", "+2.00 (one seed)"]
    assert table.conclusion.startswith("Not enough seeds to compare: at least 2")


def test_odd_runs_are_listed_with_what_differs_and_not_averaged(tmp_path: Path) -> None:
    write_pair(tmp_path)
    write_run(tmp_path / "unfinished", "upper", 3, 99.0, status="interrupted")
    write_run(tmp_path / "recipe", "upper", 3, 99.0, config={"recipe.lr": 0.001, "recipe.min_lr": 0.5})
    write_run(tmp_path / "data", "upper", 4, 99.0, config={"data.subset": 500})
    commit = SUMMARY["provenance"]["git_commit"]
    write_run(tmp_path / "code", "upper", 5, 99.0, origin={"git_commit": f"{commit}-dirty"})
    (write_run(tmp_path / "damaged", "upper", 8, 99.0) / "summary.json").write_text('{"status": "fin')
    (write_run(tmp_path / "bare", "upper", 9, 99.0) / "config.yaml").unlink()
    (write_run(tmp_path / "torn", "upper", 9, 99.0) / "config.yaml").write_text("model: [")
    write_run(tmp_path / "hollow", "upper", 10, math.nan)
    upper, others = table_of(tmp_path).rows.loc["upper"], left_out(tmp_path)
    assert (upper["seeds"], upper["top1_percent_mean"]) == ("0 1 2", pytest.approx(12.0))
    assert {name: reason for name, (_, reason) in others.items() if name not in ("damaged", "torn")} == {
        "unfinished": "interrupted after step 7 of 7",
        "recipe": "recipe.lr: 0.001, in the table 0.01; recipe.min_lr: 0.5, in the table 1e-05",
        "data": "data.subset: 500, in the table not known",
        "code": f"git_commit: {commit}-dirty, in the table {commit}",
        "bare": "config.yaml is missing, so its recipe is not known",
        "hollow": "the summary does not say top1",
    }
    assert {name for name, (kind, _) in others.items() if kind == "Damaged"} == {"damaged", "bare", "torn", "hollow"}
    assert others["torn"][1].startswith("config.yaml is damaged")


def test_precision_and_length_part_tables_and_what_has_no_bearing_parts_no_runs(tmp_path: Path) -> None:
    write_pair(tmp_path)
    for seed in range(2):
        write_run(tmp_path / f"half{seed}", "upper", seed, 99.0, precision="bfloat16")
    write_run(tmp_path / "long", "upper", 0, 99.0, config={"trainer.epochs": 9})
    write_run(tmp_path / "parted", "upper", 4, 99.0, config={"recipe.repeats": 3}, origin={"processes": 4})
    free = {"data.root": "elsewhere", "trainer.log_every": 5, "logger.name": "wandb", "ops.backend": "native",
            "trainer.precision": "auto", "data.image_size": 32, "fusion.mode": "fuse", "recipe.repeats": 3}  # fmt: skip
    write_run(tmp_path / "free", "upper", 3, 12.0, config=free)
    report = gather([tmp_path])
    (half,) = (table for table in report.tables if "bfloat16" in table.model)
    full, long = (table for table in report.tables if table is not half)
    assert (half.model, full.model) == tuple(f"{MODEL}, precision {one}, epochs 4" for one in ("bfloat16", "fp32"))
    assert (long.model, long.rows.loc["upper", "seeds"]) == (f"{MODEL}, precision fp32, epochs 9", "0")
    assert half.rows.loc["upper", "top1_percent_mean"] == pytest.approx(99.0)
    assert full.rows.loc["upper", "top1_percent_mean"] == pytest.approx(12.0)
    assert full.rows.loc["upper", "seeds"] == "0 1 2 3"
    assert left_out(tmp_path)["parted"][1] == "recipe.repeats: 3 over 4, in the table 1"


def test_runs_from_other_weights_are_kept_apart_wherever_these_lie(tmp_path: Path) -> None:
    for seed, (path, digest) in enumerate((("old", "a"), ("elsewhere/old", "a"), ("old", "b"))):
        started = {"init_from": "old", "weights_sha256": digest * 64, "new_classifier": False}
        write_run(tmp_path / str(seed), seed=seed, config={"init_from": path}, started_from=started)
    assert table_of(tmp_path).rows.loc["none", "seeds"] == "0 1"
    assert "aaaa" in left_out(tmp_path)["2"][1]


def test_of_repeated_seeds_the_first_counts_and_of_another_device_the_accuracy_alone(tmp_path: Path) -> None:
    write_pair(tmp_path)
    gpu = {"device": "A GPU", "cuda": "12.9", "backend": "triton"}
    write_run(tmp_path / "gpu", "upper", 3, 16.0, origin=gpu, train_time_s=1.0, peak_memory_mib=5.0)
    write_run(tmp_path / "moved", "lower", 0, 11.0, origin=gpu, train_time_s=2.0)
    late = {"started": "2026-11-28T10:00:00+00:00"}
    write_run(tmp_path / "again", "none", 0, NONE[0], origin=late, config={"fusion.order": "tome"}, train_time_s=9.0)
    write_run(tmp_path / "other", "upper", 1, 50.0, origin=late)
    table, others = table_of(tmp_path), left_out(tmp_path)
    assert (table.rows.loc["none", "train_time_s_mean"], others["other"][1]) == (601.0, "seed 1 of upper")
    upper, lower = table.rows.loc["upper"], table.rows.loc["lower"]
    assert upper["seeds"] == "0 1 2 3"
    assert (upper["top1_percent_mean"], upper["train_time_s_mean"]) == (13.0, 362.0)
    assert lower[["train_time_s_mean", "train_time_share_of_none", "peak_memory_mib_mean"]].isna().all()
    assert "device: A GPU, in the table AMD EPYC, 2 cores, 2 threads" in others["gpu"][1]
    assert table.sheets["Results"].loc["lower"].to_list()[5:7] == ["-", "-"]
    assert any("lower 0 of 1" in note for note in table.notes)


def test_a_smaller_network_without_fusion_stands_beside_the_fused_ones(tmp_path: Path) -> None:
    write_pair(tmp_path / "whole")
    for seed in range(3):
        folder, config = tmp_path / f"smaller{seed}", {"model.depth": 3}
        write_run(folder, seed=seed, top1=11.0 + NONE[seed], config=config, schedule=[0, 0, 0], parameters=2_500)
    rows = table_of(tmp_path).rows
    assert list(rows.index) == ["none", "none, depth 3", "upper"]
    assert rows["top1_difference_to_none_points"]["none, depth 3"] == pytest.approx(11.0)


@pytest.mark.parametrize(
    ("runs", "labels"),
    [
        ([("upper", {}), ("lower", {}), ("none", {})], ["none", "lower", "upper"]),
        ([("upper", {"fusion.order": "tome"})], ["upper"]),  # what all share is said once, beside the table
        ([("upper", {}), ("upper", {"fusion.mode": "prune"})], ["upper", "upper, mode prune"]),
        ([("upper", {}), ("all", {}), ("upper", [0, 2, 2, 2])], ["all", "upper", "upper, budget 6"]),
        ([("all", [6, 0, 0, 6]), ("all", [6, 0, 6, 0])], ["all, schedule 6 0 0 6", "all, schedule 6 0 6 0"]),
    ],
)
def test_labels_say_only_what_differs(runs: list[tuple[str, Any]], labels: list[str], tmp_path: Path) -> None:
    for seed, (strategy, change) in enumerate(runs):
        more = {"config": change} if isinstance(change, dict) else {"schedule": change}
        write_run(tmp_path / str(seed), strategy, seed, **more)
    assert table_of(tmp_path).rows["fusion"].to_list() == labels


def test_no_conclusion_rests_on_an_interval_around_0(tmp_path: Path) -> None:
    for name, top1, said in (
        ("a", [11.5, 12.2, 12.3], "no difference shown: upper."),
        ("b", [9.98, 11.0, 10.52], "less accurate: upper."),
        ("c", [13.98, 15.0, 14.52], "more accurate: upper."),
    ):
        write_seeds(tmp_path / name, "none", NONE.values())
        write_seeds(tmp_path / name, "upper", top1)
        assert table_of(tmp_path / name).conclusion == f"Against none, {said}"


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
    kinds = ("accuracy_time", "accuracy_memory", "accuracy_saved")
    stems = [f"plots/{model}-{kind}" for model in ("vim-micro-patch4-32", "vim-small-patch16-224") for kind in kinds]
    pictures = {f"{stem}.{suffix}" for stem in stems for suffix in ("svg", "png")}
    assert found == {"report.md", "report.csv", "report.tex", "report.html", *pictures}
    links = re.findall(r"!\[[^]]*\]\(([^)]*)\)", (mixed[1] / "report.md").read_text())
    assert len(links) == 6
    assert all((mixed[1] / link).is_file() for link in links)


def test_all_formats_hold_the_same_numbers_and_escape_names(mixed: tuple[Path, Path]) -> None:
    page, text, tex = ((mixed[1] / f"report.{suffix}").read_text() for suffix in ("html", "md", "tex"))
    assert "runs/&lt;b&gt;|$x_1 &amp; --&gt; {y}" in page
    assert r"runs/\<b\>\|$x\_1 & --\> \{y\}" in text
    assert not re.search(r"(?<!\\)[_#]|(?<!\\)%(?! needs)", tex)
    assert tex.count(r"\begin{tabular}") == tex.count(r"\toprule") == 4
    assert page.count('src="data:image/svg+xml;base64,') == 6
    assert not re.search(r"https?:|@import|url\(|<script|<iframe", page), "the page needs nothing but itself"
    for document in (page, text.replace("\\", "")):
        assert "recipe.lr: 0.001, in the table 0.01" in document
        assert "stopped after step 7 of 7" in document
    for document in (page, text, tex.replace(r"$\pm$", "±").replace("$-$", "-")):
        for number in ("12.00 ± 0.44", "12.50 ± 0.50", "-0.50 (-1.25 to +0.25)", "0.602", "5 of 17", "75.00"):
            assert number in document.replace("\N{MINUS SIGN}", "-")
    rows = list(csv.DictReader((mixed[1] / "report.csv").read_text().splitlines()))
    small = "vim_small_patch16_224"
    assert [(row["model"], row["fusion"]) for row in rows] == [(MODEL, "none"), (MODEL, "upper"), (small, "upper")]
    assert float(rows[1]["top1_percent_sd"]) == pytest.approx(0.43588989)
    assert float(rows[1]["top1_difference_to_none_points_low95"]) == pytest.approx(-1.2452413)
    assert (rows[1]["seeds"], rows[1]["train_time_s_mean"]) == ("0 1 2", "362.0")


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


def test_a_csv_file_reports_as_the_folders_that_it_was_made_of(mixed: tuple[Path, Path], tmp_path: Path) -> None:
    runs = read_runs([mixed[0]])
    (tmp_path / "runs.csv").write_text(runs_csv(runs))
    assert runs_csv(read_runs([tmp_path / "runs.csv"])) == runs_csv(runs)
    assert table_csv(gather([tmp_path / "runs.csv"])) == table_csv(gather([mixed[0]]))
    write_run(tmp_path / "more", "upper", 4, 12.0)
    both = gather([tmp_path / "runs.csv", tmp_path / "more"]).tables[0]
    assert both.rows.loc["upper", "seeds"] == "0 1 2 4"
    assert gather([KEPT]).tables[0].rows.loc["upper", "top1_percent_mean"] == 25.0


def test_the_terminal_lists_every_run(mixed: tuple[Path, Path], tmp_path: Path, capsys: Printed) -> None:
    (write_run(tmp_path / "torn") / "summary.json").write_text("{")
    assert famba(["report", str(mixed[0]), str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[2:12]].count("finished") == 8
    assert any("99.00" in line and line.endswith("stopped") for line in lines)
    assert "torn: summary.json is damaged: it is no summary" in lines[-1]


def test_nothing_to_report_on_is_an_error_that_leaves_nothing(tmp_path: Path, capsys: Printed) -> None:
    out = tmp_path / "new" / "report"
    write_run(tmp_path / "runs" / "failed", status="failed", error="the loss is nan")
    (write_run(tmp_path / "runs" / "damaged") / "summary.json").write_text("[]")
    assert famba(["report", str(tmp_path / "runs"), "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert "no run of these can stand in a table" in message
    assert "runs/failed: failed after step 7 of 7: the loss is nan" in message
    assert "runs/damaged: summary.json is damaged: it is no summary" in message
    assert not (tmp_path / "new").exists()
    (tmp_path / "later").mkdir()
    (tmp_path / "later/sweep.json").write_text('{"runs": [{"folder": "run", "overrides": []}]}')
    assert famba(["report", str(tmp_path / "later")]) == 0
    assert "not started" in capsys.readouterr().out
    (tmp_path / "no.csv").write_text("run,status,model,strategy,top1,tokens,schedule,tokens_per_layer\n")
    assert famba(["report", str(tmp_path / "no.csv")]) == 2
    assert "no.csv is no table of runs (it has no rows)" in capsys.readouterr().err
    write_run(tmp_path / "good")
    (tmp_path / "file").write_text("mine")
    assert famba(["report", str(tmp_path / "good"), "--out", str(tmp_path / "file")]) == 2
    assert "cannot be written (Not a directory); name a folder to write to" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"
