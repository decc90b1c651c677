"""fusion=adaptive: the budget goes where tokens are similar, exactly, and stays there until it is measured again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import metrics, run
from torch.nn import functional as F

import famba
from famba.errors import ConfigError
from famba.fusion import match, schedule
from famba.fusion.rules import closest_cosines, cosines
from famba.fusion.schedules import check_schedule, similar_pairs, spend
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


def test_the_most_similar_pair_is_the_one_that_match_fuses() -> None:
    torch.manual_seed(1)
    metric = torch.randn(3, 17, 5)
    places = match(metric, 1, 0).places
    between = cosines(metric)
    for image in range(3):
        (pair,) = [(i, j) for i in range(17) for j in range(i + 1, 17) if places[image, i] == places[image, j]]
        assert float(between[image][pair]) == pytest.approx(float(closest_cosines(metric, 0)[image, 0]))


def test_pairs_are_counted_on_average_and_at_most_half() -> None:
    alike = torch.ones(1, 9, 9)
    unlike = torch.eye(9).unsqueeze(0)
    assert similar_pairs(alike, 0, 0.99) == 4
    assert similar_pairs(unlike, 0, 0.99) == 0
    assert similar_pairs(torch.cat([alike, unlike]), 0, 0.99) == 2
    assert similar_pairs(alike[:, :8], None, -1.0) == 4


@given(
    st.lists(st.lists(st.floats(-1, 1), min_size=1, max_size=40), min_size=1, max_size=8), st.integers(4, 80), st.data()
)
@settings(deadline=None)
def test_a_budget_is_spent_to_the_token(layers: list[list[float]], free: int, data: st.DataObject) -> None:
    """Layers that hold pairs of given similarities, at most half of what is left fusing in each."""

    def counts_at(threshold: float) -> list[int]:
        left, counts = free, []
        for pairs in layers:
            reached = left // 2 if threshold == -1 else min(sum(pair >= threshold for pair in pairs), left // 2)
            counts.append(reached)
            left -= reached
        return counts

    budget = data.draw(st.integers(0, sum(counts_at(-1.0))))
    found, threshold = spend(counts_at, free, budget)
    assert sum(found) == budget
    check_schedule(found, len(layers), free + 1)
    assert -1 <= threshold <= 1


def test_the_budget_goes_to_the_layer_whose_tokens_are_alike() -> None:
    pairs = {0: [0.1] * 10, 1: [0.9] * 10, 2: [0.5] * 10}
    found, threshold = spend(lambda t: [sum(p >= t for p in pairs[layer]) for layer in range(3)], 40, 10)
    assert found == (0, 10, 0)
    assert 0.5 < threshold <= 0.9
    # More than one layer gives: half of the budget comes from the next most similar, in proportion.
    found, _ = spend(lambda t: [sum(p >= t for p in pairs[layer]) for layer in range(3)], 40, 15)
    assert found == (0, 10, 5)


def test_a_model_tells_where_its_images_would_spend() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vim_micro_patch4_32", num_classes=10, depth=4, embed_dim=32).eval()
    images = torch.randn(4, 3, 32, 32)
    before = model(images)
    found = model.adapted_fusion(images, 40)
    assert sum(found.schedule) == 40
    assert found == model.adapted_fusion(images, 40)
    torch.testing.assert_close(model(images), before, rtol=0, atol=0)
    model.set_fusion(found.schedule)
    assert len(model.trace(images)) == 4
    assert int(model.trace(images)[-1].max()) < 65 - 40


def test_a_schedule_that_is_set_is_the_schedule_that_is_built() -> None:
    counts = schedule("upper", 4, 65, 40)
    torch.manual_seed(0)
    built = timm.create_model("vim_micro_patch4_32", depth=4, embed_dim=32, num_classes=10, fusion=counts).eval()
    torch.manual_seed(0)
    later = timm.create_model("vim_micro_patch4_32", depth=4, embed_dim=32, num_classes=10).eval()
    later.set_fusion(counts)
    images = torch.randn(2, 3, 32, 32)
    assert later.fusion == counts
    torch.testing.assert_close(later(images), built(images), rtol=0, atol=0)
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
    with pytest.raises(ConfigError, match=r"fusion.adapt_at is \[0.5\] with strategy 'upper'; allowed: null"):
        prepare(compose(["fusion=upper", "fusion.adapt_at=[0.5]"]))
    with pytest.raises(ConfigError, match="fusion.adapt_images is None with strategy 'adaptive'; allowed: a value"):
        prepare(compose(["fusion=adaptive", "fusion.adapt_images=null"]))
    with pytest.raises(ConfigError, match=r"fusion.adapt_at is \[1.5\]; allowed: 1 to 6 shares"):
        compose(["fusion=adaptive", "fusion.adapt_at=[1.5]"])


def test_a_model_that_adapts_begins_as_all() -> None:
    assert schedule("adaptive", 8, 65, 55) == schedule("all", 8, 65, 55)
    assert famba.fusion.schedule("adaptive", 4, 17, 0) == (0, 0, 0, 0)


def test_a_run_that_ends_before_it_adapts_says_so(tmp_path: Path) -> None:
    summary = run(tmp_path, *ADAPTIVE, "trainer.max_steps=2")
    assert [entry["step"] for entry in summary["adapted"]] == [1]
    assert (
        "measures after steps [1, 3] of the 6 in all epochs; trainer.max_steps=2 ends before"
        in (tmp_path / "train.log").read_text()
    )
