"""A package outside famba adds rules and a backbone, and every command works with them."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import python, run

from famba.cli import main
from famba.errors import ConfigError
from famba.fusion import RULES, LayerTokens, TokenMap, register_rule
from famba.fusion.rules import bipartite
from famba.models import Vim, create_network
from famba.training.app import train
from famba.training.compose import compose, help_text
from famba.training.setup import prepare

OUTSIDE = Path(__file__).parent / "outside"
sys.path.insert(0, str(OUTSIDE))
importlib.import_module("famba_outside")  # registers with famba

MIXER = ("--config-dir", str(OUTSIDE / "configs"), "model=tiny_mixer", "data=digits", "data.subset=72", "recipe=quick")
SHORT = ("trainer.epochs=1", "trainer.batch_size=24", "trainer.precision=fp32", "recipe.warmup_epochs=0.5")


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An image file."""
    file = tmp_path_factory.mktemp("images") / "one.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file)
    return str(file)


@pytest.mark.parametrize(
    "cls_position", ["head", *(pytest.param(x, marks=pytest.mark.slow) for x in ("middle", "none"))]
)
def test_a_rule_of_ones_own_is_trained_evaluated_and_shown(cls_position: str, tmp_path: Path, picture: str) -> None:
    chosen = ("fusion=all", "fusion.budget=6", f"model.cls_position={cls_position}")
    summary = run(tmp_path / "run", *chosen, "fusion.rule=twos", "trainer.max_steps=1")
    assert summary["tokens_removed"] == 6
    small = ["--subset", "20", "--batch-size", "10", "--out", str(tmp_path)]
    assert main(["evaluate", str(tmp_path / "run"), "--rule", "bipartite,twos", *small]) == 0
    results = json.loads((tmp_path / "evaluate.json").read_text())["results"]
    assert [one["label"] for one in results] == ["all, rule twos", "none", "all, rule bipartite"]
    assert main(["visualize", str(tmp_path / "run"), picture, "--out", str(tmp_path / "pictures")]) == 0
    assert (tmp_path / "pictures" / "tokens_one.png").is_file()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("fusion.rule=by_keys", "rule 'by_keys' needs keys of the tokens, which a Vim does not have"),
        ("fusion.rule=twoes", "fusion.rule: unknown fusion rule 'twoes', did you mean 'twos'"),
        ("fusion.rule=twos fusion.mode=prune", "fusion.mode is 'prune'; rule 'twos' knows fuse alone"),
    ],
)
def test_a_rule_that_cannot_work_is_refused_before_anything_starts(overrides: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        prepare(compose(["model=vim_micro", "fusion=all", *overrides.split()]))
    assert message in str(error.value)


def test_a_rule_is_told_what_a_layer_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[LayerTokens] = []

    def watch(tokens: LayerTokens, r: int) -> TokenMap:
        seen.append(tokens)
        return bipartite(tokens, r)

    register_rule("watch", needs=["hidden", "mixed"])(watch)
    shape: Any = {"img_size": 32, "patch_size": 8, "num_classes": 3, "embed_dim": 16, "depth": 2, "d_state": 2}
    way: Any = {"fusion_rule": "watch", "fusion_place": "after_scan", "fusion_weighting": "size"}
    model = Vim(**shape, fusion=(2, 2), **way).eval()
    with torch.no_grad():
        model(torch.randn(2, 3, 32, 32))
    first, second = seen
    assert (first.grid, tuple(first.protected or ())) == ((4, 4), (0,))  # type: ignore[arg-type]
    assert first.metric is first.mixed
    assert first.sizes is None
    assert second.sizes is not None
    assert second.sizes.sum(1).tolist() == [17, 17]
    with pytest.raises(ConfigError, match="a rule named 'watch' is registered already"):
        register_rule("watch")
    with pytest.raises(ConfigError, match="unknown requirement of a rule 'key', did you mean 'keys'"):
        register_rule("another", needs=["key"])
    with pytest.raises(ConfigError, match="needs mixed of the tokens.* a Vim does not have at before_mixer"):
        model.set_fusion((2, 2), place="before_mixer")
    monkeypatch.delitem(RULES, "watch")


def test_a_backbone_of_ones_own_works_with_every_command(
    tmp_path: Path, picture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # For the processes that commands start.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(OUTSIDE), os.environ.get("PYTHONPATH", "")]))
    for name, fusion in (("none0", "none"), ("all0", "all")):
        folder = tmp_path / "runs" / name
        chosen = [f"fusion={fusion}", "fusion.budget=6", f"run_dir={folder}"]
        summary = train(compose([*MIXER, *SHORT, *chosen]), folder)
    assert summary["tokens_per_layer"] == [13, 10]
    again = [f"init_from={tmp_path / 'runs' / 'none0'}", f"run_dir={tmp_path / 'tuned'}", "trainer.max_steps=1"]
    train(compose([*MIXER, *SHORT, "fusion=all", "fusion.budget=6", *again]), tmp_path / "tuned")
    run_dir = str(tmp_path / "runs" / "all0")
    small = ["--fusion", "all,lower", "--budget", "4", "--subset", "20", "--batch-size", "10", "--out", str(tmp_path)]
    assert main(["evaluate", run_dir, *small]) == 0
    results = json.loads((tmp_path / "evaluate.json").read_text())["results"]
    assert [one["strategy"] for one in results] == ["all", "none", "all", "lower"]
    assert main(["visualize", run_dir, picture, "--fusion", "all,upper", "--out", str(tmp_path / "pictures")]) == 0
    assert "a network without convolutions" in help_text(OUTSIDE / "configs")
    plans = ["plan", "--config-dir", str(OUTSIDE / "configs"), "model=tiny_mixer", "fusion=all", "fusion.budget=6"]
    assert main([*plans, "data=digits", "--out", str(tmp_path / "plan")]) == 0
    _, fused = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert all(fused[name] == summary[name] for name in ("macs_per_image", "saved_bytes_per_image"))
    assert main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "report")]) == 0
    assert "tiny_mixer_patch8_32" in (tmp_path / "report" / "report.md").read_text().replace("\\", "")
    assert main(["export", run_dir, "--format", "safetensors", "--out", str(tmp_path / "exported")]) == 0


def test_a_backbone_says_what_it_cannot_do() -> None:
    with pytest.raises(ConfigError, match="model.d_state=4 cannot be chosen for tiny_mixer_patch8_32, a tiny mixer"):
        prepare(compose([*MIXER, "model.d_state=4"]))
    with pytest.raises(ConfigError, match="proportional is about attention, and a tiny mixer has none"):
        create_network("tiny_mixer_patch8_32", fusion_proportional=True)


def test_a_package_with_an_entry_point_is_imported_with_famba() -> None:
    code = "import famba, sys, timm; print('famba_outside' in sys.modules, 'twos' in famba.fusion.RULES)"
    done = python("-c", code, PYTHONPATH=os.pathsep.join([str(OUTSIDE), os.environ.get("PYTHONPATH", "")]))
    assert done.stdout.split() == ["True", "True"], done.stderr
