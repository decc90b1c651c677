"""Weights that come with the package."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import naive
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import famba
from famba.analysis.trained import load_trained
from famba.errors import ConfigError
from famba.models import Vim, load_vim_checkpoint
from famba.models.weights import weights_folder
from famba.training.checkpoint import differences
from famba.training.compose import compose
from famba.training.config import plain

NAME = "vim_micro_patch4_32"
FOLDER = Path(famba.__file__).parent / "models" / "weights" / NAME


def test_they_load_without_network_and_are_those_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("weights of the package need no network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    model = timm.create_model(NAME, pretrained=True).eval()
    for name, value in load_trained(FOLDER).model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert (model.num_classes, model.pretrained_cfg["license"]) == (100, "apache-2.0")
    assert timm.list_models("vim_*", pretrained=True) == [f"{NAME}.famba_cifar100"]


def test_they_say_where_they_come_from_and_are_small() -> None:
    assert (weights_folder(NAME), weights_folder("vim_tiny_patch16_224")) == (FOLDER, None)
    assert (FOLDER / "model.safetensors").stat().st_size < 3_000_000
    summary = json.loads((FOLDER / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["weights_sha256"] == famba.files.sha256(FOLDER / "model.safetensors")
    assert summary["provenance"]["git_commit"]
    config = load_trained(FOLDER).config
    assert config is not None
    asked = compose(["experiment=cpu_table", f"fusion={config.fusion.strategy}", f"seed={config.seed}"])
    differ = [line.split(":")[0] for line in differences(plain(asked), plain(config))]
    assert set(differ) <= {"data.root", "data.version", "fusion.order", "fusion.weighting"}


def test_another_head_or_size_takes_what_fits() -> None:
    model = timm.create_model(NAME, pretrained=True, num_classes=10, img_size=64)
    own = timm.create_model(NAME, pretrained=True)
    assert torch.equal(model.layers[3].mixer.in_proj.weight, own.layers[3].mixer.in_proj.weight)
    assert model.head.weight.shape == (10, 64)
    assert model.pos_embed.shape == (1, 257, 64)
    moved = timm.create_model(NAME, pretrained=True, cls_position="middle")
    assert torch.equal(moved.pos_embed[:, 32], own.pos_embed[:, 0])
    assert torch.equal(moved.pos_embed[:, :32], own.pos_embed[:, 1:33])
    assert timm.create_model(NAME, pretrained=True, num_classes=0)(torch.zeros(1, 3, 32, 32)).shape == (1, 64)


@pytest.mark.parametrize("channels", [1, 4])
def test_other_input_channels_take_the_weights_as_in_timms_vits(
    channels: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, own = (timm.create_model(NAME, pretrained=True, in_chans=n).eval() for n in (channels, 3))
    grey = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    kernel = own.patch_embed.proj.weight
    wanted = kernel.sum(1, keepdim=True) if channels == 1 else kernel[:, [0, 1, 2, 0]] * 3 / 4
    torch.testing.assert_close(model.patch_embed.proj.weight, wanted)
    if channels == 1:
        torch.testing.assert_close(model(grey), own(grey.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)
    # A file and timm agree; the file's own channels are taken as they are.
    shape = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 8, "num_classes": 100, "in_chans": channels}
    for source in (FOLDER / "model.safetensors", tmp_path / "own.safetensors"):
        loaded = load_vim_checkpoint(Vim(**shape), source if source.exists() else FOLDER / "model.safetensors")
        torch.testing.assert_close(loaded.patch_embed.proj.weight, wanted)
        save_file(loaded.state_dict(), tmp_path / "own.safetensors")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


SAMPLE = Path(__file__).parent / "cifar100_sample"  # every 79th of the test images


def sample(model: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """Images as timm says that the model takes them (128, 3, 32, 32), and their labels (128,)."""
    sheet = np.asarray(Image.open(SAMPLE / "images.png").convert("RGB"))
    images = torch.from_numpy(sheet.copy()).reshape(8, 32, 16, 32, 3).permute(0, 2, 4, 1, 3).reshape(128, 3, 32, 32)
    cfg = timm.data.resolve_model_data_config(model)
    assert (cfg["input_size"], cfg["crop_pct"]) == ((3, 32, 32), 1.0), "nothing to scale or to crop"
    mean, std = (torch.tensor(cfg[name])[:, None, None] for name in ("mean", "std"))
    labels = torch.tensor([int(label) for label in (SAMPLE / "labels.txt").read_text().split()])
    return (images / 255 - mean) / std, labels


def test_as_created_they_fuse_as_their_run_did_and_as_the_commands_have_them() -> None:
    model, trained = timm.create_model(NAME, pretrained=True).eval(), load_trained(NAME)
    assert model.fusion == trained.schedule == (6, 7, 7, 7, 7, 7, 7, 7)
    assert model.settings == trained.model.settings
    plain = timm.create_model(NAME, pretrained=True, fusion=[0] * 8).eval()
    with torch.no_grad():
        images, labels = sample(model)
        assert torch.equal(model(images), trained.model(images))
        # On all 10,000 test images 18.51 % as trained, and 12.24 % without fusion.
        assert abs(int((model(images).argmax(1) == labels).sum()) - 26) <= 1
        assert abs(int((plain(images).argmax(1) == labels).sum()) - 18) <= 1
    assert timm.create_model(f"{NAME}.famba_cifar100", pretrained=True).fusion == model.fusion
    assert not any(timm.create_model(NAME).fusion)


def test_what_is_chosen_overrides_how_they_fuse() -> None:
    model = timm.create_model(NAME, pretrained=True, fusion_order="tome", fusion_mode="prune")
    assert (model.fusion, model.settings.order, model.settings.mode) == ((6, 7, 7, 7, 7, 7, 7, 7), "tome", "prune")
    assert timm.create_model(NAME, pretrained=True, fusion=[0, 9] * 4).fusion == (0, 9) * 4
    larger = timm.create_model(NAME, pretrained=True, img_size=64, num_classes=7)
    assert (larger.fusion, larger(torch.zeros(1, 3, 64, 64)).shape) == (model.fusion, (1, 7))
    assert timm.create_model(NAME, True, features_only=True, out_indices=(1, 3)).model.fusion == (6, 7, 7, 7)


def test_a_size_that_their_schedule_does_not_fit_is_refused_with_the_argument() -> None:
    with naive.as_users_run_it():
        with pytest.raises(ConfigError, match=r"trained to fuse by \[6, 7, .*; give fusion= .* \[0\] \* 8") as caught:
            timm.create_model(NAME, pretrained=True, img_size=16)
        assert caught.value.argument == "fusion"
        assert timm.create_model(NAME, pretrained=True, img_size=16, fusion=[0] * 8).num_tokens == 17


def test_weights_of_another_run_fuse_as_that_run_did(tmp_path: Path) -> None:
    run = shutil.copytree(FOLDER, tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "schedule": [0, 8] * 4}))
    config = (run / "config.yaml").read_text()
    changed = config.replace("order: sequence", "order: tome").replace("weighting: mean", "weighting: size")
    (run / "config.yaml").write_text(changed)
    weights = run / "model.safetensors"
    overlay = {"file": str(weights)}
    model = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay)
    assert (model.fusion, model.settings.order, model.settings.weighting) == ((0, 8) * 4, "tome", "size")
    # Weights alone say nothing of it.
    alone = shutil.copy(weights, tmp_path / "alone.safetensors")
    assert not any(timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay={"file": str(alone)}).fusion)
