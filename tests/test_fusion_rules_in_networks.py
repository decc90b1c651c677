"""Every rule works in the networks that it can serve, with every strategy and command, and is refused in others."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from runs import TINY, run
from torch import Tensor, nn

from famba.cli import main
from famba.errors import ConfigError
from famba.fusion import RULES, LayerTokens, TokenMap
from famba.models import Backbone, Vim, apply_tome, create_network
from famba.training.compose import compose
from famba.training.setup import prepare

NAMES = ("bipartite", "r_meeto", "neighbours", "grid", "delta", "output")
SHAPE: dict[str, Any] = {"img_size": (16, 24), "patch_size": 4, "num_classes": 3, "embed_dim": 16, "d_state": 2}


def place_of(rule: str) -> str:
    return "after_scan" if rule in ("delta", "output") else "before_mixer"


def vim(rule: str, strategy: str = "all", seed: int = 0, depth: int = 4, **more: Any) -> Vim:
    """Twenty-four patches, four by six, with weights away from their special first values."""
    torch.manual_seed(seed)
    how = {"fusion_rule": rule, "fusion_place": place_of(rule), "fusion_budget": 12, **more}
    model = Vim(**SHAPE, depth=depth, fusion=strategy, **how)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 16, 24, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))


@pytest.mark.parametrize("cls", ["head", "middle", "none"])
@pytest.mark.parametrize("mode", ["fuse", "prune"])
@pytest.mark.parametrize("rule", NAMES)
def test_a_vim_loses_exactly_its_budget_and_its_gradients_are_those_of_float64(rule: str, mode: str, cls: str) -> None:
    model = vim(rule, cls_position=cls, fusion_mode=mode, fusion_weighting="size")
    x = images()
    assert sum(model.fusion) == 12
    run = model.run(x)
    assert run.stream.hidden.shape[1] == model.num_tokens - 12
    left = model.not_pruned(x)[-1].sum(1)
    assert left.tolist() == [12 if mode == "prune" else 24] * 2
    held = model.trace(x)[-1]
    # The special token stands alone: no patch is at its place.
    if cls != "none":
        special = torch.as_tensor(run.tokens.special).expand(2, 1)
        assert not held.eq(special).any()
    assert [len(set(image)) for image in held.tolist()] == [12, 12]
    wide = deepcopy(model).double()
    assert torch.equal(wide.trace(x.double())[-1], held)
    for single, double in zip(gradients(model, x), gradients(wide, x.double()), strict=True):
        torch.testing.assert_close(single.double(), double, rtol=2e-3, atol=2e-3 * float(double.abs().max()))


@pytest.mark.parametrize("rule", NAMES)
def test_every_strategy_spends_the_same_budget(rule: str) -> None:
    for strategy in ("interleaved", "lower", "upper", "decreasing"):
        model = vim(rule, strategy)
        assert sum(model.fusion) == 12
        assert model(images()).isfinite().all()
    listed = vim(rule, "custom", fusion_budget=(0, 4, 0, 8))
    assert listed.fusion == (0, 4, 0, 8)
    assert [int(held.max()) for held in listed.trace(images())] == [24, 20, 20, 12]
    checkpointed, x = deepcopy(listed).train(), images()
    checkpointed.set_grad_checkpointing()
    for one, other in zip(gradients(listed.train(), x), gradients(checkpointed, x), strict=True):
        torch.testing.assert_close(one, other)


def test_rules_see_what_the_scans_did_also_where_layers_are_called_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[LayerTokens] = []
    original = RULES["delta"]

    def watch(tokens: LayerTokens, r: int) -> TokenMap:
        seen.append(tokens)
        return original.choose(tokens, r)

    monkeypatch.setitem(RULES, "delta", original._replace(choose=watch))
    model, x = vim("delta", depth=1).double(), images().double()
    expected, mixer = model(x), model.layers[0].mixer
    torch.testing.assert_close(seen[0].hidden, model.embed(x).hidden)
    measured = mixer.scan(seen[0].features, measure=True)[1]
    mixer.x_proj.register_forward_hook(lambda module, given, result: result)
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    for tokens in seen:
        found = (tokens.step_sizes, tokens.outputs)
        torch.testing.assert_close(found, tuple(measured), rtol=1e-5, atol=1e-5)
        assert not any(measure.requires_grad for measure in found)


@pytest.mark.parametrize("rule", ["bipartite", "neighbours", "grid"])
@pytest.mark.parametrize("mode", ["fuse", "prune"])
def test_a_transformer_fuses_by_the_rules_that_need_no_scan(rule: str, mode: str) -> None:
    shape: dict[str, Any] = {"img_size": (16, 24), "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2}
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=3, reg_tokens=2, **shape)
    model = apply_tome(vit, (4, 4, 4), rule=rule, order="sequence", mode=mode, proportional=mode == "fuse")
    held = model.trace(images())[-1]
    assert [len(set(image)) for image in held.tolist()] == [12, 12]
    assert int(held.min()) == 3, "class token and registers stay at the head"
    assert int(held.max()) == 14
    assert model(images()).isfinite().all()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["fusion.rule=delta"], "needs step_sizes of the tokens, .* at before_mixer; .* or place=after_scan"),
        (["fusion.rule=output"], "needs outputs of the tokens, .* or place=after_scan"),
        *(
            (["model=vit_micro", f"fusion.rule={rule}", "fusion.order=sequence"], f"{need}.* transformer does not have")
            for rule, need in (("delta", "step_sizes"), ("output", "outputs"), ("r_meeto", "hidden"))
        ),
        (
            ["fusion.rule=grid", "fusion.budget=53"],
            "fusion.budget: rule 'grid' cannot remove 53 of 8 x 8 .* is 52 or 54",
        ),
        (["fusion=custom", "fusion.rule=grid", "fusion.budget=[9,0,0,0,0,0,0,0]"], "fusion.budget: .* is 8 or 15"),
        (["fusion.rule=neighbours", "fusion.guard=30"], "fusion.budget: layer 0 removes 6 .* Lower the budget"),
        (["fusion.guard=1"], "fusion.guard is 1 with rule 'bipartite'; allowed: 0, or more with neighbours"),
        (["fusion=adaptive", "fusion.rule=grid"], "strategy 'adaptive' measures the pairs that rule 'bipartite' makes"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(compose(["model=vim_micro", "fusion=all", *overrides]))


def test_a_schedule_of_other_rules_is_refused_or_refitted() -> None:
    model: Backbone = create_network("vim_micro_patch4_32", fusion="all", fusion_budget=55, num_classes=3)
    assert model.fusion == (6, 7, 7, 7, 7, 7, 7, 7)
    with pytest.raises(ConfigError, match=r"the nearest that it can is \[8, 7, 7, 6, 6, 6, 8, 7\]"):
        model.set_fusion(model.fusion, rule="grid")
    assert model.settings.rule == "bipartite"
    model.set_fusion((8, 7, 7, 6, 6, 6, 8, 7), rule="grid")
    assert int(model.trace(torch.randn(1, 3, 32, 32))[-1].max()) == 9


@pytest.mark.parametrize(
    "rule", ["grid", "delta", *(pytest.param(x, marks=pytest.mark.slow) for x in ("r_meeto", "neighbours", "output"))]
)
def test_rules_are_trained_planned_evaluated_shown_and_reported(rule: str, tmp_path: Path) -> None:
    chosen = ("fusion=all", f"fusion.rule={rule}", f"fusion.place={place_of(rule)}", "fusion.budget=7")
    folder = tmp_path / "runs" / rule
    summary = run(folder, *chosen, "trainer.max_steps=1")
    assert summary["tokens_removed"] == 7
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / "one.png")
    asked = ["--mode", "fuse,prune", "--rule", f"bipartite,{rule}", "--subset", "20", "--batch-size", "10"]
    assert main(["evaluate", str(folder), *asked, "--out", str(tmp_path / "evaluated")]) == 0
    own, *others = json.loads((tmp_path / "evaluated" / "evaluate.json").read_text())["results"]
    assert (own["label"], own["schedule"]) == (f"all, rule {rule}, mode fuse", summary["schedule"])
    names = ["none", *(f"all, rule {name}" for name in ("bipartite, mode fuse", "bipartite, mode prune"))]
    assert [one["label"] for one in others] == [*names, f"all, rule {rule}, mode prune"]
    assert {one["removed"] for one in others} == {0, 7}
    assert main(["plan", *TINY, *chosen, "--out", str(tmp_path / "plan")]) == 0
    _, own = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert own["tokens_removed"] == 7
    assert main(["visualize", str(folder), str(tmp_path / "one.png"), "--out", str(tmp_path / "pictures")]) == 0
    assert (tmp_path / "pictures" / "tokens_one.png").is_file()
    assert main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "report")]) == 0
    assert main(["export", str(folder), "--format", "safetensors", "--out", str(tmp_path / "exported")]) == 0
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["famba"]["fusion"]["rule"] == rule
