"""A trained network is evaluated as training did, and with other ways of fusing, on the same images."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from runs import run

from famba.analysis.evaluation import evaluate as evaluation
from famba.analysis.evaluation import request as requests
from famba.analysis.variants import Choice, labels, own, variants
from famba.cli import main as famba
from famba.data.loader import EvalBatches
from famba.errors import ConfigError
from famba.models import Vim
from famba.training.trained import load_trained

Trained = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module")
def upper(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("upper")
    return folder, run(folder, "fusion=upper", "fusion.budget=8", "model.depth=4", "model.patch_size=4")


@pytest.fixture(scope="module")
def adaptive(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("adaptive")
    chosen = ("model.depth=4", "model.patch_size=4", "fusion=adaptive", "fusion.budget=32", "trainer.max_steps=2")
    return folder, run(folder, *chosen)


@pytest.fixture
def without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other process is started."""
    monkeypatch.setattr(evaluation, "inference_memory", lambda request: [None] * len(request.variants))


def test_its_own_schedule_gives_what_the_run_gave_and_others_are_beside_it(
    upper: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, summary = upper
    options = ["--fusion", "none,all,upper", "--budget", "8,0.5", "--out", str(tmp_path / "out")]
    assert famba(["evaluate", str(folder), *options]) == 0
    found = json.loads((tmp_path / "out" / "evaluate.json").read_text())
    assert (found["images"], found["interrupted"], found["own_data"]) == (360, False, True)
    results = found["results"]
    named = [(one["strategy"], one["removed"], one["own"]) for one in results]
    asked = [("none", 0), ("all", 8), ("all", 32), ("upper", 32)]  # upper with 8 is its own
    assert named == [("upper", 8, True), *((*one, False) for one in asked)]
    mine = results[0]
    assert [mine[name] for name in ("top1", "top5", "loss")] == [summary[name] for name in ("top1", "top5", "loss")]
    assert mine["schedule"] == summary["schedule"]
    assert mine["macs_per_image"] == summary["macs_per_image"]
    assert [one["tokens_per_layer"][-1] for one in results] == [57, 65, 57, 33, 33]
    assert results[2]["macs_per_image"] > results[3]["macs_per_image"]
    assert len({one["loss"] for one in results}) == 5
    assert all(one["images_per_s"] > 0 for one in results)
    assert all(one["memory_mib"] >= 0 for one in results)
    table = capsys.readouterr().out
    assert f"{summary['top1']:.2f}" in table
    assert "upper *" in table
    with open(tmp_path / "out" / "evaluate.csv") as file:
        assert [row["removed"] for row in csv.DictReader(file)] == ["8", "0", "8", "32", "32"]
    for kind in ("svg", "png"):
        assert (tmp_path / "out" / f"evaluate.{kind}").stat().st_size > 5000


def test_a_run_that_adapts_is_evaluated_as_it_ended(
    adaptive: Trained, capsys: pytest.CaptureFixture[str], without_memory: None
) -> None:
    folder, summary = adaptive
    assert famba(["evaluate", str(folder), "--json", "--fusion", "adaptive"]) == 0
    (mine,) = json.loads(capsys.readouterr().out)["results"]
    assert (mine["schedule"], mine["top1"]) == (summary["schedule"], summary["top1"])
    assert famba(["evaluate", str(folder), "--fusion", "adaptive", "--budget", "8"]) == 2
    assert "no fixed schedule" in capsys.readouterr().err


def test_a_subset_is_spread_over_the_test_images(
    upper: Trained, capsys: pytest.CaptureFixture[str], without_memory: None
) -> None:
    assert famba(["evaluate", str(upper[0]), "--json", "--subset", "30", "--batch-size", "8"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["images"], found["batch_size"]) == (30, 8)
    assert round(found["results"][0]["top1"] * 30 / 100, 6).is_integer()


def test_interrupted_it_keeps_what_all_contestants_have_had(
    upper: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = EvalBatches.__iter__

    def interrupted(self: EvalBatches) -> Iterator[Any]:
        for number, batch in enumerate(whole(self)):
            if number == 2:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch

    monkeypatch.setattr(EvalBatches, "__iter__", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        status = famba(["evaluate", str(upper[0]), "--batch-size", "20", "--fusion", "all", "--out", str(tmp_path)])
    finally:
        signal.signal(signal.SIGINT, before)
    assert status == 130
    assert "Interrupted" in capsys.readouterr().out
    found = json.loads((tmp_path / "evaluate.json").read_text())
    assert (found["images"], found["interrupted"], len(found["results"])) == (40, True, 2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--fusion", "uper"], "did you mean 'upper'"),
        (["--fusion", "all,"], "--fusion is 'all,'"),
        (["--fusion", "adaptive"], "no fixed schedule"),
        (["--fusion", "custom"], "--layers: fusion strategy 'custom' needs a list"),
        (["--fusion", "all", "--budget", "65"], "--budget.*does not fit"),
        (["--fusion", "all", "--budget", "1.5"], "--budget is 1.5"),
        (["--fusion", "all", "--budget", "many"], "--budget holds 'many'"),
        (["--fusion", "all", "--layers", "2"], "take none"),
        (["--fusion", "upper", "--layers", "1,2"], "take one number"),
        (["--fusion", "upper,custom", "--layers", "1,2"], "at once"),
        (["--fusion", "upper", "--layers", "x"], "--layers holds 'x'"),
        (["--order", "tom"], "unknown --order 'tom', did you mean 'tome'"),
        (["--subset", "0"], "--subset is 0"),
        (["--subset", "361"], "--subset is 361; allowed: 1 to 360"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--precision", "fp8"], "--precision is 'fp8'"),
        (["--device", "tpu"], "unknown --device 'tpu'"),
        (["--backend", "nativ"], "--backend: .*did you mean 'native'"),
        (["--data", "cifr10"], "did you mean 'cifar10'"),
        (["--data", "folder"], "needs --data-root|--data-root"),
        (["--data", "cifar100"], "100 classes, the network tells 10 apart"),
        (["--data", "imagenet", "--data-root", "."], "1000 classes, the network tells 10 apart"),
        (["--data", "cifar10", "--data-root", "/nowhere"], "--data-root /nowhere is no folder"),
    ],
)
def test_what_cannot_work_is_refused_before_any_image(
    upper: Trained, options: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "_race", None)
    assert famba(["evaluate", str(upper[0]), *options]) == 2
    error = capsys.readouterr().err
    assert re.search(said, error.replace("\n", " ")), error


def test_folders_of_other_classes_are_refused(upper: Trained, tmp_path: Path) -> None:
    for part in ("train", "val"):
        for label in ("a", "b"):
            (tmp_path / part / label).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / part / label / "0.png")
    options = ["evaluate", str(upper[0]), "--data", "folder", "--data-root", str(tmp_path)]
    assert famba(options) == 2


def test_a_timm_model_needs_data_to_be_named(upper: Trained) -> None:
    trained = load_trained(upper[0])
    lone = trained.__class__(**{**vars(trained), "config": None})
    options = type("Options", (), {"data": None, "data_root": None})()
    with pytest.raises(ConfigError, match="name one by --data"):
        requests._images(options, lone)


def test_variants_say_what_they_are(upper: Trained) -> None:
    trained = load_trained(upper[0])
    assert variants(trained, Choice()) == []
    assert variants(trained, Choice(strategies=["upper"])) == [own(trained)]
    (tome,) = variants(trained, Choice(order="tome"))
    assert (tome.schedule, tome.order, tome.own) == (trained.schedule, "tome", False)
    both = [own(trained), tome]
    assert labels(both) == ["upper, sequence", "upper, tome"]
    (custom,) = variants(trained, Choice(strategies=["custom"], layers=[1, 3], budgets=[8]))
    assert custom.schedule == (0, 4, 0, 4)
    # Without a budget, the run's own; the layers of upper are its own as well.
    found = variants(trained, Choice(strategies=["all", "lower"]))
    assert [one.removed for one in found] == [8, 8]
    assert found[1].schedule == (2, 3, 3, 0)


def test_set_fusion_changes_how_tokens_fuse() -> None:
    torch.manual_seed(0)
    model = Vim(img_size=32, patch_size=4, num_classes=3, embed_dim=16, depth=3, cls_position="none").eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for order, weighting, place in (("tome", "mean", "before_mixer"), ("sequence", "size", "after_scan")):
            model.set_fusion((4, 4, 4), order, weighting, place)
            built = Vim(
                img_size=32,
                patch_size=4,
                num_classes=3,
                embed_dim=16,
                depth=3,
                cls_position="none",
                fusion=(4, 4, 4),
                fusion_order=order,
                fusion_weighting=weighting,
                fusion_place=place,
            ).eval()
            built.load_state_dict(model.state_dict())
            torch.testing.assert_close(model(images), built(images), rtol=0, atol=0)
            assert model.fusion_by_size is built.fusion_by_size
    with pytest.raises(ConfigError, match="unknown fusion_place"):
        model.set_fusion((0, 0, 0), place="behind")
    assert model.fusion == (4, 4, 4)
