"""Runs that start from the weights of others."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from report_runs import left_out, table_of, write_run
from runs import TINY, last_checkpoint, run
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from famba.errors import CheckpointError
from famba.models.weights import weights_folder
from famba.training.app import main
from famba.training.checkpoint import TrainedOn, TrainingState, load
from famba.training.compose import compose
from famba.training.config import plain
from famba.training.run_folder import RunFolder
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


def untrained(folder: Path, *overrides: str) -> dict[str, Tensor]:
    """Weights and configuration as a finished run leaves them, without its seconds of training."""
    config = compose([*TINY, f"run_dir={folder}", *overrides])
    model = new_state(config, prepare(config), TrainedOn(10, None, {}), torch.device("cpu")).model
    save_file(model.state_dict(), folder / "model.safetensors")
    RunFolder(folder, writes=True).write_config(plain(config))
    return model.state_dict()


def same(state: TrainingState, weights: dict[str, Tensor], but: tuple[str, ...] = ()) -> bool:
    own = state.model.state_dict()
    assert own.keys() == weights.keys()
    return all(torch.equal(own[name], weights[name]) for name in own if not name.startswith(but or "none"))


def refused(given: object, *overrides: str, run_dir: str = "unused") -> str:
    """Return the error that a run stops with before it starts."""
    with pytest.raises(CheckpointError) as caught:
        prepare(compose([*TINY, f"init_from={given}", f"run_dir={run_dir}", *overrides]))
    return str(caught.value)


# Where weights come from


def test_a_folder_and_each_of_its_files_are_the_same_weights(source: Path, tmp_path: Path) -> None:
    weights = load_file(source / "model.safetensors")
    official = {"model": weights, "epoch": 3, "args": argparse.Namespace(lr=1.0)}
    torch.save(official, tmp_path / "official.pth")
    forms = (source, source / "model.safetensors", last_checkpoint(source), tmp_path / "official.pth")
    states = [begun(form) for form in forms]
    assert all(same(state, weights) for state in states)
    told = [state.totals.started_from for state in states]
    assert [one["init_from"] for one in told] == [str(form) for form in forms]
    assert {one["weights_sha256"] for one in told} == {weights_sha256(weights)}
    assert {one["new_classifier"] for one in told} == {False}


def test_weights_that_come_with_the_package_have_a_name() -> None:
    folder = weights_folder("vim_micro_patch4_32")
    assert folder is not None
    shipped = load_file(folder / "model.safetensors")
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


def test_averages_that_nobody_kept_are_refused(source: Path, tmp_path: Path) -> None:
    for form in (source / "model.safetensors", "vim_micro_patch4_32"):
        assert "holds no averaged weights" in refused(f"ema:{form}")
    run(tmp_path / "plain", "trainer.max_steps=1")
    message = refused(f"ema:{tmp_path / 'plain'}")
    assert "step_00000001.pt holds no averaged weights" in message
    assert "leave out ema:" in message


def test_what_is_not_there_is_refused(source: Path, tmp_path: Path) -> None:
    message = refused(tmp_path / "absent.pt")
    assert "absent.pt is no file, no run folder and no timm model with bundled weights" in message
    assert "these are vim_micro_patch4_32.famba_cifar100" in message
    assert "did you mean 'vim_micro_patch4_32'" in refused("vim_micro_patch4_3")
    for name in ("vim_tiny_patch16_224", "vim_micro_patch4_32.other", "../absent", "."):
        assert "with bundled weights" in refused(name) or "holds no trained network" in refused(name)
    assert "holds no trained network" in refused(tmp_path)
    broken = shutil.copytree(source, tmp_path / "broken")
    (broken / "model.safetensors").unlink()
    assert "has lost its model.safetensors; give " in refused(broken)
    (broken / "model.safetensors").write_bytes(b"no weights")
    assert "truncated or no checkpoint" in refused(broken)
    assert "is no file" in refused("x" * 300)


def test_nothing_is_made_where_weights_are_missing_or_unfit(source: Path, tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    for change in (f"init_from={absent}", "model.depth=3"):
        arguments = [*TINY, f"init_from={source}", change, f"run_dir={tmp_path / 'run'}"]
        assert main(arguments) == 2
        assert main(["-m", *arguments, "fusion=none,upper", "fusion.budget=4"]) == 2
        assert main(["-m", *arguments, "fusion=none,upper", "fusion.budget=4", "hydra/launcher=local"]) == 2
    assert main(["-m", *TINY, f"init_from={source},{absent}", f"run_dir={tmp_path / 'run'}"]) == 2
    assert not list(tmp_path.iterdir())


# What may differ from the run that they come from


def test_any_schedule(source: Path) -> None:
    weights = load_file(source / "model.safetensors")
    for way in (("fusion=upper", "fusion.budget=5"), ("fusion=all", "fusion.budget=9", "fusion.order=tome")):
        state = begun(source, *way)
        assert any(state.model.fusion)
        assert same(state, weights)


def test_another_number_of_classes_or_none_gets_a_new_classifier(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = load_file(source / "model.safetensors")
    with caplog.at_level(logging.INFO):
        kept, new = begun(source), begun(source, "model.num_classes=20")
    assert same(kept, weights)
    assert new.model.num_classes == 20
    assert all(torch.equal(v, weights[k]) for k, v in new.model.state_dict().items() if not k.startswith("head."))
    assert "with their classifier" in caplog.text
    assert "with a new classifier, for other classes" in caplog.text
    backbone = {k: v for k, v in weights.items() if not k.startswith("head.")}
    save_file(backbone, tmp_path / "backbone.safetensors")
    assert begun(tmp_path / "backbone.safetensors").totals.started_from["new_classifier"]
    fresh = compose([*TINY, "model.num_classes=20", "run_dir=unused"])
    untrained = new_state(fresh, prepare(fresh), TrainedOn(10, None, {}), torch.device("cpu")).model
    assert torch.equal(new.model.state_dict()["head.weight"], untrained.state_dict()["head.weight"])


def test_other_images_of_other_classes_and_another_size(source: Path, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 3)):
        for label in "abc":
            folder = tmp_path / "images" / part / label
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(draw.integers(0, 256, (40, 40, 3), np.uint8)).save(folder / f"{i}.png")
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


def test_another_shape_or_kind_of_network_is_refused(source: Path, tmp_path: Path) -> None:
    for change in ("model.depth=3", "model.d_state=4", "model.embed_dim=32"):
        assert "does not fit this model; nothing was loaded" in refused(source, change)
    weights = load_file(source / "model.safetensors")
    renamed = {name.replace("layers.", "blocks."): value for name, value in weights.items()}
    save_file(renamed, tmp_path / "vit.safetensors")
    assert "vit.safetensors is of another network: it holds blocks" in refused(tmp_path / "vit.safetensors")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    assert "other.safetensors is of another network: it holds weight; this" in refused(tmp_path / "other.safetensors")


def test_files_of_others_start_a_run_and_the_log_says_what_was_taken_off(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = load_file(source / "model.safetensors")
    torch.save({"model_ema": {f"module.{name}": value for name, value in weights.items()}}, tmp_path / "w.pth")
    for given in (tmp_path / "w.pth", f"ema:{tmp_path / 'w.pth'}"):
        with caplog.at_level(logging.INFO):
            state = begun(given)
        assert same(state, weights)
        assert state.totals.started_from["weights_sha256"] == weights_sha256(weights)
        assert "w.pth: weights are taken " in caplog.text
    torch.save({**weights, "norm_f.weight": weights["norm_f.weight"] * float("nan")}, tmp_path / "nan.pth")
    assert "norm_f.weight: holds NaN or infinity" in refused(tmp_path / "nan.pth")


# What is told of them


def test_a_summary_tells_what_a_run_started_from(source: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(source, tmp_path / "source")
    settings = (f"init_from={moved}", "fusion=upper", "fusion.budget=5")
    first = run(tmp_path / "run", *settings, "trainer.max_steps=1")
    assert first["started_from"] == {
        "init_from": str(moved),
        "weights_sha256": weights_sha256(load_file(source / "model.safetensors")),
        "new_classifier": False,
    }
    # A run that has begun goes on without the weights that it began with, and still tells of them.
    shutil.rmtree(moved)
    longer = run(tmp_path / "run", *settings, "trainer.max_steps=2")
    assert longer["step"] == 2
    assert longer["started_from"] == first["started_from"]
    with pytest.raises(CheckpointError, match="init_from: .*before"):
        run(tmp_path / "run", f"init_from={source}", *settings[1:])
    assert json.loads((source / "summary.json").read_text())["started_from"] is None


def test_the_sum_is_of_names_shapes_and_values() -> None:
    weights: dict[str, Any] = {"a": torch.arange(4.0), "b": torch.zeros((), dtype=torch.bfloat16), "note": "text"}
    found = weights_sha256(weights)
    assert len(found) == 64
    assert weights_sha256(dict(reversed(list(weights.items())))) == found
    a = torch.arange(4.0)
    others = [{**weights, "a": other} for other in (a + 1, a.reshape(2, 2), a.view(torch.int32))]
    assert len({found, *map(weights_sha256, [*others, {"c": a, "b": weights["b"]}])}) == 5


def test_a_report_does_not_mix_runs_that_started_from_others(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path / f"scratch{seed}", seed=seed)
    write_run(tmp_path / "tuned", seed=2, config={"init_from": "runs/before"})
    assert table_of(tmp_path).rows.loc["none", "seeds"] == "0 1"
    assert left_out(tmp_path)["tuned"][1] == "init_from: runs/before, in the table not known"
