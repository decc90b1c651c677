"""How many tokens each layer removes."""

from __future__ import annotations

import re
from typing import Any

import naive
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from famba.errors import ConfigError
from famba.fusion import schedule, tokens_per_layer
from famba.fusion.schedules import check_schedule, strategy_names

EXAMPLES = settings(max_examples=200, deadline=None)
NAMED = ("all", "interleaved", "lower", "upper")


def fusing(strategy: str, depth: int, layers: int | list[int] | None) -> list[int]:
    """The layers that a strategy lets fuse, by its description."""
    if strategy == "custom":
        return sorted(layers)
    share = layers if layers is not None else max(1, int(0.75 * depth + 0.5))
    wanted = {
        "all": lambda i: True,
        "interleaved": lambda i: i % 2 == 1,
        "lower": lambda i: i < share,
        "upper": lambda i: i >= depth - share,
    }[strategy]
    return [i for i in range(depth) if wanted(i)]


def spread(budget: int, count: int, patches: int) -> list[int]:
    """Even shares; what is more than half of a layer's patches moves to the fusing layer before it."""
    shares = [(i + 1) * budget // count - i * budget // count for i in range(count)]
    left, excess, out = patches - budget, 0, []
    for share in reversed(shares):
        taken = min(share + excess, left)
        excess += share - taken
        left += taken
        out.append(taken)
    assert excess == 0
    return out[::-1]


def largest(count: int, patches: int) -> int:
    """What can go where each of `count` layers takes half of its patches, rounded down."""
    left = patches
    for _ in range(count):
        left -= left // 2
    return patches - left


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    depth = draw(st.integers(1, 26))
    strategy = draw(st.sampled_from((*NAMED, "custom")))
    layers: Any = None
    if strategy == "custom":
        layers = draw(st.permutations(range(depth)))[: draw(st.integers(1, depth))]
    elif strategy in ("lower", "upper"):
        layers = draw(st.none() | st.integers(1, depth))
    protected = draw(st.integers(0, 3))
    patches = draw(st.integers(1, 300))
    return {
        "strategy": strategy,
        "depth": depth,
        "layers": layers,
        "protected": protected,
        "tokens": patches + protected,
    }


@EXAMPLES
@given(request=requests(), part=st.floats(0, 1))
def test_a_budget_is_removed_to_the_token(request: dict[str, Any], part: float) -> None:
    layers = fusing(request["strategy"], request["depth"], request["layers"])
    patches = request["tokens"] - request["protected"]
    budget = round(part * largest(len(layers), patches))
    counts = schedule(budget=budget, **request)
    assert isinstance(counts, tuple)
    assert len(counts) == request["depth"]
    assert sum(counts) == budget
    left = patches
    for layer, count in enumerate(counts):
        assert 0 <= count <= left // 2
        assert layer in layers or count == 0
        left -= count
    assert [counts[i] for i in layers] == (spread(budget, len(layers), patches) if layers else [])
    check_schedule(counts, request["depth"], request["tokens"], request["protected"])


@EXAMPLES
@given(request=requests(), more=st.integers(1, 400))
def test_the_largest_budget_named_in_the_error_is_the_largest(request: dict[str, Any], more: int) -> None:
    count = len(fusing(request["strategy"], request["depth"], request["layers"]))
    patches = request["tokens"] - request["protected"]
    with pytest.raises(ConfigError) as caught:
        schedule(budget=largest(count, patches) + more, **request)
    named = int(re.search(r"largest that fits is (\d+)", str(caught.value)).group(1))
    assert sum(schedule(budget=named, **request)) == named
    with pytest.raises(ValueError, match="does not fit"):
        schedule(budget=named + 1, **request)


@EXAMPLES
@given(request=requests(), share=st.floats(0.001, 0.999))
def test_a_share_is_of_the_unprotected_tokens(request: dict[str, Any], share: float) -> None:
    layers = fusing(request["strategy"], request["depth"], request["layers"])
    patches = request["tokens"] - request["protected"]
    assume(abs(share * patches % 1 - 0.5) > 1e-6)
    total = round(share * patches)
    assume(total <= largest(len(layers), patches))
    assert schedule(budget=share, **request) == schedule(budget=total, **request)


def test_shares_of_the_published_setting() -> None:
    """Depth 24, 196 patches and a class token, 168 tokens to remove."""
    assert schedule("none", 24, 197, 168) == (0,) * 24
    assert schedule("all", 24, 197, 168) == (7,) * 24
    assert schedule("interleaved", 24, 197, 168) == (0, 14) * 12
    shares = (9, 9, 10) * 6
    assert schedule("lower", 24, 197, 168) == shares + (0,) * 6
    upper = schedule("upper", 24, 197, 168)
    assert upper[:6] == (0,) * 6
    assert upper[6:] == shares


@pytest.mark.parametrize(
    ("strategy", "share"),
    [("all", 0.556), ("interleaved", 0.574), ("lower", 0.451), ("upper", 0.664), ("decreasing", 0.410)],
)
def test_tokens_left_over_all_layers(strategy: str, share: float) -> None:
    left = tokens_per_layer(schedule(strategy, 24, 197, 168), 197)
    assert sum(left) / (24 * 197) == pytest.approx(share, abs=6e-4)
    assert left[-1] == 197 - 168


@pytest.mark.parametrize(
    ("strategy", "per_layer", "first", "step", "stop"),
    [("all", 7, 0, 1, 24), ("interleaved", 14, 1, 2, 24), ("lower", 9, 0, 1, 18), ("upper", 9, 6, 1, 24)],
)
def test_paper_budget_is_the_released_counts(strategy: str, per_layer: int, first: int, step: int, stop: int) -> None:
    counts = schedule(strategy, 24, 197, "paper")
    assert counts == tuple(per_layer if i in range(first, stop, step) else 0 for i in range(24))
    assert sum(counts) in (168, 162)


def test_paper_budget_of_none_removes_nothing() -> None:
    assert schedule("none", 5, 10, "paper") == (0,) * 5


def test_paper_budget_follows_the_layers_that_are_asked_for() -> None:
    assert schedule("upper", 4, 100, "paper", layers=2) == (0, 0, 9, 9)


def test_paper_budget_is_refused_where_it_is_not_known_or_too_much() -> None:
    with pytest.raises(ConfigError, match="'paper' is known for all, interleaved, lower, upper, not for 'custom'"):
        schedule("custom", 4, 100, "paper", layers=[1])
    with pytest.raises(ConfigError, match="layer 0 removes 7 tokens of the 9 that may fuse there"):
        schedule("all", 4, 10, "paper")


def test_excess_goes_to_earlier_layers() -> None:
    # Of 16 patches 14 go: even shares are 3, 4, 3, 4; the last layers cannot take theirs.
    assert schedule("all", 4, 17, 14) == (3, 5, 4, 2)
    # All but one go only by halving throughout.
    assert schedule("all", 4, 17, 15) == (8, 4, 2, 1)


def test_default_share_of_layers_is_three_quarters() -> None:
    for depth, count in ((1, 1), (2, 2), (3, 2), (4, 3), (12, 9), (24, 18)):
        assert [i for i, r in enumerate(schedule("lower", depth, 1001, 100 * depth // 4)) if r] == list(range(count))
        upper = [i for i, r in enumerate(schedule("upper", depth, 1001, 100 * depth // 4)) if r]
        assert upper == list(range(depth - count, depth))


def test_none_removes_nothing_whatever_the_budget() -> None:
    for budget in (0, 5, 10**9, 0.5):
        assert schedule("none", 3, 10, budget) == (0, 0, 0)


def test_custom_schedules() -> None:
    assert schedule("custom", 5, 101, 10, layers=[3, 1]) == (0, 5, 0, 5, 0)
    assert schedule("custom", 3, 11, [5, 0, 2]) == (5, 0, 2)
    assert schedule("custom", 3, 10, (5, 0, 2), protected=0) == (5, 0, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "uper"}, "unknown fusion strategy 'uper', did you mean 'upper'.*custom"),
        ({"strategy": "Lower"}, "did you mean 'lower'"),
        ({"strategy": "xyz"}, "unknown fusion strategy 'xyz'; allowed: none, all"),
        ({"strategy": "all", "layers": 3}, "'all' takes no layers .given 3."),
        ({"strategy": "interleaved", "layers": [1]}, "'interleaved' takes no layers"),
        ({"strategy": "none", "layers": 1}, "'none' takes no layers"),
        ({"strategy": "lower", "layers": 0}, "layers is 0; allowed: 1 to 8"),
        ({"strategy": "upper", "layers": 9}, "layers is 9; allowed: 1 to 8"),
        ({"strategy": "upper", "layers": -1}, "layers is -1; allowed"),
        ({"strategy": "lower", "layers": True}, "layers is True; strategies 'lower' and 'upper' take how many"),
        ({"strategy": "lower", "layers": [1, 2]}, "a whole number"),
        ({"strategy": "lower", "layers": 2.0}, "a whole number"),
        ({"strategy": "custom"}, "'custom' needs a list of layers"),
        ({"strategy": "custom", "layers": []}, "'custom' needs a list of layers"),
        ({"strategy": "custom", "layers": 3}, "'custom' needs a list of layers"),
        ({"strategy": "custom", "layers": [1, 8]}, "layers holds 8; allowed: 0 to 7"),
        ({"strategy": "custom", "layers": [-1]}, "layers holds -1; allowed: 0 to 7"),
        ({"strategy": "custom", "layers": [True]}, "layers holds True"),
        ({"strategy": "custom", "layers": [1.0]}, "layers holds 1.0"),
        ({"strategy": "custom", "layers": [2, 3, 2]}, "names a layer twice"),
        ({"strategy": "custom", "budget": [1] * 8, "layers": [1]}, "not both"),
        ({"strategy": "custom", "budget": [1] * 7}, "has 7 entries, but the model has 8 layers"),
        ({"strategy": "custom", "budget": [9] + [0] * 7}, "layer 0 removes 9 tokens of the 16 .* half of them, 8"),
        ({"strategy": "custom", "budget": [8, 5] + [0] * 6}, "layer 1 removes 5 tokens of the 8 "),
        ({"strategy": "custom", "budget": [-1] + [0] * 7}, "layer 0 removes -1"),
        ({"strategy": "custom", "budget": [True] + [0] * 7}, "layer 0 removes True"),
        ({"strategy": "custom", "budget": [1.0] + [0] * 7}, "layer 0 removes 1.0"),
        ({"budget": -1}, "budget is -1; allowed: 0 or more"),
        ({"budget": 0.0}, "budget is 0.0; as a share"),
        ({"budget": 1.0}, "budget is 1.0; as a share"),
        ({"budget": -0.5}, "budget is -0.5; as a share"),
        ({"budget": float("nan")}, "budget is nan; as a share"),
        ({"budget": float("inf")}, "budget is inf; as a share"),
        ({"budget": True}, "budget is True; allowed"),
        ({"budget": "papers"}, "budget is 'papers'; allowed"),
        ({"budget": None}, "budget is None; allowed"),
        ({"budget": [2] * 8}, "allowed: tokens in total"),
        ({"budget": 16}, "strategy 'all' fuses in 8 layers, of 16 patches.*largest that fits is 15"),
        ({"strategy": "interleaved", "depth": 1, "budget": 1}, "fuses in 0 layers.*largest that fits is 0"),
        ({"depth": 0}, "depth is 0; allowed: 1 or more"),
        ({"tokens": 1}, "1 tokens of which 1 are protected leave none to fuse"),
        ({"protected": 17}, "17 tokens of which 17 are protected"),
        ({"protected": -1}, "-1 are protected"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict[str, Any], message: str) -> None:
    request = {"strategy": "all", "depth": 8, "tokens": 17, "budget": 4, **arguments}
    with naive.as_users_run_it(), pytest.raises(ConfigError, match=message) as caught:
        schedule(**request)
    assert isinstance(caught.value, ValueError)


@EXAMPLES
@given(depth=st.integers(1, 26), patches=st.integers(1, 800), data=st.data())
def test_decreasing_falls_linearly_to_nothing_and_spends_the_budget(
    depth: int, patches: int, data: st.DataObject
) -> None:
    budget = data.draw(st.integers(0, largest(depth, patches)))
    counts = schedule("decreasing", depth, patches + 1, budget)
    assert sum(counts) == budget
    check_schedule(counts, depth, patches + 1)
    wanted = [budget * 2 * (depth - 1 - i) / (depth * (depth - 1)) for i in range(depth)] if depth > 1 else [budget]
    left = [patches + 1, *tokens_per_layer(counts, patches + 1)]
    # Where no layer comes near half of its tokens, each takes its share of the line, rounded.
    if all(share + 1 < (before - 1) // 2 for share, before in zip(wanted, left, strict=False)):
        assert all(abs(count - share) < 1 for count, share in zip(counts, wanted, strict=True))


def test_every_name_is_taken() -> None:
    assert strategy_names() == ("none", "all", "interleaved", "lower", "upper", "decreasing", "adaptive", "custom")
    for name in strategy_names():
        schedule(name, 4, 17, 2, layers=[1] if name == "custom" else None)


def test_tokens_per_layer() -> None:
    assert tokens_per_layer((0, 3, 0, 2), 10) == (10, 7, 7, 5)
    assert tokens_per_layer((), 10) == ()
