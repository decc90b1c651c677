"""Rules reduce the tokens that their papers say, exactly as many as they are told, in every network that they serve."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import TINY, run
from torch import Tensor, nn

from famba.cli import main
from famba.errors import ConfigError
from famba.fusion import RULES, Fusion, LayerTokens, TokenMap, not_pruned, trace
from famba.fusion.grid import grid_after
from famba.models import Backbone, Vim, apply_tome, create_network
from famba.training.compose import compose
from famba.training.setup import prepare

EXAMPLES = settings(max_examples=60, deadline=None)
NAMES = ("r_meeto", "neighbours", "grid", "delta", "output")


class Found(NamedTuple):
    """Name by hand for each token the one that it joins (itself where it stays), and list those that stay in order."""

    joins: list[int]
    left: list[int]


class Image(NamedTuple):
    """One image's tokens: vectors, and for those that may be reduced their places, in order."""

    vectors: list[list[float]]
    free: list[int]
    special: list[int]
    importance: list[float]
    sizes: list[float]


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    norms = math.sqrt(sum(v * v for v in a)), math.sqrt(sum(v * v for v in b))
    return sum(p / norms[0] * q / norms[1] for p, q in zip(a, b, strict=True))


def in_order(joins: list[int]) -> Found:
    return Found(joins, [i for i, other in enumerate(joins) if other == i])


def r_meeto(image: Image, r: int) -> Found:
    joins, pairs = list(range(len(image.vectors))), []
    evens, odds = image.free[0::2], image.free[1::2]
    for a in evens:
        similarities = [cosine(image.vectors[a], image.vectors[b]) for b in odds]
        pairs.append((-max(similarities), a, odds[similarities.index(max(similarities))]))
    for _, a, b in sorted(pairs)[:r]:
        joins[a] = b
    return in_order(joins)


def neighbours(image: Image, r: int, guard: int) -> Found:
    alone = [t for t in image.free if any(abs(t - s) <= guard for s in image.special)] if guard else []
    pairs = list(pairwise(image.free))
    near = {p for p in pairs if p[1] == p[0] + 1 and not set(p) & set(alone)}
    parted = {p for p in pairs if p[1] != p[0] + 1 and not set(p) & set(alone)}
    likeness = {pair: cosine(*(image.vectors[t] for t in pair)) for pair in pairs}
    best = set()
    for token in image.free:
        own = [p for p in pairs if token in p and p in near]
        best |= {max(own, key=lambda p: likeness[p])} if own else set()  # of equal ones the first
    ranked = [p for some in (best, near - best, parted) for p in sorted(some, key=lambda p: (-likeness[p], p))]
    joins = list(range(len(image.vectors)))
    for before, token in sorted(ranked[:r]):
        joins[token] = joins[before]
    return in_order(joins)


