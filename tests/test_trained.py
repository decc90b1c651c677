"""A trained network comes back whole from wherever it lies, or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from runs import last_checkpoint, run
from torch import Tensor

from famba.analysis import trained
from famba.analysis.trained import load_trained
from famba.errors import CheckpointError
from famba.models import Vim

Trained = tuple[Path, dict[str, Any]]


@pytest.fixture
def copied(upper: Trained, tmp_path: Path) -> Path:
    return shutil.copytree(upper[0], tmp_path / "run")


def logits(model: Vim) -> Tensor:
    with torch.no_grad():
        return model(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))


def test_folder_weights_and_checkpoint_are_the_same_network(upper: Trained) -> None:
    folder, summary = upper
    found = [load_trained(place) for place in (folder, folder / "model.safetensors", last_checkpoint(folder))]
    for one in found:
        assert not one.model.training
        assert (list(one.schedule), one.fusion.strategy) == (summary["schedule"], "upper")
        assert (one.classes, one.image_size) == (10, 32)
        assert one.model.cls_position == "middle"
        torch.testing.assert_close(logits(one.model), logits(found[0].model), rtol=0, atol=0)
    assert "step 6" in found[2].source


def test_neither_data_nor_device_nor_summary_is_needed(copied: Path, upper: Trained) -> None:
    config = yaml.safe_load((copied / "config.yaml").read_text())
    config["data"] |= {"name": "folder", "root": "/nowhere/at/all"}
    config["trainer"]["device"] = "cuda:7"
    (copied / "config.yaml").write_text(yaml.safe_dump(config))
    (copied / "summary.json").unlink()
    assert load_trained(copied).schedule == tuple(upper[1]["schedule"])


def test_a_run_that_adapts_comes_back_with_its_last_schedule_or_not_at_all(tmp_path: Path) -> None:
    chosen = ("model.depth=4", "model.patch_size=4", "fusion=adaptive", "fusion.budget=32")
    last = tuple(run(tmp_path, *chosen, "trainer.max_steps=3")["schedule"])
    assert last != (8, 8, 8, 8)  # what the configuration alone comes to
    assert load_trained(tmp_path).schedule == load_trained(last_checkpoint(tmp_path)).schedule == last
    (tmp_path / "summary.json").unlink()
    with pytest.raises(CheckpointError, match="lies beside no summary.json"):
        load_trained(tmp_path)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no trained network"):
        load_trained(tmp_path)
    with pytest.raises(CheckpointError, match="did you mean 'vim_tiny_patch16_224'"):
        load_trained("vim_tiny_patch16_22")
    with pytest.raises(CheckpointError, match="there are no weights of vim_base_patch16_224"):
        load_trained("vim_base_patch16_224")


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_run_without_its_last_weights_names_its_checkpoint(copied: Path, goes_on: bool) -> None:
    if goes_on:  # by a larger trainer.max_steps; the weights are those of its first end
        summary = json.loads((copied / "summary.json").read_text())
        (copied / "summary.json").write_text(json.dumps({**summary, "status": "interrupted"}))
    else:
        (copied / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"not finished, or has lost its model.safetensors.*step_00000006\.pt"):
        load_trained(copied)


def test_weights_alone_do_not_say_what_they_are_of(copied: Path, tmp_path: Path) -> None:
    lone = shutil.copy(copied / "model.safetensors", tmp_path / "lone.safetensors")
    with pytest.raises(CheckpointError, match="lies beside no config.yaml"):
        load_trained(lone)
    torch.save({"model": load_trained(copied).model.state_dict()}, tmp_path / "official.pth")
    with pytest.raises(CheckpointError, match="is no checkpoint of a run"):
        load_trained(tmp_path / "official.pth")


@pytest.mark.parametrize("name", ["config.yaml", "summary.json"])
def test_damaged_files_are_named(copied: Path, name: str) -> None:
    for text in ("{", "[]"):
        (copied / name).write_text(text)
        with pytest.raises(CheckpointError, match=name):
            load_trained(copied)


def test_a_timm_name_brings_its_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "vim_micro_patch4_32"
    plain = timm.create_model(name, num_classes=7)
    cfg = {**plain.pretrained_cfg, "mean": (0.5,) * 3, "std": (0.25,) * 3, "crop_pct": 1.0}

    def build(asked: str, arguments: dict[str, Any]) -> Any:
        assert (asked, arguments) == (name, {"pretrained": True})
        plain.pretrained_cfg = cfg
        return plain

    monkeypatch.setattr("famba.models.weights.weights_folder", lambda name: None)
    monkeypatch.setattr(trained, "build_model", build)
    found = load_trained(name)
    assert (found.config, found.fusion.strategy, found.classes, found.image_size) == (None, "none", 7, 32)
    assert (found.mean, found.std, found.scaling.eval_crop) == ((0.5,) * 3, (0.25,) * 3, 1.0)
    assert not found.model.training
