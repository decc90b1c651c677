"""Training a transformer that fuses, and pruning, end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from runs import run
from safetensors.torch import load_file

from famba.analysis.trained import load_trained
from famba.errors import ConfigError
from famba.fusion import schedule
from famba.models import apply_tome
from famba.training.compose import compose
from famba.training.setup import prepare

VIT = ("model=vit_micro", "model.d_state=null", "fusion.budget=8")
SHAPE: dict[str, Any] = {"patch_size": 8, "depth": 2, "embed_dim": 16, "num_classes": 10}


def test_a_transformer_trains_by_the_same_schedules(tmp_path: Path) -> None:
    summary = run(tmp_path / "run", *VIT, "fusion=upper", "fusion.layers=2")
    assert summary["status"] == "finished"
    assert summary["schedule"] == list(schedule("upper", 2, 17, 8, layers=2))
    assert summary["tokens_per_layer"] == [13, 9]
    assert summary["saved_bytes_per_image"] > 0
    trained = load_trained(tmp_path / "run")
    settings = trained.model.settings
    assert (settings.order, settings.weighting, settings.place) == ("tome", "size", "after_attention")
    assert (settings.rule, settings.mode, settings.proportional) == ("bipartite", "fuse", False)
    assert trained.schedule == (4, 4)
    # timm's own model takes the weights by their names.
    vit = timm.create_model("vit_micro_patch4_32", **SHAPE).eval()
    vit.load_state_dict(load_file(tmp_path / "run" / "model.safetensors"))
    images = torch.randn(2, 3, 32, 32)
    by_hand = apply_tome(vit, (4, 4), proportional=False)  # type: ignore[arg-type]
    torch.testing.assert_close(by_hand(images), trained.model(images))


@pytest.mark.parametrize("model", ["vim_micro", "vit_micro"])
def test_pruning_trains_with_the_schedule_of_fusing(model: str, tmp_path: Path) -> None:
    asked = (f"model={model}", *(("model.d_state=null",) if model == "vit_micro" else ()), "fusion=all")
    fused, pruned = (
        run(tmp_path / mode, *asked, "fusion.budget=8", f"fusion.mode={mode}", "trainer.max_steps=2")
        for mode in ("fuse", "prune")
    )
    assert fused["schedule"] == pruned["schedule"]
    assert fused["macs_per_image"] == pruned["macs_per_image"]
    assert fused["loss"] != pruned["loss"]
    assert load_trained(tmp_path / "prune").model.settings.mode == "prune"


def test_attention_in_proportion_is_off_in_training_unless_asked_for(tmp_path: Path) -> None:
    usual = run(tmp_path / "usual", *VIT, "fusion=all", "trainer.max_steps=2")
    asked = run(tmp_path / "asked", *VIT, "fusion=all", "fusion.proportional=true", "trainer.max_steps=2")
    assert usual["loss"] != asked["loss"]
    assert load_trained(tmp_path / "asked").model.settings.proportional


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=vit_tiny", "model.d_state=4"], "model.d_state=4 cannot be chosen for"),
        (["model=vim_ti", "fusion.proportional=true"], "fusion.proportional is about attention, and a Vim has none"),
        (["model=vim_ti", "fusion.place=after_attention"], "did you mean 'after_scan'?, where a Vim reduces no tokens"),
        (["model=vit_tiny", "model.name=vit_base_patch16_siglip_224"], "global_pool='map'"),
        (["model=vit_tiny", "fusion.mode=prune", "fusion.proportional=true"], "has no effect with fusion.mode=prune"),
        (["model=vit_tiny", "model.embed_dim=100"], "cannot be built with these model keys"),
    ],
)
def test_what_a_transformer_cannot_do_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        prepare(compose([*overrides, "data=digits"]))
    assert message in str(caught.value)
