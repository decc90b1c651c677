"""Weights that come with the package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch

import famba
from famba.errors import CheckpointError
from famba.models.registered import weights_folder
from famba.training.checkpoint import differences
from famba.training.compose import compose
from famba.training.config import plain
from famba.training.trained import load_trained

NAME = "vim_micro_patch4_32"
FOLDER = Path(famba.__file__).parent / "models" / "weights" / NAME


def test_they_load_without_network_and_are_those_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("weights of the package need no network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    model = timm.create_model(NAME, pretrained=True).eval()
    trained = load_trained(FOLDER)
    for name, value in trained.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert (model.num_classes, model.pretrained_cfg["license"]) == (100, "apache-2.0")
    assert timm.list_models("vim_*", pretrained=True) == [f"{NAME}.famba_cifar100"]


def test_they_say_where_they_come_from_and_are_small() -> None:
    assert weights_folder(NAME) == FOLDER
    assert weights_folder("vim_tiny_patch16_224") is None
    assert (FOLDER / "model.safetensors").stat().st_size < 3_000_000
    summary = json.loads((FOLDER / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["weights_sha256"] == famba.files.sha256(FOLDER / "model.safetensors")
    assert summary["provenance"]["git_commit"]
    # By the name the schedule of the run comes along; timm's model fuses as it is told.
    assert load_trained(NAME).schedule == tuple(summary["schedule"])
    assert sum(timm.create_model(NAME, pretrained=True).fusion) == 0


def test_their_run_is_one_of_the_experiment() -> None:
    config = load_trained(FOLDER).config
    assert config is not None
    asked = compose(["experiment=cpu_table", f"fusion={config.fusion.strategy}", f"seed={config.seed}"])
    differ = [line.split(":")[0] for line in differences(plain(asked), plain(config))]
    assert set(differ) <= {"data.root", "fusion.order", "fusion.weighting"}


def test_another_head_or_size_takes_what_fits() -> None:
    model = timm.create_model(NAME, pretrained=True, num_classes=10, img_size=64)
    own = timm.create_model(NAME, pretrained=True)
    assert torch.equal(model.layers[3].mixer.in_proj.weight, own.layers[3].mixer.in_proj.weight)
    assert model.head.weight.shape == (10, 64)
    assert model.pos_embed.shape == (1, 257, 64)
    assert timm.create_model(NAME, pretrained=True, num_classes=0)(torch.zeros(1, 3, 32, 32)).shape == (1, 64)


def test_another_shape_is_refused_with_what_does_not_fit() -> None:
    with pytest.raises(CheckpointError, match="layers.4.mixer.A_log: not in the model"):
        timm.create_model(NAME, pretrained=True, depth=4)
