"""A run that an earlier version began goes on as that version would have gone on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from earlier import CHANGES, KEPT, STEPS, write_images
from runs import TINY, metrics, run
from safetensors.torch import load_file

from famba.training.compose import compose
from famba.training.config import ADDED_KEYS, plain
from famba.training.run_folder import RunFolder, as_begun, finished


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """Folder of the kept run, whose images lie beside it."""
    write_images(tmp_path / "images")
    return shutil.copytree(KEPT, tmp_path / "run")


def test_a_run_of_version_0_1_ends_with_the_weights_that_it_had_there(begun: Path) -> None:
    command = [*CHANGES, f"data.root={begun.parent / 'images'}"]
    run(begun, *command, f"trainer.max_steps={STEPS - 2}")
    summary = run(begun, *command)  # a run that continued is still one of that version
    assert summary["step"] == STEPS
    assert finished(RunFolder(begun, writes=False), compose([*TINY, *command, f"run_dir={begun}"])) == summary
    log = (begun / "train.log").read_text()
    assert "an earlier version of Famba began it: data.version=1" in log
    epochs = [line["epoch"] for line in metrics(begun) if line["kind"] == "epoch"]
    assert epochs == [0, 1, 2, 2, 3, 3], "metrics.jsonl goes on in its own numbering"
    assert 1 <= summary["selected"]["epoch"] <= 4, "the summary counts from 1"
    found, expected = load_file(begun / "model.safetensors"), load_file(begun / "expected.safetensors")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_same_run_begun_now_reads_its_images_otherwise(begun: Path) -> None:
    new = begun.parent / "new"
    run(new, *CHANGES, f"data.root={begun.parent / 'images'}")
    found, expected = load_file(new / "model.safetensors"), load_file(begun / "expected.safetensors")
    assert any(not torch.allclose(found[name], value, rtol=1e-2, atol=1e-3) for name, value in expected.items())


def test_an_earlier_run_of_the_papers_recipe_goes_on_by_the_same_command(tmp_path: Path) -> None:
    """Its augmentation was timm's own then."""
    asked = compose(["recipe=paper", f"run_dir={tmp_path}"])
    before = plain(compose(["recipe=paper", "recipe.augmentation=timm", "recipe.crop_padding=0", "data.workers=2"]))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(before))
    assert as_begun(asked, tmp_path) == asked  # it has all keys, so it is of this version: its recipe was chosen
    for key in ADDED_KEYS:
        group, name = key.split(".")
        del before[group][name]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(before))
    begun = as_begun(asked, tmp_path)
    assert (begun.recipe.augmentation, begun.recipe.crop_padding) == ("timm", 0)
    assert (begun.data.device, begun.trainer.eval_images) == ("cpu", None)
    chosen = compose(["recipe=light", f"run_dir={tmp_path}"])
    assert as_begun(chosen, tmp_path).recipe == chosen.recipe
