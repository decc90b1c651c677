"""A trained network is evaluated as training did, and with other ways of fusing, on the same images."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from earlier import KEPT, write_images
from runs import run

from famba.analysis.evaluate import of_difference
from famba.analysis.options import label_variants, own, variants
from famba.analysis.trained import load_trained
from famba.cli import main as famba
from famba.data.loader import Batches
from famba.errors import ConfigError

Trained = tuple[Path, dict[str, Any]]
Printed = pytest.CaptureFixture[str]


def test_its_own_schedule_gives_what_the_run_gave_and_others_are_beside_it(
    upper: Trained, tmp_path: Path, capsys: Printed
) -> None:
    folder, summary = upper
    options = ["--fusion", "none,all,upper", "--budget", "8,0.5", "--out", str(tmp_path / "out")]
    assert famba(["evaluate", str(folder), *options]) == 0
    found = json.loads((tmp_path / "out" / "evaluate.json").read_text())
    assert (found["images"], found["interrupted"]) == (360, False)
    results = found["results"]
    named = [(one["strategy"], one["removed"], one["own"]) for one in results]
    asked = [("none", 0), ("all", 8), ("all", 32), ("upper", 32)]  # upper with 8 is its own
    assert named == [("upper", 8, True), *((*one, False) for one in asked)]
    mine = results[0]
    for name in ("top1", "top5", "loss", "schedule", "macs_per_image"):
        assert mine[name] == summary[name]
    assert [one["tokens_per_layer"][-1] for one in results] == [57, 65, 57, 33, 33]
    assert results[2]["macs_per_image"] > results[3]["macs_per_image"]
    assert len({one["loss"] for one in results}) == 5
    assert mine["difference"] is None
    for one in results:
        assert one["images_per_s"] > 0
        assert one["top1_low95"] < one["top1"] < one["top1_high95"]
        if one is not mine:
            assert one["difference"] == pytest.approx(one["top1"] - mine["top1"])
            assert one["difference_low95"] <= one["difference"] <= one["difference_high95"]
    table = capsys.readouterr().out
    assert f"{summary['top1']:.2f}" in table
    assert "upper *" in table
    assert [row["removed"] for row in rows_of(tmp_path / "out" / "evaluate.csv")] == ["8", "0", "8", "32", "32"]


def rows_of(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.read_text().splitlines()))


def results_of(capsys: Printed, out: Path, *arguments: str) -> dict[str, Any]:
    """Return what `famba evaluate` writes as JSON."""
    assert famba(["evaluate", *arguments, "--out", str(out)]) == 0
    capsys.readouterr()
    return json.loads((out / "evaluate.json").read_text())


def test_classes_are_told_apart_in_a_table_and_a_confusion_matrix(
    upper: Trained, tmp_path: Path, capsys: Printed
) -> None:
    found = results_of(capsys, tmp_path, str(upper[0]), "--per-class", "--fusion", "none")
    counts = [[int(cell) for cell in list(row.values())[1:]] for row in rows_of(tmp_path / "confusion.csv")]
    assert sum(map(sum, counts)) == 360
    right = sum(counts[i][i] for i in range(10))
    assert 100 * right / 360 == pytest.approx(found["results"][0]["top1"]), "of the schedule as trained"
    rows = rows_of(tmp_path / "per_class.csv")
    names = [str(name) for name in found["classes"] or range(10)]
    assert sorted(row["class"] for row in rows) == sorted(names)
    for row in rows:
        of = counts[names.index(row["class"])]
        assert (int(row["images"]), float(row["top1"])) == (sum(of), pytest.approx(100 * int(row["right"]) / sum(of)))
    assert [float(row["top1"]) for row in rows] == sorted(float(row["top1"]) for row in rows), "the worst first"
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")
    assert famba(["evaluate", str(upper[0]), "--per-class"]) == 2
    assert "name a folder for them by --out FOLDER" in capsys.readouterr().err


def test_a_smaller_network_is_evaluated_beside_it(upper: Trained, tmp_path: Path, capsys: Printed) -> None:
    smaller = run(tmp_path / "smaller", "model.depth=1", "trainer.max_steps=2")
    asked = ["--beside", str((tmp_path / "smaller").rename(tmp_path / "fusion=none,seed=0"))]
    found = results_of(capsys, tmp_path, str(upper[0]), *asked)
    row = found["results"][-1]
    assert (row["top1"], row["macs_per_image"], row["own"]) == (smaller["top1"], smaller["macs_per_image"], False)
    assert row["label"].startswith("none, run")
    assert row["difference"] == pytest.approx(smaller["top1"] - upper[1]["top1"])
    found = results_of(capsys, tmp_path, str(upper[0]), *asked, "--subset", "30", "--batch-size", "8")
    assert (found["images"], found["batch_size"]) == (30, 8)
    assert round(found["results"][0]["top1"] * 30 / 100, 6).is_integer()
    assert famba(["evaluate", str(upper[0]), "--beside", "vim_micro_patch4_32"]) == 2
    assert "it differs in classes, class_names" in capsys.readouterr().err


def test_interrupted_it_keeps_what_all_contestants_have_had(
    upper: Trained, tmp_path: Path, capsys: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Batches.__iter__

    def interrupted(self: Batches) -> Iterator[Any]:
        for number, batch in enumerate(whole(self)):
            if number == 2:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch

    monkeypatch.setattr(Batches, "__iter__", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        status = famba(["evaluate", str(upper[0]), "--batch-size", "20", "--fusion", "all", "--out", str(tmp_path)])
    finally:
        signal.signal(signal.SIGINT, before)
    assert status == 130
    assert "Interrupted" in capsys.readouterr().out
    found = json.loads((tmp_path / "evaluate.json").read_text())
    assert (found["images"], found["interrupted"], len(found["results"])) == (60, True, 3), "the batch is done"


def fused_by(folder: Path, counts: list[int], **chosen: Any) -> Any:
    """A network as if it had been trained with these counts and these keys of fusion."""
    trained = load_trained(folder)
    assert trained.config is not None
    trained.model.set_fusion(counts)
    return replace(trained, config=replace(trained.config, fusion=replace(trained.config.fusion, **chosen)))


def test_its_own_layers_and_counts_are_kept(upper: Trained) -> None:
    few = fused_by(upper[0], [0, 0, 4, 4], layers=2)
    assert variants(few, {"strategy": ["upper"]}) == [own(few)]
    (less,) = variants(few, {"budget": [4]})
    assert less.schedule == (0, 0, 2, 2)
    adapted = fused_by(upper[0], [1, 0, 0, 7], strategy="adaptive")
    assert variants(adapted, {"strategy": ["adaptive"]}) == [own(adapted)], "as it ended"
    with pytest.raises(ConfigError, match="no fixed schedule"):
        variants(adapted, {"budget": [8]})
    counted = fused_by(upper[0], [0, 1, 0, 7], strategy="custom", budget=(0, 1, 0, 7))
    assert [one.removed for one in variants(counted, {"strategy": ["custom", "all"]})] == [8, 8]


def test_the_interval_of_a_difference_is_paired() -> None:
    # Worked by hand: 12.5 and 5.5 of 102, so 7 / 102 in the middle and the root of (18 - 49 / 102) / 102 beside.
    half = 1.959964 * math.sqrt(18 - 49 / 102) / 102
    assert of_difference(12, 5, 100) == pytest.approx((100 * (7 / 102 - half), 100 * (7 / 102 + half)), abs=1e-4)
    assert of_difference(5, 12, 100) == pytest.approx([-end for end in reversed(of_difference(12, 5, 100))])
    low, high = of_difference(0, 0, 100)
    assert low < 0 < high
    assert of_difference(40, 10, 1000)[0] > 0, "networks that mostly err together differ clearly"


@pytest.mark.usefixtures("unchecked")
def test_runs_of_an_earlier_version_are_evaluated_drawn_and_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed
) -> None:
    write_images(tmp_path / "images")
    (checkpoint,) = (KEPT / "checkpoints").glob("*.pt")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # the images of the run are not there
    assert famba(["evaluate", str(checkpoint)]) == 2
    assert "the run's data.root (--data-root names another)" in capsys.readouterr().err
    found = results_of(capsys, tmp_path, str(checkpoint), "--data-root", str(tmp_path / "images"))
    (mine,) = found["results"]
    summary = json.loads((KEPT / "summary.json").read_text())
    assert (found["images"], mine["top1"], mine["schedule"]) == (16, summary["top1"], summary["schedule"])
    image = str(tmp_path / "images" / "test" / "cat" / "0.png")
    assert famba(["visualize", str(checkpoint), image, "--out", str(tmp_path / "pictures")]) == 0
    assert (tmp_path / "pictures" / "tokens_0.png").is_file()
    assert famba(["export", str(checkpoint), "--format", "safetensors", "--out", str(tmp_path / "model")]) == 0


def test_every_combination_of_what_is_asked_is_compared(upper: Trained) -> None:
    trained = load_trained(upper[0])
    found = variants(trained, {"budget": [8, 4], "order": ["sequence", "tome"], "mode": ["fuse", "prune"]})
    ways = [(order, mode) for order in ("sequence", "tome") for mode in ("fuse", "prune")]
    assert [(one.fusion.order, one.fusion.mode, one.removed) for one in found] == [
        (*w, r) for w in ways for r in (8, 4)
    ]
    assert label_variants(found)[0::2] == [f"upper, order {order}, mode {mode}" for order, mode in ways]
    with pytest.raises(ConfigError, match="--attention is about attention, and a Vim has none; leave it out"):
        variants(trained, {"proportional": [True]})
    guarded = replace(trained.config, fusion=trained.config.fusion.changed(rule="neighbours", guard=1))
    found = variants(replace(trained, config=guarded), {"rule": ["bipartite", "neighbours"]})
    assert [(one.fusion.rule, one.fusion.guard) for one in found] == [("bipartite", 0), ("neighbours", 1)], "a guard"
    with pytest.raises(ConfigError, match="guard is 1 with rule 'bipartite'"):
        variants(trained, {"rule": ["bipartite"], "guard": [1]})


def test_rules_are_compared_with_the_first_of_them(upper: Trained, tmp_path: Path, capsys: Printed) -> None:
    asked = ["--rule", "bipartite,neighbours,r_meeto", "--mode", "fuse,prune", "--budget", "8,32"]
    found = results_of(capsys, tmp_path, str(upper[0]), *asked, "--subset", "60")["results"]
    first = {(one["mode"], one["removed"]): one for one in found if one["rule"] == "bipartite" and one["removed"]}
    assert len(first) == 4
    assert len(found) == 13
    for one in found:
        ends = [one[f"difference_to_first{end}"] for end in ("_low95", "", "_high95")]
        if one["rule"] == "bipartite":
            assert ends == [None] * 3
        else:
            assert ends[1] == pytest.approx(one["top1"] - first[one["mode"], one["removed"]]["top1"])
            assert ends[0] <= ends[1] <= ends[2]
    alone = results_of(capsys, tmp_path, str(upper[0]), "--rule", "grid", "--budget", "8,15")["results"]
    assert {one["difference_to_first"] for one in alone} == {None}, "one rule has no other to be compared with"


def test_a_transformer_attends_in_proportion_off_the_shelf_and_as_trained_else(tmp_path: Path) -> None:
    vit = ("model=vit_micro", "model.d_state=null", "trainer.max_steps=1")
    for name, strategy in (("plain", "none"), ("fused", "all")):
        run(tmp_path / name, *vit, f"fusion={strategy}", "fusion.budget=8")
    plain, fused = (load_trained(tmp_path / name) for name in ("plain", "fused"))
    (found,) = variants(plain, {"strategy": ["all"], "budget": [8]})
    assert (found.fusion.proportional, found.fusion.place, found.fusion.order) == (True, "after_attention", "tome")
    (found,) = variants(fused, {"budget": [4]})
    assert not found.fusion.proportional
    both = variants(fused, {"budget": [4], "proportional": [False, True]})
    assert label_variants(both) == ["all, attention plain", "all, attention proportional"]
    with pytest.raises(ConfigError, match="rule 'delta' needs step_sizes of the tokens, which a vision"):
        variants(fused, {"rule": ["delta"], "place": ["after_scan"]})
    with pytest.raises(ConfigError, match="place is 'before_mixer', where a vision transformer"):
        variants(fused, {"place": ["before_mixer"]})
