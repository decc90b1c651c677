"""Training besides the usual Vim: transformers, pruning, adaptive schedules, and rates by layer."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from runs import TINY, metrics, run
from safetensors.torch import load_file
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.nn import functional as F

from famba.analysis.trained import load_trained
from famba.errors import ConfigError
from famba.fusion import match, schedule
from famba.fusion.rules import closest_cosines
from famba.models import Vim, apply_tome
from famba.training.compose import compose
from famba.training.optimizer import create_optimizer, learning_rate, set_learning_rate

VIT = ("model=vit_micro", "model.d_state=null", "fusion.budget=8")
ADAPTIVE = ("fusion=adaptive", "fusion.budget=8", "fusion.adapt_at=[0.2,0.5]", "fusion.adapt_images=16")
DECAY = 0.5


def test_a_transformer_trains_by_the_same_schedules(tmp_path: Path) -> None:
    summary = run(tmp_path / "run", *VIT, "fusion=upper", "fusion.layers=2")
    assert summary["schedule"] == list(schedule("upper", 2, 17, 8, layers=2))
    assert (summary["status"], summary["tokens_per_layer"]) == ("finished", [13, 9])
    trained = load_trained(tmp_path / "run")
    settings = trained.model.settings
    assert (settings.order, settings.weighting, settings.place) == ("tome", "size", "after_attention")
    assert (settings.rule, settings.mode, settings.proportional) == ("bipartite", "fuse", False)
    # timm's own model takes the weights by their names.
    vit = timm.create_model("vit_micro_patch4_32", patch_size=8, depth=2, embed_dim=16, num_classes=10).eval()
    vit.load_state_dict(load_file(tmp_path / "run" / "model.safetensors"))
    images = torch.randn(2, 3, 32, 32)
    by_hand = apply_tome(vit, (4, 4), proportional=False)  # type: ignore[arg-type]
    torch.testing.assert_close(by_hand(images), trained.model(images))


@pytest.mark.parametrize(
    ("model", "key", "value", "is_same"),
    [
        ("vim_micro", "mode", "prune", True),
        ("vit_micro", "mode", "prune", True),
        ("vit_micro", "proportional", "true", False),
    ],
)
def test_a_way_of_reducing_tokens_is_trained_and_kept(
    model: str, key: str, value: str, is_same: bool, tmp_path: Path
) -> None:
    asked = [f"model={model}", *(["model.d_state=null"] if model == "vit_micro" else []), "fusion=all"]
    asked += ["fusion.budget=8", "trainer.max_steps=2"]
    usual, other = (run(tmp_path / str(len(more)), *asked, *more) for more in ([], [f"fusion.{key}={value}"]))
    assert usual["schedule"] == other["schedule"]
    assert not is_same or usual["macs_per_image"] == other["macs_per_image"]
    assert usual["loss"] != other["loss"]
    assert str(getattr(load_trained(tmp_path / "1").model.settings, key)).lower() == value


# The budget of fusion=adaptive goes where tokens are similar, exactly, and stays there until it is measured again.


def test_similarity_is_measured_in_float32_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert closest_cosines(torch.randn(2, 9, 4), 0).dtype == torch.float32


@pytest.mark.parametrize("protected", [None, 0, 3, torch.tensor([5, 0])])
def test_similarity_is_that_of_the_pairs_that_fuse(protected: int | torch.Tensor | None) -> None:
    torch.manual_seed(0)
    metric = torch.randn(2, 9, 4, dtype=torch.float64)
    found = closest_cosines(metric, protected)
    for image in range(2):
        guard = None if protected is None else int(torch.as_tensor(protected).expand(2)[image])
        # Dealt in turn, beginning with A, as if the protected token stood before the others and had been dealt to A.
        free = [place for place in range(9) if place != guard]
        in_a, in_b = (free[::2], free[1::2]) if guard is None else (free[1::2], free[::2])
        by_hand = [
            max(float(F.cosine_similarity(metric[image, a], metric[image, b], dim=0)) for b in in_b) for a in in_a
        ]
        torch.testing.assert_close(found[image], torch.tensor(sorted(by_hand, reverse=True), dtype=torch.float64))
        places = match(metric, 1, protected).places[image]
        (pair,) = [(i, j) for i in range(9) for j in range(i + 1, 9) if places[i] == places[j]]
        assert float(F.cosine_similarity(*metric[image, list(pair)], dim=0)) == pytest.approx(float(found[image, 0]))


def test_a_model_tells_where_its_images_would_spend_and_takes_the_schedule() -> None:
    counts = schedule("upper", 4, 65, 40)
    models = []
    for options in ({"fusion": counts}, {}):
        torch.manual_seed(0)
        shape = {"depth": 4, "embed_dim": 32, "num_classes": 10}
        models.append(timm.create_model("vim_micro_patch4_32", **shape, **options).eval())
    built, later = models
    images = torch.randn(2, 3, 32, 32)
    before, found = later(images), later.adapted_fusion(images, 40)
    assert sum(found.schedule) == 40
    assert found == later.adapted_fusion(images, 40)
    assert torch.equal(later(images), before)
    later.set_fusion(counts)
    assert torch.equal(later(images), built(images))
    with pytest.raises(ConfigError, match="the schedule has 2 entries, but the model has 4 layers"):
        later.set_fusion((1, 1))


def test_a_run_adapts_when_it_is_told_to_and_says_so(tmp_path: Path) -> None:
    summary = run(tmp_path, *ADAPTIVE)
    assert [entry["step"] for entry in summary["adapted"]] == [1, 3]
    assert summary["schedule"] == summary["adapted"][-1]["schedule"]
    assert all(sum(entry["schedule"]) == summary["tokens_removed"] == 8 for entry in summary["adapted"])
    logged = [line for line in metrics(tmp_path) if line["kind"] == "schedule"]
    assert [line["step"] for line in logged] == [2, 4]
    assert [logged[-1][f"layer_{layer}"] for layer in range(2)] == summary["schedule"]


# Learning rates


def vim(**changes: Any) -> Vim:
    return Vim(img_size=8, patch_size=4, embed_dim=16, depth=3, num_classes=2, **changes)


def depth_of(name: str) -> int:
    """Groups between a parameter and the patches, of a network of three layers, by its name."""
    name = name.removeprefix("vit.")
    if name.startswith(("head", "fc_norm")):
        return 4
    if layer := re.match(r"(?:layers|blocks)\.(\d)\.", name):
        return 1 + int(layer[1])
    return 3 if name in ("norm_f.weight", "norm.weight", "norm.bias") else 0


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "vim": vim,
    "vim without class token": lambda: vim(cls_position="none"),
    "transformer": lambda: apply_tome(timm.create_model("vit_micro_patch4_32", depth=3, num_classes=2), (0, 1, 1)),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_with_layer_decay_every_parameter_has_the_rate_of_its_layer(kind: str) -> None:
    model = NETWORKS[kind]()
    config = compose([*TINY, f"recipe.layer_decay={DECAY}", "recipe.weight_decay=0.1", "trainer.epochs=3"])
    optimizer = create_optimizer(model, config)
    names = {parameter: name for name, parameter in model.named_parameters()}
    for step in range(9):
        set_learning_rate(optimizer, top := learning_rate(config, 3, step))
        seen = set()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = names[parameter]
                seen.add(name)
                assert group["lr"] == pytest.approx(top * DECAY ** (4 - depth_of(name))), name
                spared = parameter.ndim == 1 or name in model.no_weight_decay()
                assert group["weight_decay"] == (0 if spared else 0.1), name
        assert seen == set(names.values())


@pytest.mark.parametrize("steps", ["epoch", "update"])
@pytest.mark.parametrize("warmup", [0, 0.25, 2])
def test_rates_are_bit_by_bit_those_of_timms_scheduler(steps: str, warmup: float) -> None:
    config = compose([*TINY, f"recipe.lr_steps={steps}", f"recipe.warmup_epochs={warmup}", "trainer.epochs=7"])
    mine, recipe = SimpleNamespace(param_groups=[{"lr": 0.0}, {"lr": 0.0, "lr_scale": DECAY}]), config.recipe
    top = recipe.lr * 24 / recipe.lr_batch
    theirs: Any = SimpleNamespace(param_groups=[{"lr": top}, {"lr": top, "lr_scale": DECAY}])
    timms, _ = create_scheduler_v2(
        theirs, sched="cosine", num_epochs=7, warmup_epochs=warmup, warmup_lr=recipe.warmup_lr, min_lr=recipe.min_lr,
        step_on_epochs=steps == "epoch", updates_per_epoch=0 if steps == "epoch" else 5,
    )  # type: ignore[arg-type]  # fmt: skip
    for step in range(37):
        timms.step(step // 5) if steps == "epoch" else timms.step_update(step)
        set_learning_rate(mine, learning_rate(config, 5, step))  # type: ignore[arg-type]
        assert [group["lr"] for group in mine.param_groups] == [group["lr"] for group in theirs.param_groups]
