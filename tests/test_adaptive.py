"""fusion=adaptive: the budget goes where tokens are similar, exactly, and stays there until it is measured again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from runs import metrics, run
from torch.nn import functional as F

from famba.errors import ConfigError
from famba.fusion import match, schedule
from famba.fusion.rules import closest_cosines, cosines
from famba.training.compose import compose
from famba.training.setup import prepare

ADAPTIVE = ("fusion=adaptive", "fusion.budget=8", "fusion.adapt_at=[0.2,0.5]", "fusion.adapt_images=16")


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
        assert float(cosines(metric)[image][pair]) == pytest.approx(float(found[image, 0]))


def test_a_model_tells_where_its_images_would_spend_and_takes_the_schedule() -> None:
    counts = schedule("upper", 4, 65, 40)
    shape, models = {"depth": 4, "embed_dim": 32, "num_classes": 10}, []
    for options in ({"fusion": counts}, {}):
        torch.manual_seed(0)
        models.append(timm.create_model("vim_micro_patch4_32", **shape, **options).eval())
    built, later = models
    images = torch.randn(2, 3, 32, 32)
    before, found = later(images), later.adapted_fusion(images, 40)
    assert sum(found.schedule) == 40
    assert found == later.adapted_fusion(images, 40)
    assert torch.equal(later(images), before)
    later.set_fusion(found.schedule)
    assert int(later.trace(images)[-1].max()) < 65 - 40
    later.set_fusion(counts)
    assert torch.equal(later(images), built(images))
    with pytest.raises(ConfigError, match="the schedule has 2 entries, but the model has 4 layers"):
        later.set_fusion((1, 1))
    assert later.fusion == counts


def test_a_run_adapts_when_it_is_told_to_and_says_so(tmp_path: Path) -> None:
    summary = run(tmp_path, *ADAPTIVE)
    assert [entry["step"] for entry in summary["adapted"]] == [1, 3]
    assert summary["schedule"] == summary["adapted"][-1]["schedule"]
    assert all(sum(entry["schedule"]) == 8 for entry in summary["adapted"])
    assert summary["tokens_removed"] == 8
    logged = [line for line in metrics(tmp_path) if line["kind"] == "schedule"]
    assert [line["step"] for line in logged] == [2, 4]
    assert [logged[-1][f"layer_{layer}"] for layer in range(2)] == summary["schedule"]
    assert json.loads((tmp_path / "summary.json").read_text())["macs_per_image"] == summary["macs_per_image"]


def test_other_strategies_do_not_adapt(tmp_path: Path) -> None:
    assert run(tmp_path, "fusion=upper", "fusion.budget=8")["adapted"] is None
    with pytest.raises(ConfigError, match="fusion.adapt_at has a value with fusion=adaptive alone"):
        prepare(compose(["fusion=upper", "fusion.adapt_at=[0.5]"]))
    with pytest.raises(ConfigError, match="fusion.adapt_images .* must have one there"):
        prepare(compose(["fusion=adaptive", "fusion.adapt_images=null"]))
    with pytest.raises(ConfigError, match=r"fusion.adapt_at is \[1.5\]; allowed: 1 to 6 shares"):
        compose(["fusion=adaptive", "fusion.adapt_at=[1.5]"])