def important(image: Image, r: int, keep_most: bool) -> Found:
    ranked = sorted(image.free, key=lambda token: (image.importance[token], token))
    count = len(ranked)
    targets = ranked[r : count - min(r, count - 2 * r)] if keep_most else ranked[count // 2 :]
    joins = list(range(len(image.vectors)))
    for token in ranked[:r]:
        joins[token] = max(sorted(targets), key=lambda other: cosine(image.vectors[token], image.vectors[other]))
    return in_order(joins)


def shapes(size: tuple[int, int], r: int) -> list[tuple[int, int]]:
    """Grids that are left where r tokens go, and at most every second row and column."""
    rows, columns = size
    every = [(a, b) for a in range(1, rows + 1) for b in range(1, columns + 1) if rows * columns - a * b == r]
    return [(a, b) for a, b in every if 2 * a >= rows and 2 * b >= columns]


def grid(image: Image, r: int, size: tuple[int, int], mode: str) -> Found:
    """Shrink rows, then columns; a cell of the grid is the tokens in it, of which the last stays."""
    rows, columns = size
    high, wide = min(shapes(size, r), key=lambda shape: (abs(shape[0] - shape[1]), shape[1]))
    cells = [[[image.free[i * columns + j]] for j in range(columns)] for i in range(rows)]

    def mean(cell: list[int]) -> list[float]:
        members = cell[-1:] if mode == "prune" else cell
        total = sum(image.sizes[t] for t in members)
        return [sum(image.sizes[t] * image.vectors[t][c] for t in members) / total for c in range(3)]

    def shrink(line: list[list[int]], count: int) -> list[list[int]]:
        pairs = [(-cosine(mean(line[j]), mean(line[j + 1])), j) for j in range(0, len(line) - 1, 2)]
        gone = {j for _, j in sorted(pairs)[:count]}
        return [(line[j - 1] if j - 1 in gone else []) + cell for j, cell in enumerate(line) if j not in gone]

    cells = [shrink(row, columns - wide) for row in cells]
    turned = [shrink([row[j] for row in cells], rows - high) for j in range(wide)]
    patches = [turned[j][i] for i in range(high) for j in range(wide)]
    joins = list(range(len(image.vectors)))
    for cell in patches:
        for token in cell:
            joins[token] = cell[-1]
    left = [cell[-1] for cell in patches]
    for number, token in enumerate(image.special):
        left.insert((token - number) * len(patches) // len(image.free) + number, token)
    return Found(joins, left)


@st.composite
def cases(draw: st.DrawFn, name: str) -> dict[str, Any]:
    """Draw what a layer knows, and r; return them, and the same image by image."""
    size = (draw(st.integers(1, 5)), draw(st.integers(2, 5)))
    patches, batch = size[0] * size[1], draw(st.integers(1, 2))
    count = draw(st.sampled_from([0, 1, 1, 2]))
    length = patches + count
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    metric = torch.randn(batch, length, 3, dtype=torch.float64, generator=generator)
    importance = torch.rand(batch, length, 2, generator=generator)
    if draw(st.booleans()):
        # Few directions of exact length, and few importances: ties everywhere, and none by rounding.
        metric = torch.eye(3, dtype=torch.float64)[torch.randint(3, (batch, length), generator=generator)]
        importance = torch.randint(3, (batch, length, 2), generator=generator).float()
    kind = draw(st.sampled_from(["head", "anywhere", "per image"]))
    guards = [list(draw(st.permutations(range(length))))[:count] for _ in range(batch)]
    if kind != "per image":
        guards = [list(range(count)) if kind == "head" else guards[0]] * batch
    protected: Any = torch.tensor(guards) if kind == "per image" and count else tuple(guards[0])
    weighted, mode = draw(st.booleans()), draw(st.sampled_from(["fuse", "prune"]))
    sizes = torch.randint(1, 5, (batch, length), generator=generator).double() if weighted else None
    guard = draw(st.sampled_from([0, 0, 1, 2])) if name == "neighbours" else 0
    others = patches - 2 * guard * count
    most = min(others // 2, others - count - 1) if guard and count else patches // 2
    guard, most = (guard, most) if most >= 1 else (0, patches // 2)
    possible = [r for r in range(1, most + 1) if name != "grid" or shapes(size, r)]
    r = draw(st.sampled_from(possible)) if possible else 0
    known: dict[str, Any] = {"hidden": metric.clone(), "step_sizes": importance, "outputs": importance}
    # What a rule does not look at is noise.
    if name == "r_meeto":
        metric = torch.randn(metric.shape, dtype=torch.float64, generator=generator)
    known |= {"metric": metric, "features": metric, "protected": protected, "grid": size, "sizes": sizes}
    images = []
    for i, special in enumerate(guards):
        vectors = (known["hidden"] if name == "r_meeto" else metric)[i].tolist()
        free = [t for t in range(length) if t not in special]
        weights = [1.0] * length if sizes is None else sizes[i].tolist()
        images.append(Image(vectors, free, sorted(special), importance[i].sum(1).tolist(), weights))
    return {"known": {**known, "mode": mode, "guard": guard}, "r": r, "images": images}


def by_hand(name: str, tokens: LayerTokens, r: int, images: list[Image]) -> list[Found]:
    ways: dict[str, Callable[[Image], Found]] = {
        "r_meeto": lambda image: r_meeto(image, r),
        "neighbours": lambda image: neighbours(image, r, tokens.guard),
        "grid": lambda image: grid(image, r, tokens.grid, tokens.mode),
        "delta": lambda image: important(image, r, keep_most=True),
        "output": lambda image: important(image, r, keep_most=False),
    }
    return [ways[name](image) for image in images]


@pytest.mark.parametrize("name", NAMES)
@EXAMPLES
@given(data=st.data())
def test_rules_agree_with_their_descriptions(name: str, data: st.DataObject) -> None:
    case = data.draw(cases(name))
    # Not built while drawing: the check of its types draws numbers too.
    tokens, r = LayerTokens(**case["known"]), case["r"]
    if not r:
        return
    found, prunes = RULES[name].choose(tokens, r), tokens.mode == "prune"
    batch, length, _ = tokens.metric.shape
    assert found.length == length - r
    assert found.places.dtype == torch.int64
    expected = by_hand(name, tokens, r, case["images"])
    x = torch.randn(batch, length, 2, dtype=torch.float64, requires_grad=True)
    means = []
    for i, (joins, left) in enumerate(expected):
        assert sorted(left) == sorted(set(joins))
        assert len(left) == length - r, "exactly r are gone"
        assert found.places[i].tolist() == [left.index(token) for token in joins]
        if prunes:
            assert found.kept[i].tolist() == [float(token == other) for token, other in enumerate(joins)]
        for special in case["images"][i].special:
            assert joins.count(special) == 1, "nothing joins a special token"
        if name != "grid":
            assert left == sorted(left), "the order is kept"
        groups = [[token] if prunes else [t for t in range(length) if joins[t] == token] for token in left]
        assert prunes or sorted(t for group in groups for t in group) == list(range(length))
        weights = case["images"][i].sizes
        means.append(
            torch.stack([sum(weights[t] * x[i, t] for t in group) / sum(weights[t] for t in group) for group in groups])
        )
    fused, weight = found.fuse(x, tokens.sizes), torch.randn(batch, length - r, 2, dtype=torch.float64)
    wanted = torch.stack(means)
    torch.testing.assert_close(fused, wanted, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad((y * weight).sum(), x, retain_graph=True)[0] for y in (fused, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
    held = trace([found], torch.arange(length).expand(batch, -1))[0]
    assert torch.equal(held, found.places)
    assert int(not_pruned([found], torch.arange(length).expand(batch, -1))[0].sum()) == batch * (length - r * prunes)
    assert found.sizes(tokens.sizes).shape == (batch, length - r)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_tokens_without_a_direction_still_give_exact_totals(name: str, value: float) -> None:
    x, measures = torch.full((2, 13, 4), value), torch.full((2, 13, 2), value)
    for protected in ((0,), (6,), torch.tensor([[3], [12]])):
        tokens = LayerTokens(x, x, protected, (3, 4), hidden=x, step_sizes=measures, outputs=measures)
        places = RULES[name].choose(tokens, 4).places
        assert [sorted(set(image)) for image in places.tolist()] == [list(range(9))] * 2


@pytest.mark.parametrize("name", NAMES)
def test_autocast_changes_nothing(name: str) -> None:
    torch.manual_seed(0)
    x, measures = torch.randn(4, 65, 8), torch.rand(4, 65, 2)
    tokens = LayerTokens(x, x, (0,), (8, 8), hidden=x, step_sizes=measures, outputs=measures)
    plain = RULES[name].choose(tokens, 8)
    with torch.autocast("cpu", torch.bfloat16):
        inside = RULES[name].choose(tokens, 8)
    assert torch.equal(plain.places, inside.places)


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, int, int, tuple[int, int], int]:
    size, depth = (draw(st.integers(2, 14)), draw(st.integers(2, 14))), draw(st.integers(1, 12))
    strategy = draw(st.sampled_from(["all", "interleaved", "lower", "upper", "decreasing"]))
    left = draw(st.integers(1, size[0])) * draw(st.integers(1, size[1]))
    return strategy, size[0] * size[1] - left, depth, size, draw(st.integers(0, 2))


@EXAMPLES
@given(request=requests())
def test_a_grid_spends_a_budget_to_the_token_or_says_what_it_can(request: Any) -> None:
    strategy, budget, depth, size, special = request
    fusion, patches = Fusion(strategy=strategy, budget=budget, rule="grid"), size[0] * size[1]
    try:
        even = fusion.changed(rule="bipartite").schedule(depth, patches + special, special)
    except ConfigError:
        return
    try:
        counts = fusion.schedule(depth, patches + special, special, size)
    except ConfigError as error:
        nearest = [int(near) for near in str(error).split("can spend is ")[1].split(" or ")]
        spent = [fusion.changed(budget=near).schedule(depth, patches + special, special, size) for near in nearest]
        assert [sum(counts) for counts in spent] == nearest
        return
    assert sum(counts) == sum(even)
    assert not any(count for count, share in zip(counts, even, strict=True) if not share), "other layers do nothing"
    left = size
    for count in counts:
        after = grid_after(left, count)
        assert left[0] * left[1] - after[0] * after[1] == count
        assert all(b <= a <= 2 * b for a, b in zip(left, after, strict=True))
        left = after
    listed = Fusion(strategy="custom", budget=counts, rule="grid")
    assert listed.schedule(depth, patches + special, special, size) == counts


def test_what_a_grid_cannot_spend_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="cannot remove 165 of 14 x 14 patches .* the nearest .* is 164 or 166"):
        Fusion(strategy="all", budget=165, rule="grid").schedule(24, 197, 1, (14, 14))
    with pytest.raises(ConfigError, match=r"cannot remove \[10, 6\] .* the nearest that it can is \[8, 8\]"):
        Fusion(strategy="custom", budget=(10, 6), rule="grid").schedule(2, 64, 0, (8, 8))
    with pytest.raises(ConfigError, match="rule 'grid' needs the rows and columns of 64 patches"):
        Fusion(strategy="all", budget=16, rule="grid").schedule(2, 64, 0)
    with pytest.raises(ConfigError, match="r is 9: a grid of 8 x 8 .* lose is 8 or 15"):
        grid_after((8, 8), 9)


def test_a_guard_leaves_enough_tokens_or_is_refused() -> None:
    guarded = Fusion(strategy="custom", budget=(4, 2), rule="neighbours", guard=1)
    assert guarded.schedule(2, 11) == (4, 2)
    with pytest.raises(ConfigError, match="layer 1 removes 3 tokens where up to 2 of the 6 .* at most 2 of"):
        guarded.changed(budget=(4, 3)).schedule(2, 11)
    with pytest.raises(ConfigError, match="at most 0 of the others can go"):  # they may stand on both sides
        guarded.changed(budget=(1, 0)).schedule(2, 5)
    with pytest.raises(ConfigError, match="guard is -1"):
        Fusion(guard=-1, rule="neighbours").check_rule()


@pytest.mark.parametrize("name", NAMES)
def test_rules_keep_the_scans_order_and_are_not_adapted(name: str) -> None:
    with pytest.raises(ConfigError, match=f"order is 'tome'; rule '{name}' knows sequence alone"):
        Fusion(rule=name, order="tome").check_rule()
    with pytest.raises(ConfigError, match="strategy 'adaptive' measures the pairs that rule 'bipartite' makes"):
        Fusion(strategy="adaptive", rule=name).check_rule()


ALL = ("bipartite", *NAMES)
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
@pytest.mark.parametrize("rule", ALL)
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


@pytest.mark.parametrize("rule", ALL)
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
    torch.testing.assert_close(gradients(listed.train(), x), gradients(checkpointed, x))


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
        (["fusion.rule=delta"], "needs step_sizes of the tokens, .* at before_mixer; .* or fusion.place=after_scan"),
        (["fusion.rule=output"], "needs outputs of the tokens, .* or fusion.place=after_scan"),
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
    PIL.Image.effect_noise((32, 32), 60).convert("RGB").save(tmp_path / "one.png")
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
