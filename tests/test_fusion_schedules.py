"""Schedules remove the right number of tokens in each layer."""

from __future__ import annotations

from typing import Any

import naive
import pytest
from hypothesis import given, settings
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
    wanted = {"all": range(depth), "interleaved": range(1, depth, 2), "lower": range(share)}
    return list(wanted.get(strategy, range(depth - share, depth)))


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
    """Return what can go where each of `count` layers takes half of its patches, rounded down."""
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
    tokens = patches + protected
    return {"strategy": strategy, "depth": depth, "layers": layers, "protected": protected, "tokens": tokens}


@EXAMPLES
@given(request=requests(), part=st.floats(0, 1), nudge=st.floats(-0.49, 0.49))
def test_a_budget_in_tokens_or_as_a_share_is_removed_to_the_token(
    request: dict[str, Any], part: float, nudge: float
) -> None:
    layers = fusing(request["strategy"], request["depth"], request["layers"])
    patches = request["tokens"] - request["protected"]
    most = largest(len(layers), patches)
    budget = round(part * most)
    counts = schedule(budget=budget, **request)
    assert isinstance(counts, tuple)
    assert (len(counts), sum(counts)) == (request["depth"], budget)
    assert {layer for layer, count in enumerate(counts) if count} <= set(layers)
    assert [counts[i] for i in layers] == (spread(budget, len(layers), patches) if layers else [])
    check_schedule(counts, request["depth"], request["tokens"], request["protected"])
    if 0 < budget < patches:
        assert schedule(budget=(budget + nudge) / patches, **request) == counts
    with pytest.raises(ConfigError, match=rf"does not fit.*largest that fits is {most}\b"):
        schedule(budget=most + 1, **request)


UPPER = (0,) * 6 + (9, 9, 10) * 6


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        # Depth 24, 196 patches and a class token, 168 tokens to remove, as published.
        (("none", 24, 197, 168), (0,) * 24),
        (("all", 24, 197, 168), (7,) * 24),
        (("interleaved", 24, 197, 168), (0, 14) * 12),
        (("lower", 24, 197, 168), UPPER[6:] + UPPER[:6]),
        (("upper", 24, 197, 168), UPPER),
        (("lower", 24, 197, "paper"), (9,) * 18 + (0,) * 6),
        (("upper", 24, 197, "paper"), (0,) * 6 + (9,) * 18),
        (("upper", 4, 100, "paper", 2), (0, 0, 9, 9)),
        (("none", 3, 10, 10**9), (0,) * 3),
        (("adaptive", 8, 65, 55), schedule("all", 8, 65, 55)),
        # Of 16 patches 14 go: even shares are 3, 4, 3, 4; the last layers cannot take theirs.
        (("all", 4, 17, 14), (3, 5, 4, 2)),
        # All but one go only by halving throughout.
        (("all", 4, 17, 15), (8, 4, 2, 1)),
        (("lower", 3, 101, 10), (5, 5, 0)),
        (("custom", 5, 101, 10, [3, 1]), (0, 5, 0, 5, 0)),
        (("custom", 3, 11, [5, 0, 2]), (5, 0, 2)),
        (("custom", 3, 10, (5, 0, 2), None, 0), (5, 0, 2)),
    ],
)
def test_schedules_by_hand(arguments: tuple[Any, ...], expected: tuple[int, ...]) -> None:
    assert schedule(*arguments) == expected
    left = tokens_per_layer(expected, 1000)
    assert left == tuple(1000 - sum(expected[: i + 1]) for i in range(len(expected)))
    assert strategy_names() == ("none", "all", "interleaved", "lower", "upper", "decreasing", "adaptive", "custom")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "uper"}, "unknown fusion strategy 'uper', did you mean 'upper'.*custom"),
        ({"layers": 3}, "'all' takes no layers .given 3."),
        *(({"strategy": "upper", "layers": n}, "layers is .*; allowed: 1 to 8") for n in (0, 9, -1, True, [1, 2], 2.0)),
        *(({"strategy": "custom", "layers": n}, "'custom' needs a list of layers") for n in (None, [], 3)),
        *(({"strategy": "custom", "layers": [n]}, "layers holds .*; allowed: 0 to 7") for n in (8, -1, True, 1.0)),
        ({"strategy": "custom", "layers": [2, 3, 2]}, "layers holds 2; allowed: 0 to 7, counted from the input, each "),
        ({"strategy": "custom", "budget": [1] * 8, "layers": [1]}, "not both"),
        ({"strategy": "custom", "budget": [1] * 7}, "has 7 entries, but the model has 8 layers"),
        ({"strategy": "custom", "budget": [9] + [0] * 7}, "layer 0 removes 9 tokens of the 16 .* half of them, 8"),
        ({"strategy": "custom", "budget": [8, 5] + [0] * 6}, "layer 1 removes 5 tokens of the 8 "),
        *(({"strategy": "custom", "budget": [n] + [0] * 7}, "layer 0 removes ") for n in (-1, True, 1.0)),
        ({"strategy": "custom", "budget": "paper", "layers": [1]}, "'paper' is known for all, .*, not for 'custom'"),
        *(({"budget": n}, "budget is .*; allowed: tokens ") for n in (-1, 0.0, 1.0, -0.5, True, "papers", None)),
        *(({"budget": n}, "budget is .*; allowed: tokens ") for n in (float("nan"), float("inf"), [2] * 8)),
        ({"strategy": "interleaved", "depth": 1, "budget": 1}, "fuses in 0 layers.*largest that fits is 0"),
        ({"depth": 0}, "depth is 0; allowed: 1 or more"),
        ({"tokens": 1}, "1 tokens of which 1 are protected leave none to fuse"),
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
