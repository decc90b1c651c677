"""Learning rates that fall from the classifier to the patches, for fine-tuning."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import timm
from runs import TINY
from torch import nn

from famba.models import Vim, apply_tome
from famba.training.compose import compose
from famba.training.config import RunConfig
from famba.training.optimizer import LearningRate, create_optimizer

DECAY = 0.5


def configured(*overrides: str) -> RunConfig:
    return compose([*TINY, "run_dir=unused", f"recipe.layer_decay={DECAY}", "recipe.weight_decay=0.1", *overrides])


def vim(**changes: Any) -> Vim:
    return Vim(img_size=8, patch_size=4, embed_dim=16, depth=3, num_classes=2, **changes)


def depth_of(name: str) -> int:
    """Groups between a parameter and the patches, of a network of three layers, by its name."""
    name = name.removeprefix("vit.")
    if name.startswith(("head", "fc_norm")):
        return 4
    layer = re.match(r"(?:layers|blocks)\.(\d)\.", name)
    if layer is not None:
        return 1 + int(layer[1])
    return 3 if name in ("norm_f.weight", "norm.weight", "norm.bias") else 0


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "vim": vim,
    "vim without class token": lambda: vim(cls_position="none"),
    "transformer": lambda: apply_tome(timm.create_model("vit_micro_patch4_32", depth=3, num_classes=2), (0, 1, 1)),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_every_parameter_has_the_rate_of_its_layer(kind: str) -> None:
    model = NETWORKS[kind]()
    config = configured("recipe.warmup_epochs=1", "trainer.epochs=3")
    optimizer = create_optimizer(model, config)
    plain = create_optimizer(model, configured("recipe.layer_decay=null", "recipe.warmup_epochs=1", "trainer.epochs=3"))
    rate, plain_rate = LearningRate(optimizer, config, 3), LearningRate(plain, config, 3)
    names = {parameter: name for name, parameter in model.named_parameters()}
    for step in range(9):
        top = rate.set(step)
        assert top == pytest.approx(plain_rate.set(step)), "the logged rate is the recipe's"
        seen = set()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = names[parameter]
                seen.add(name)
                assert group["lr"] == pytest.approx(top * DECAY ** (4 - depth_of(name))), name
                spared = parameter.ndim == 1 or name in model.no_weight_decay()
                assert group["weight_decay"] == (0 if spared else 0.1), name
        assert seen == set(names.values())
