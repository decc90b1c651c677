"""Runs that start from the weights of others."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import pytest
import torch
from images_and_loaders import write
from runs import TINY, last_checkpoint, run
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from famba.errors import CheckpointError
from famba.models.weights import weights_folder
from famba.training.checkpoint import TrainedOn, TrainingState, load
from famba.training.compose import compose
from famba.training.setup import prepare
from famba.training.trainer import new_state
from famba.training.weights import weights_sha256


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run without fusion, with an average of its weights."""
    folder = tmp_path_factory.mktemp("source")
    run(folder, "recipe.ema_decay=0.9")
    return folder


def begun(given: object, *overrides: str, classes: int = 10) -> TrainingState:
    """A run as it is before its first step."""
    config = compose([*TINY, f"init_from={given}", "run_dir=unused", *overrides])
    return new_state(config, prepare(config), TrainedOn(classes, None, {}), torch.device("cpu"))


def same(state: TrainingState, weights: dict[str, Tensor], but: tuple[str, ...] = ()) -> bool:
    own = state.model.state_dict()
    assert own.keys() == weights.keys()
    return all(torch.equal(own[name], weights[name]) for name in own if not name.startswith(but or "none"))


def refused(given: object) -> str:
    """Return the error that a run stops with before it starts."""
    with pytest.raises(CheckpointError) as caught:
        prepare(compose([*TINY, f"init_from={given}", "run_dir=unused"]))
    return str(caught.value)


def test_a_folder_and_each_of_its_files_are_the_same_weights(source: Path, tmp_path: Path) -> None:
    weights = load_file(source / "model.safetensors")
    official = {"model": weights, "epoch": 3, "args": argparse.Namespace(lr=1.0)}
    torch.save(official, tmp_path / "official.pth")
    forms = (source, source / "model.safetensors", last_checkpoint(source), tmp_path / "official.pth")
    for form in forms:
        state, expected = begun(form), {"weights_sha256": weights_sha256(weights), "new_classifier": False}
        assert same(state, weights)
        assert state.totals.started_from == {"init_from": str(form), **expected}


def test_weights_that_come_with_the_package_have_a_name() -> None:
    shipped = load_file(Path(weights_folder("vim_micro_patch4_32") or "") / "model.safetensors")
    shape = [f"model.{key}=null" for key in ("depth", "embed_dim", "d_state", "patch_size")]
    for name in ("vim_micro_patch4_32", "vim_micro_patch4_32.famba_cifar100"):
        state = begun(name, *shape)
        assert same(state, shipped, but=("head.",)), "digits have other classes"
        assert state.model.num_classes == 10
        assert state.totals.started_from["new_classifier"]


def test_the_average_is_taken_where_it_is_asked_for(source: Path) -> None:
    average = load(last_checkpoint(source))["ema"]
    raw = load_file(source / "model.safetensors")
    assert not torch.equal(average["head.weight"], raw["head.weight"])
    states = [begun(f"ema:{form}") for form in (source, last_checkpoint(source))]
    assert all(same(state, average) for state in states)
    told = {state.totals.started_from["weights_sha256"] for state in states}
    assert told == {weights_sha256(average)} != {weights_sha256(raw)}
    # A new average begins with what the run begins with.
    own = begun(source, "recipe.ema_decay=0.5")
    assert own.ema is not None
    assert all(torch.equal(value, raw[name]) for name, value in own.ema.module.state_dict().items())


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    told = "absent.pt is no file, no run folder and no timm model with bundled weights; these are vim_micro_patch4_32."
    assert told in refused(tmp_path / "absent.pt")
    assert "did you mean 'vim_micro_patch4_32'" in refused("vim_micro_patch4_3")
    assert "holds no trained network" in refused(tmp_path)


def test_other_images_of_other_classes_and_another_size(source: Path, tmp_path: Path) -> None:
    for part, count in (("train", 12), ("val", 3)):
        write(tmp_path / "images" / part, [f"{label}/{i}.png" for label in "abc" for i in range(count)])
    changes = ("data=folder", f"data.root={tmp_path / 'images'}", "data.image_size=64", "data.subset=null")
    changes = (*changes, "data.workers=0", "trainer.max_steps=1", "trainer.batch_size=12", "recipe.warmup_lr=0")
    summary = run(tmp_path / "tuned", f"init_from={source}", *changes, "fusion=lower", "fusion.budget=20")
    assert summary["status"] == "finished"
    assert (summary["image_size"], summary["tokens"]) == (64, 65)
    log = (tmp_path / "tuned" / "train.log").read_text()
    assert f"weights start from {source} (SHA-256 " in log
    assert "the position embedding is resampled from 4 x 4 to 8 x 8 patches" in log
    assert "with a new classifier, for other classes" in log
    # The first step's rate is 0, so these are the weights that it began with.
    start, tuned = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "tuned"))
    changed = {name for name in start if not torch.equal(start[name], tuned[name])}
    assert changed == {"pos_embed", "head.weight", "head.bias"}
    assert torch.equal(start["pos_embed"][:, :1], tuned["pos_embed"][:, :1])
    picture = start["pos_embed"][0, 1:].reshape(1, 4, 4, 16).permute(0, 3, 1, 2)
    larger = F.interpolate(picture, size=(8, 8), mode="bicubic", antialias=True).permute(0, 2, 3, 1).reshape(64, 16)
    torch.testing.assert_close(tuned["pos_embed"][0, 1:], larger)


def test_a_summary_tells_what_a_run_started_from(source: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(source, tmp_path / "source")
    settings = (f"init_from={moved}", "fusion=upper", "fusion.budget=5")
    first = run(tmp_path / "run", *settings, "trainer.max_steps=1")
    assert first["started_from"]["init_from"] == str(moved)
    # A run that has begun goes on without the weights that it began with, and still tells of them.
    shutil.rmtree(moved)
    longer = run(tmp_path / "run", *settings, "trainer.max_steps=2")
    assert longer["step"] == 2
    assert longer["started_from"] == first["started_from"]
    with pytest.raises(CheckpointError, match="init_from: .*before"):
        run(tmp_path / "run", f"init_from={source}", *settings[1:])
