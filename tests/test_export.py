"""`famba export`: what it writes is tried in a fresh process, described, and kept only where it is right."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import timm
import torch
from naive import as_users_run_it
from runs import run
from safetensors.torch import load_file
from torch import Tensor, nn

from famba.analysis.trained import load_trained
from famba.cli import main as famba
from famba.export import check, folder
from famba.export.check import ExportError
from famba.export.folder import find_summary

Trained = tuple[Path, dict[str, Any]]
Printed = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


def exported(checkpoint: Path, target: str, out: Path, *options: str) -> int:
    with as_users_run_it():
        return famba(["export", str(checkpoint), "--format", target, "--out", str(out), *options])


@pytest.mark.slow
def test_a_folder_is_loaded_by_timm_in_a_fresh_process_to_the_bit(
    upper: Trained, tmp_path: Path, capsys: Printed
) -> None:
    path, summary = upper
    out = tmp_path / "model"
    assert exported(path, "safetensors", out) == 0
    said = capsys.readouterr().out
    for part in ("fusion upper: 65 tokens, 8 removed, 57 left", "fresh process by timm", "differ by at most 0.0e+00"):
        assert part in said
    assert sorted(file.name for file in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    weights = [load_file(place / "model.safetensors") for place in (out, path)]
    torch.testing.assert_close(*weights, rtol=0, atol=0)
    config = json.loads((out / "config.json").read_text())
    assert config["architecture"] == "vim_micro_patch4_32"
    assert timm.create_model(f"local-dir:{out}", pretrained=True).fusion == load_trained(path).schedule
    assert config["famba"]["results_of_training"]["top1"] == summary["top1"]
    assert config["famba"]["provenance_of_training"]["git_commit"] == summary["provenance"]["git_commit"]
    card = (out / "README.md").read_text()
    assert f"| Top-1 on the test images of digits | {summary['top1']:.2f} %" in card
    for part in ("| steps ", "## Training", "## Provenance", "@article{shen2024famba,", "library_name: timm"):
        assert part in card
    assert str(path) not in card + json.dumps(config), "a folder of this machine"


@pytest.mark.usefixtures("unchecked")
def test_another_schedule_is_told_from_that_of_training(upper: Trained, tmp_path: Path) -> None:
    options = ["--fusion", "all", "--budget", "8", "--order", "tome", "--weighting", "size"]
    assert exported(upper[0], "safetensors", tmp_path, *options) == 0
    arguments = json.loads((tmp_path / "config.json").read_text())["model_args"]
    assert (arguments["fusion"], arguments["fusion_order"], arguments["fusion_weighting"]) == ([2] * 4, "tome", "size")
    card = (tmp_path / "README.md").read_text()
    assert "This is not the schedule that the network was trained with." in card
    assert "tested with the schedule of training (" in card
    model, trained = timm.create_model(f"local-dir:{tmp_path}", pretrained=True), load_trained(upper[0])
    cfg = timm.data.resolve_model_data_config(model)
    assert (model.fusion, cfg["input_size"]) == ((2,) * 4, (3, 32, 32))
    assert (tuple(cfg["mean"]), tuple(cfg["std"])) == (trained.mean, trained.std)
    assert cfg["interpolation"] == trained.scaling.interpolation
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=4, fusion=(0,) * 4)
    assert (other.num_classes, other.fusion) == (4, (0,) * 4)


@pytest.mark.slow
def test_a_program_and_a_graph_hold_what_one_needs_to_use_them(upper: Trained, tmp_path: Path, capsys: Printed) -> None:
    for name, out in (("torch_export", tmp_path / "m.pt2"), ("onnx", tmp_path / "m.onnx")):
        assert exported(upper[0], name, out) == 0
        assert "12 random inputs in batches of 1, 3 and 8, logits differ by at most" in capsys.readouterr().out
    notes: dict[str, str] = {"famba.json": ""}
    torch.export.load(tmp_path / "m.pt2", extra_files=notes)
    found = json.loads(notes["famba.json"])
    assert json.loads(onnx.load(tmp_path / "m.onnx").metadata_props[0].value) == found
    assert (found["input_size"], found["num_classes"]) == ([3, 32, 32], 10)
    assert found["fusion"]["schedule"] == upper[1]["schedule"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "m.pt2"], "nothing is left behind"


@pytest.mark.slow
def test_a_transformer_goes_into_a_folder_and_fuses_again(tmp_path: Path, capsys: Printed) -> None:
    path = tmp_path / "run"
    shape = ("model=vit_micro", "model.depth=2", "model.embed_dim=16", "model.d_state=null", "model.patch_size=8")
    run(path, *shape, "fusion=all", "fusion.budget=4", "trainer.epochs=1")
    assert exported(path, "safetensors", tmp_path / "out") == 0
    assert "differ by at most 0.0e+00" in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("FOLDER", str(tmp_path / "out"))
    namespace: dict[str, Any] = {}
    exec(code.split("logits =")[0], namespace)
    assert namespace["model"].fusion == (2, 2)


def test_missing_packages_are_named_with_what_installs_them(
    upper: Trained, tmp_path: Path, capsys: Printed, monkeypatch: Patch
) -> None:
    found, missing = importlib.util.find_spec, "onnxscript"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else found(name))
    writes = SimpleNamespace(write=lambda model, shape, place, notes: f"{place.write_bytes(b'g')}")
    monkeypatch.setitem(sys.modules, "famba.export.onnx_graph", writes)
    assert exported(upper[0], "onnx", tmp_path / "m.onnx") == 2
    assert "--format onnx needs onnxscript; install: pip install 'famba[onnx]'" in capsys.readouterr().err
    missing = "onnxruntime"
    assert exported(upper[0], "onnx", tmp_path / "m.onnx") == 0
    assert "NOT CHECKED: onnxruntime is not installed; pip install 'famba[onnx]'" in capsys.readouterr().out


@pytest.mark.slow
def test_a_file_that_computes_something_else_is_not_kept(
    upper: Trained, tmp_path: Path, capsys: Printed, monkeypatch: Patch
) -> None:
    written = folder.save

    def spoiled(weights: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
        return written({**weights, "head.bias": weights["head.bias"] + 1}, metadata)

    monkeypatch.setattr(folder, "save", spoiled)
    (tmp_path / "config.json").write_text("[]")
    assert exported(upper[0], "safetensors", tmp_path) == 2
    assert "holds config.json of something else" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"famba": "an export before"}')
    assert exported(upper[0], "safetensors", tmp_path) == 2
    assert "differs from the model by 1.00e+00 on 12 of 12 random inputs" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
    assert "before" in (tmp_path / "config.json").read_text()


@pytest.mark.usefixtures("unchecked")
def test_results_are_those_of_the_very_weights(upper: Trained, tmp_path: Path) -> None:
    path, summary = upper
    assert find_summary(str(path))["top1"] == summary["top1"]  # type: ignore[index]
    (checkpoint, *_) = sorted((path / "checkpoints").glob("*.pt"))
    assert exported(checkpoint, "safetensors", tmp_path) == 0
    assert "None are known of these very weights" in (tmp_path / "README.md").read_text()
    copy = shutil.copytree(path, tmp_path / "copy")
    with (copy / "model.safetensors").open("ab") as file:
        file.write(b"more")
    assert find_summary(str(copy)) is None


@pytest.mark.parametrize(("wrong", "passes"), [([0, 0], True), ([1, 0], True), ([1, 1], False), ([2, 0], False)])
def test_one_image_may_differ_where_others_agree(wrong: list[int], passes: bool, monkeypatch: Patch) -> None:
    """wrong: how many of twelve images differ, at the first and at the second try."""
    model, tries = nn.Linear(2, 2).eval(), iter(wrong)

    def run_fresh(target: str, file: Path, inputs: list[Tensor]) -> list[Tensor]:
        found = [model(x).detach() for x in inputs]
        found[-1][: next(tries)] += float("nan")
        return found

    monkeypatch.setattr(check, "_run_fresh", run_fresh)
    outcome: Any = nullcontext() if passes else pytest.raises(ExportError, match="differs from the model")
    with outcome:
        said = check.check_file("onnx", Path("m.onnx"), model, (2,))
        assert "12 random inputs in batches of 1, 3 and 8, logits differ by at most 0.0e+00" in said
