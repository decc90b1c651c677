"""What cannot work is refused by its key, whatever it is; what the schema allows is not refused by mistake."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
from config_fuzz import TINY, cases, is_drawable, judge, leaves, valid

from famba.fusion.schedules import STRATEGIES
from famba.training.compose import compose
from famba.training.config import parse, plain
from famba.training.setup import prepare

PARTS, CASES = 4, 80  # scripts/fuzz_config.py runs a thousand


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_random_configurations_that_cannot_work_are_refused_by_name(part: int, tmp_path: Path) -> None:
    faults = []
    for number, case in enumerate(cases(CASES, seed=7)[part::PARTS]):
        folder = tmp_path / str(number)
        folder.mkdir()
        verdict = judge(case, folder)
        if verdict.fault:
            faults.append(f"{verdict.fault}: {case.arguments} gave {verdict.message}")
    assert not faults, "\n".join(faults)


# Keys whose values have to fit one another, or the machine; `_together` draws the most of them.
COUPLED = {
    "data.image_size",
    "data.num_classes",
    "data.subset",
    "data.val_fraction",
    "fusion.adapt_at",
    "fusion.adapt_images",
    "fusion.budget",
    "fusion.layers",
    "fusion.place",
    "fusion.proportional",
    "model.d_state",
    "model.depth",
    "model.embed_dim",
    "model.num_classes",
    "model.patch_size",
    "recipe.augmentation",
    "recipe.color_jitter",
    "recipe.crop_padding",
    "recipe.cutmix",
    "recipe.mixup",
    "recipe.random_erasing",
    "recipe.warmup_epochs",
    "trainer.accumulation",
    "trainer.batch_size",
    "trainer.cuda_graphs",
    "trainer.epochs",
    "trainer.precision",
}


def _together(rng: random.Random) -> dict[str, Any]:
    patch, depth, epochs = rng.choice([2, 4, 8]), rng.randrange(4, 9), rng.randrange(1, 1000)
    side = rng.randrange(2, 9)
    accumulation, subset = rng.randrange(1, 4), rng.randrange(100, 1438)
    strategy = rng.choice([*STRATEGIES, "none"])
    timm = rng.random() < 0.5
    return {
        "model.patch_size": patch,
        "model.depth": depth,
        "model.embed_dim": rng.randrange(1, 99),
        "model.d_state": rng.randrange(1, 99),
        "model.num_classes": rng.choice([None, 10, 1000]),
        "data.image_size": patch * side,
        "data.num_classes": rng.choice([None, 10]),
        "data.subset": subset,
        "data.val_fraction": rng.choice([0.0, rng.uniform(0, 0.5)]),
        "fusion.strategy": strategy,
        "fusion.budget": rng.choice([0, side * side // 2, rng.uniform(1e-3, 0.5)]),
        "fusion.layers": rng.choice([None, rng.randrange(2, depth + 1)]) if strategy in ("lower", "upper") else None,
        "fusion.adapt_at": [rng.random()] if strategy == "adaptive" else None,
        "fusion.adapt_images": rng.randrange(1, 99) if strategy == "adaptive" else None,
        "fusion.place": rng.choice(["before_mixer", "after_scan"]),
        "fusion.proportional": False,
        "trainer.accumulation": accumulation,
        "trainer.batch_size": 2 * accumulation * rng.randrange(1, 1 + subset // 2 // (2 * accumulation)),
        "trainer.epochs": epochs,
        "recipe.warmup_epochs": rng.choice([0.0, epochs * rng.random()]),
        "recipe.mixup": rng.choice([0.0, rng.random()]),
        "recipe.cutmix": rng.choice([0.0, rng.random()]),
        "recipe.augmentation": "timm" if timm else "batch",
        "recipe.auto_augment": rng.choice([None, "rand-m9-mstd0.5-inc1", "augmix-m5-w4", "3a"]) if timm else None,
        "recipe.color_jitter": rng.random() if timm else 0.0,
        "recipe.random_erasing": rng.random() if timm else 0.0,
        "recipe.crop_padding": 0 if timm else rng.randrange(9),
    }


@pytest.fixture(scope="module")
def tiny() -> dict[str, Any]:
    return plain(compose(TINY))


def _with(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    changed = copy.deepcopy(values)
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        (changed[section] if section else changed)[name] = list(value) if isinstance(value, tuple) else value
    return changed


@pytest.mark.parametrize("seed", range(20))
def test_random_configurations_that_can_work_are_accepted(seed: int, tiny: dict[str, Any]) -> None:
    rng = random.Random(seed)
    alone = {key: valid(rng, kind) for key, kind in leaves() if key not in COUPLED and is_drawable(kind)}
    assert len(alone) > 20
    prepare(parse(_with(tiny, {**alone, **_together(rng)})))
