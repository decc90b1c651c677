"""Weights from files and those that come with the package; and what is refused."""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

import famba
from famba.analysis.trained import load_trained
from famba.errors import CheckpointError, ConfigError
from famba.models import Vim, load_vim_checkpoint
from famba.models.weights import weights_folder

# torch says so of files by another program, before it refuses them.
pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")

GRID = 4


def make(seed: int = 0, **changes: Any) -> Vim:
    torch.manual_seed(seed)
    return Vim(**{"img_size": 8, "patch_size": 2, "embed_dim": 16, "depth": 2, "num_classes": 3, **changes})


@pytest.fixture
def source() -> Vim:
    return make(seed=1)


def save(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def assert_equal_weights(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def official(model: Vim) -> dict[str, Any]:
    namespace = argparse.Namespace(lr=5e-4, output_dir="", drop_path=0.0, layers=[1, 2], resume=None)
    return {"model": model.state_dict(), "epoch": 299, "args": namespace}


@pytest.mark.parametrize("layout", ["official", "state_dict", "plain", "legacy", "safetensors"])
def test_files_load_into_models_that_fuse_or_not(layout: str, tmp_path: Path, source: Vim) -> None:
    path, weights = tmp_path / ("w.safetensors" if layout == "safetensors" else "w.pth"), source.state_dict()
    if layout == "legacy":
        torch.save(official(source), path, _use_new_zipfile_serialization=False)
    elif layout == "safetensors":
        save_file(weights, path)
    else:
        save(path, {"official": official(source), "state_dict": {"state_dict": weights}, "plain": weights}[layout])
    model = make(fusion=(3, 2), fusion_weighting="size")
    assert load_vim_checkpoint(model, str(path)) is model
    assert_equal_weights(model.state_dict(), weights)
    if layout == "official":  # no further classes are allowed afterwards
        with pytest.raises(pickle.UnpicklingError):
            torch.load(path, weights_only=True)


def rows(embed: Tensor, index: int) -> tuple[Tensor, Tensor]:
    """The class token's row, and the rows of the patches."""
    return embed[0, index], torch.cat([embed[0, :index], embed[0, index + 1 :]])


PLACES = ("head", "middle", "none")


@pytest.mark.parametrize("size", [(8, 8), (12, 12), (6, 10)])
@pytest.mark.parametrize(("old", "new"), [*itertools.product(PLACES[:2], PLACES[:2]), ("none", "none")])
def test_position_embedding_is_resized_and_the_class_token_moves(
    old: str, new: str, size: tuple[int, int], tmp_path: Path
) -> None:
    source, grid = make(seed=1, cls_position=old), (size[0] // 2, size[1] // 2)
    path = save(tmp_path / "w.pth", official(source))
    model = load_vim_checkpoint(make(img_size=size, cls_position=new), path, cls_position=old)
    own, wanted = model.pos_embed.detach(), source.pos_embed.detach()
    if old != "none":
        (cls, own), (old_cls, wanted) = rows(own, model.cls_index), rows(wanted, source.cls_index)
        assert torch.equal(cls, old_cls)
        assert torch.equal(model.cls_token, source.cls_token)
    picture = wanted.reshape(1, GRID, GRID, 16).permute(0, 3, 1, 2)
    expected = F.interpolate(picture, size=grid, mode="bicubic", antialias=True).permute(0, 2, 3, 1).reshape(-1, 16)
    torch.testing.assert_close(own.reshape(-1, 16), expected)
    if size == (8, 8):
        assert torch.equal(own, wanted)
        back = save(tmp_path / "b.pth", model.state_dict())
        back = load_vim_checkpoint(make(cls_position=old), back, cls_position=new)
        assert_equal_weights(back.state_dict(), source.state_dict())


def resampled(embed: Tensor, new: tuple[int, int], old: tuple[int, int], prefix: int) -> Tensor:
    return timm.layers.resample_abs_pos_embed(embed, list(new), list(old), num_prefix_tokens=prefix)


def test_patches_are_taken_to_lie_in_a_square_unless_the_grid_is_given(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = make(seed=1, img_size=(4, 16))
    path = save(tmp_path / "w.pth", source.state_dict())
    model = load_vim_checkpoint(make(img_size=(4, 16)), path, grid=(2, 8))
    assert_equal_weights(model.state_dict(), source.state_dict())
    assert not caplog.records
    load_vim_checkpoint(model, path)
    assert torch.equal(model.pos_embed, resampled(source.pos_embed, (2, 8), (4, 4), 1))
    # Nothing says that they are not the model's own, so this is not for those alone who ask for details.
    (warned,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "its 16 patches are taken to lie 4 x 4" in warned.getMessage()
    assert "give load_vim_checkpoint grid=(2, 8)" in warned.getMessage()
    assert "pos_embed: 16 patches in the file are no grid of 2 x 7" in refused(make(), path, grid=(2, 7))


OFFICIAL = "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"


MODEL = {"cls_position": "middle", "patch_size": 2}
CONFIG = {"model": {"name": "vim_micro_patch4_32", **MODEL}, "data": {"image_size": 8}}
EXPORTED = {"architecture": "vim_micro_patch4_32", "model_args": {"img_size": [4, 16], **MODEL}}
SAYING: dict[str, dict[str, Any]] = {
    "official": {"args": argparse.Namespace(model=OFFICIAL)},
    "official Vim-B": {"args": argparse.Namespace(model=OFFICIAL.replace("midclstok", "middle_cls_token"))},
    "inside": {"config": CONFIG},
    "config.yaml": {},
    "config.json": {},
}


@pytest.mark.parametrize("where", SAYING)
def test_an_official_file_a_run_or_an_export_says_where_its_rows_belong(
    where: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    size, grid = ((4, 16), (2, 8)) if where == "config.json" else ((8, 8), (4, 4))
    source = make(seed=1, cls_position="middle", img_size=size)
    if where.startswith("config"):
        (tmp_path / where).write_text(json.dumps(EXPORTED if where == "config.json" else CONFIG))
    path = save(tmp_path / "w.pt", {"model": source.state_dict(), **SAYING[where]})
    same = load_vim_checkpoint(make(cls_position="middle", img_size=size), path)
    assert_equal_weights(same.state_dict(), source.state_dict())
    assert not caplog.records
    model = load_vim_checkpoint(make(cls_position="head", img_size=(16, 4)), path)
    assert "the class token moves from middle to head, where the weights have not learnt it" in caplog.text
    cls, others = rows(source.pos_embed, GRID * GRID // 2)
    assert torch.equal(model.pos_embed[0, 0], cls)
    assert torch.equal(model.pos_embed[:, 1:], resampled(others[None], (8, 2), grid, 0))
    assert "class token 'middle' in the file, 'none' in the model" in refused(make(cls_position="none"), path)
    # Who says it himself is believed.
    told = load_vim_checkpoint(make(cls_position="head"), path, cls_position="head", grid=(4, 4))
    assert torch.equal(told.pos_embed, source.pos_embed)


def refused(model: Vim, path: Path, **options: Any) -> str:
    """The refusal; nothing of the model may have changed."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with naive.as_users_run_it(), pytest.raises(CheckpointError) as caught:
        load_vim_checkpoint(model, path, **options)
    assert_equal_weights(model.state_dict(), before)
    assert path.name in str(caught.value)
    return str(caught.value)


def test_a_refusal_lists_everything_and_loads_nothing(tmp_path: Path, source: Vim) -> None:
    weights = source.state_dict()
    del weights["layers.1.mixer.D_b"], weights["norm_f.weight"]
    weights["extra.weight"] = torch.zeros(1)
    weights["layers.0.mixer.A_log"] = torch.zeros(5, 5)
    weights["head.weight"], weights["head.bias"] = torch.zeros(7, 16), torch.zeros(7)
    weights["note"] = "text"
    message = refused(make(), save(tmp_path / "w.pth", {"model": weights}))
    head = "in the model; reset_head=True keeps the model's own"
    parts = ["nothing was loaded", "extra.weight: not in the model", "note: not a tensor"]
    parts += [f"{name}: missing in the file" for name in ("layers.1.mixer.D_b", "norm_f.weight")]
    parts += ["layers.0.mixer.A_log: (5, 5) in the file, (32, 16) in the model"]
    parts += [f"head.weight: (7, 16) in the file, (3, 16) {head}", f"head.bias: (7,) in the file, (3,) {head}"]
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"depth": 30}, {}, "layers.19: missing in the file (17 of its weights)\n  and 18 more lines of this kind"),
        ({"depth": 1}, {}, "layers.1: not in the model (17 of its weights)"),
        ({"embed_dim": 32}, {}, "pos_embed: width 16 in the file, 32 in the model"),
        ({"cls_position": "none"}, {}, "cls_token: not in the model"),
        ({"cls_position": "none"}, {"cls_position": "head"}, "class token 'head' in the file, 'none' in the model"),
    ],
)
def test_weights_of_another_shape_are_refused(
    changes: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path, source: Vim
) -> None:
    path = save(tmp_path / "w.pth", source.state_dict())
    assert message in refused(make(**changes), path, **options)
    with pytest.raises(ConfigError, match="unknown cls_position 'mid', did you mean 'middle'"):
        load_vim_checkpoint(make(), path, cls_position="mid")


def test_reset_head_keeps_the_models_own_classifier(tmp_path: Path, source: Vim) -> None:
    path = save(tmp_path / "w.pth", official(source))
    model = make(num_classes=7)
    own = model.head.weight.clone()
    load_vim_checkpoint(model, path, reset_head=True)
    assert torch.equal(model.head.weight, own)
    assert torch.equal(model.norm_f.weight, source.norm_f.weight)
    assert torch.equal(model.layers[1].mixer.in_proj.weight, source.layers[1].mixer.in_proj.weight)


PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "module.backbone.", "model._orig_mod.", "net.module.")
HOLDERS = ("state_dict", "net", "model_ema", "teacher", "student", "ema", "state_dict_ema", "model_state_dict")


@pytest.mark.parametrize(("keys", "prefix"), [((), p) for p in PREFIXES] + [((h,), "module.") for h in HOLDERS])
def test_known_keys_and_prefixes_are_taken_off_and_said(
    keys: tuple[str, ...], prefix: str, tmp_path: Path, source: Vim, caplog: pytest.LogCaptureFixture
) -> None:
    content: Any = {prefix + name: value for name, value in source.state_dict().items()}
    for key in keys:
        content = {"epoch": 3, key: content, "config": None, "optimizer": {"state": {}}}
    with caplog.at_level(logging.INFO):
        model = load_vim_checkpoint(make(), save(tmp_path / "w.pth", content))
    assert_equal_weights(model.state_dict(), source.state_dict())
    assert prefix.replace("_orig_mod.", "") in caplog.text
    assert all(f"under {key!r}" in caplog.text or key == "state_dict" for key in keys)


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, source: Vim) -> None:
    source.layers[1].mixer.D.data[3] = float("nan")
    message = refused(make(), save(tmp_path / "w.pth", source.state_dict()))
    assert message.count("NaN or infinity") == 1
    assert "layers.1.mixer.D: holds NaN or infinity" in message


def test_a_file_of_another_network_is_refused_in_one_line(tmp_path: Path) -> None:
    for name in ("resnet18", "test_convnext", "test_vit"):  # the last with a class token, too
        message = refused(make(), save(tmp_path / "w.pth", {"net": timm.create_model(name).state_dict()}))
        assert "\n" not in message
        assert "w.pth is of another network: it holds " in message
        assert "; this model has cls_token, head.bias, " in message


@pytest.mark.parametrize(
    ("extra", "refused_type"),
    [
        (np.zeros(2), r"numpy\.\w+\.multiarray\._reconstruct"),
        (tmp := Path("runs"), rf"pathlib\S*\.{type(tmp).__name__}"),
        (None, r"famba\.models\.vim\.Vim"),
    ],
    ids=["array", "path", "whole module"],
)
def test_a_refused_type_is_named_and_the_code_shown_converts_the_file(
    extra: Any, refused_type: str, tmp_path: Path, source: Vim
) -> None:
    content = source if extra is None else {"model": source.state_dict(), "best": extra, "epoch": 3}
    torch.save(content, tmp_path / "it's.pth")
    message, code = refused(make(), tmp_path / "it's.pth").split(":\n", 1)
    assert re.search(rf"holds an object of the type {refused_type}, .*it's\.weights\.pt by this", message)
    exec(code, {})
    assert_equal_weights(load_vim_checkpoint(make(), tmp_path / "it's.weights.pt").state_dict(), source.state_dict())


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_files_are_refused(kind: str, tmp_path: Path, source: Vim) -> None:
    path, model = tmp_path / ("cut.safetensors" if kind == "safetensors" else "cut.pth"), make()
    if kind == "safetensors":
        save_file(source.state_dict(), path)
    else:
        torch.save(official(source), path, _use_new_zipfile_serialization=kind == "zip")
    data = path.read_bytes()
    for length in (0, 1, 10, 100, 1000, *(len(data) * i // 4 for i in range(1, 4)), len(data) - 1):
        path.write_bytes(data[:length])
        assert "truncated or no checkpoint" in refused(model, path), f"{length} of {len(data)} bytes"


NAME = "vim_micro_patch4_32"
FOLDER = Path(famba.__file__).parent / "models" / "weights" / NAME


def test_they_load_without_network_and_are_those_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("weights of the package need no network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    model = timm.create_model(NAME, pretrained=True).eval()
    assert_equal_weights(model.state_dict(), load_trained(FOLDER).model.state_dict())
    assert (model.num_classes, model.pretrained_cfg["license"]) == (100, "apache-2.0")
    assert timm.list_models("vim_*", pretrained=True) == [f"{NAME}.famba_cifar100"]


def test_they_say_where_they_come_from_and_are_small() -> None:
    assert (weights_folder(NAME), weights_folder("vim_tiny_patch16_224")) == (FOLDER, None)
    assert (FOLDER / "model.safetensors").stat().st_size < 3_000_000
    summary = json.loads((FOLDER / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["weights_sha256"] == famba.files.sha256(FOLDER / "model.safetensors")
    assert summary["provenance"]["git_commit"]


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
    kernel = own.patch_embed.proj.weight
    wanted = kernel.sum(1, keepdim=True) if channels == 1 else kernel[:, [0, 1, 2, 0]] * 3 / 4
    torch.testing.assert_close(model.patch_embed.proj.weight, wanted)
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


def test_as_created_they_have_the_accuracy_of_their_run() -> None:
    model, trained = timm.create_model(NAME, pretrained=True).eval(), load_trained(NAME)
    assert model.fusion == trained.schedule == (0,) * 8
    fused = timm.create_model(NAME, pretrained=True, fusion="upper").eval()
    with torch.no_grad():
        images, labels = sample(model)
        assert torch.equal(model(images), trained.model(images))
        # On all 10,000 test images 50.64 % as created, and 41.74 % with 55 tokens removed by `upper`.
        assert abs(int((model(images).argmax(1) == labels).sum()) - 65) <= 1
        assert abs(int((fused(images).argmax(1) == labels).sum()) - 55) <= 1
    assert timm.create_model(f"{NAME}.famba_cifar100", pretrained=True).fusion == model.fusion


SCHEDULE = (6, 7, 7, 7, 7, 7, 7, 7)


@pytest.fixture
def fused(tmp_path: Path) -> dict[str, Any]:
    """Return the arguments of timm.create_model for weights of a run that fused."""
    run = shutil.copytree(FOLDER, tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "schedule": SCHEDULE}))
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["fusion"] |= {"strategy": "all", "weighting": "size"}
    config["model"] |= {"cls_position": "middle"}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return {"pretrained": True, "pretrained_cfg_overlay": {"file": str(run / "model.safetensors")}}


def test_weights_of_a_run_fuse_as_it_did_unless_told_otherwise(fused: dict[str, Any], tmp_path: Path) -> None:
    model = timm.create_model(NAME, **fused)
    assert (model.fusion, model.settings.order, model.settings.weighting) == (SCHEDULE, "sequence", "size")
    asked = timm.create_model(NAME, **fused, cls_position="head")
    assert (model.cls_position, asked.cls_position) == ("middle", "head")
    assert not any(timm.create_model(NAME).fusion)
    model = timm.create_model(NAME, **fused, fusion_order="tome", fusion_mode="prune")
    assert (model.fusion, model.settings.order, model.settings.mode) == (SCHEDULE, "tome", "prune")
    assert timm.create_model(NAME, **fused, fusion=[0, 9] * 4).fusion == (0, 9) * 4
    larger = timm.create_model(NAME, **fused, img_size=64, num_classes=7)
    assert (larger.fusion, larger(torch.zeros(1, 3, 64, 64)).shape) == (SCHEDULE, (1, 7))
    assert timm.create_model(NAME, **fused, features_only=True, out_indices=(1, 3)).model.fusion == SCHEDULE[:4]
    # Weights alone say nothing of it.
    alone = shutil.copy(tmp_path / "run" / "model.safetensors", tmp_path / "alone.safetensors")
    fused["pretrained_cfg_overlay"] = {"file": str(alone)}
    assert not any(timm.create_model(NAME, **fused).fusion)


def test_a_size_that_their_schedule_does_not_fit_is_refused_with_the_argument(fused: dict[str, Any]) -> None:
    with naive.as_users_run_it():
        with pytest.raises(ConfigError, match=r"trained to fuse by \[6, 7, .*; give fusion= .* \[0\] \* 8") as caught:
            timm.create_model(NAME, **fused, img_size=16)
        assert caught.value.argument == "fusion"
        assert timm.create_model(NAME, **fused, img_size=16, fusion=[0] * 8).num_tokens == 17
