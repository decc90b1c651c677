"""The classes and images of a run are kept with it, and compared wherever its weights meet data again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import timm
from PIL import Image

from famba.analysis.trained import load_trained
from famba.cli import main as famba
from famba.errors import CheckpointError
from famba.training.checkpoint import load
from famba.training.interrupts import Interrupted

COLOURS = {"ant": (255, 0, 0), "bee": (0, 255, 0), "cat": (0, 0, 255), "dog": (255, 255, 0)}


def write_images(root: Path, classes: dict[str, tuple[int, int, int]], count: int = 6) -> None:
    """Write a folder data set whose classes are colours."""
    draw = np.random.default_rng(0)
    for part in ("train", "test"):
        for name, colour in classes.items():
            folder = root / part / name
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                pixels = np.clip(np.array(colour) + draw.integers(-40, 40, (16, 16, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")


def run(folder: Path, root: Path, *overrides: str) -> dict[str, Any]:
    """Train a tiny Vim on a folder, in its own steps of 6 images."""
    data = ("data=folder", f"data.root={root}", "data.subset=null", "data.image_size=16", "data.workers=0")
    steps = ("trainer.epochs=4", "trainer.batch_size=6", "recipe.lr=0.02")
    return runs.run(folder, "model.depth=1", *data, *steps, *overrides)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run; its images lie beside it."""
    folder = tmp_path_factory.mktemp("finished")
    write_images(folder / "images", COLOURS)
    run(folder / "run", folder / "images")
    return folder / "run"


def test_a_run_keeps_its_classes_and_the_sizes_of_its_sets(finished: Path) -> None:
    expected = {"num_classes": 4, "classes": list(COLOURS), "images": {"train": 24, "test": 24}}
    summary = json.loads((finished / "summary.json").read_text())
    assert {key: summary[key] for key in ("classes", "images")} == {key: expected[key] for key in ("classes", "images")}
    last = runs.last_checkpoint(finished)
    assert load(last)["data"] == expected
    assert load_trained(finished).class_names == load_trained(last).class_names == tuple(COLOURS)


def test_a_run_does_not_go_on_with_other_data_but_with_the_same_elsewhere(tmp_path: Path, stop_after: Any) -> None:
    images = tmp_path / "images"
    write_images(images, COLOURS)
    stop_after(2)
    with pytest.raises(Interrupted):
        run(tmp_path / "run", images)
    stop_after(-1)
    before = (tmp_path / "run" / "summary.json").read_text()
    missing, renamed = [("train/ant/3.png", "../spare.png")], [("train/cat", "train/emu"), ("test/cat", "test/emu")]
    for moves, reason in ((missing, "images.train: 24 before, 23 now"), (renamed, "emu")):
        for old, new in moves:
            (images / old).rename(images / new)
        with pytest.raises(CheckpointError, match=f"is of a run on other data(?s:.*){reason}(?s:.*)init_from="):
            run(tmp_path / "run", images)
        for old, new in moves:
            (images / new).rename(images / old)
    assert (tmp_path / "run" / "summary.json").read_text() == before
    assert run(tmp_path / "run", images.rename(tmp_path / "moved"))["status"] == "finished"


def evaluated(finished: Path, images: Path, out: Path) -> dict[str, Any]:
    assert famba(["evaluate", str(finished), "--data-root", str(images), "--out", str(out)]) == 0
    return json.loads((out / "evaluate.json").read_text())


def test_evaluation_takes_classes_by_name(finished: Path, tmp_path: Path) -> None:
    """A folder with some of the classes numbers them from 0; the network's own numbers hold."""
    whole = evaluated(finished, finished.parent / "images", tmp_path)
    assert whole["classes"] == list(COLOURS)
    rights = {}
    for names in (("ant", "bee"), ("cat", "dog")):
        write_images(tmp_path / names[0], {name: COLOURS[name] for name in names})
        rights[names] = evaluated(finished, tmp_path / names[0], tmp_path)["results"][0]["top1"]
    # Nearly the same images, so together they are as right as the whole.
    assert sum(rights.values()) / 2 == pytest.approx(whole["results"][0]["top1"], abs=10)
    assert max(rights.values()) > 0


def test_evaluation_refuses_classes_that_the_network_does_not_know(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path, {"ant": COLOURS["ant"], "bee": COLOURS["bee"], "zebra": (0, 0, 0), "dog": COLOURS["dog"]})
    assert famba(["evaluate", str(finished), "--data-root", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "classes that the network was not trained on: zebra; it knows ant, bee, cat, dog" in error


def test_a_run_on_other_classes_begins_with_a_new_classifier(finished: Path, tmp_path: Path) -> None:
    others = {"fox": COLOURS["ant"], "gnu": COLOURS["bee"], "hen": COLOURS["cat"], "ibis": COLOURS["dog"]}
    write_images(tmp_path / "images", others)
    summary = run(tmp_path / "run", tmp_path / "images", f"init_from={finished}", "trainer.max_steps=1")
    assert summary["started_from"]["new_classifier"]
    log = (tmp_path / "run" / "train.log").read_text()
    assert "with a new classifier, for other classes" in log


@pytest.mark.usefixtures("unchecked")
def test_an_export_has_the_names_where_timm_keeps_them(finished: Path, tmp_path: Path) -> None:
    assert famba(["export", str(finished), "--format", "safetensors", "--out", str(tmp_path)]) == 0
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert model.pretrained_cfg["label_names"] == list(COLOURS)
