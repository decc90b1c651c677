"""Which tokens fuse, and what fusing leaves."""

from __future__ import annotations

from typing import Any

import naive
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from famba.errors import ConfigError
from famba.fusion import TokenMap, match, not_pruned, trace

EXAMPLES = settings(max_examples=80, deadline=None)
ORDERS = ("sequence", "tome")


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """A metric and what `match` takes; `guards` is the protected places of each image."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 15))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    if draw(st.booleans()):
        metric = torch.randn(batch, length, 4, dtype=torch.float64, generator=generator)
    else:
        # Few directions of exact length: ties everywhere, and none by rounding.
        metric = torch.eye(3, dtype=torch.float64)[torch.randint(3, (batch, length), generator=generator)]
        metric = metric * 2.0 ** torch.randint(-2, 3, (batch, length, 1), generator=generator)
    kind = draw(st.sampled_from(["none", "int", "several", "per image", "several per image"]))
    several = draw(st.integers(1, min(3, length)))
    places = [draw(st.permutations(range(length))) for _ in range(batch)]
    protected: Any = None
    guards: list[list[int]] = [[] for _ in range(batch)]
    if kind == "int":
        protected, guards = places[0][0], [[places[0][0]]] * batch
    elif kind == "several":
        protected, guards = places[0][:several], [places[0][:several]] * batch
    elif kind == "per image":
        guards = [p[:1] for p in places]
        protected = torch.tensor([p[0] for p in places])
    elif kind == "several per image":
        guards = [p[:several] for p in places]
        protected = torch.tensor(guards)
    free = length - len(guards[0])
    return {
        "metric": metric,
        "r": draw(st.integers(0, free // 2)),
        "protected": protected,
        "order": draw(st.sampled_from(ORDERS)),
        "guards": guards,
    }


def run(case: dict[str, Any]) -> TokenMap:
    return match(case["metric"], case["r"], case["protected"], case["order"])


@EXAMPLES
@given(case=cases())
def test_places_agree_with_a_slow_search(case: dict[str, Any]) -> None:
    token_map = run(case)
    assert token_map.places.tolist() == naive.match(case["metric"], case["r"], case["guards"], case["order"])
    assert token_map.places.dtype == torch.int64
    assert token_map.length == case["metric"].shape[1] - case["r"]


@EXAMPLES
@given(case=cases())
def test_every_token_is_in_one_place_and_no_place_is_empty(case: dict[str, Any]) -> None:
    token_map = run(case)
    sizes = token_map.sizes()
    batch, length, _ = case["metric"].shape
    assert sizes.shape == (batch, length - case["r"])
    assert sizes.ge(1).all()
    assert sizes.sum(1).eq(length).all()
    given_sizes = torch.arange(1.0, batch * length + 1).reshape(batch, length)
    assert torch.equal(token_map.sizes(given_sizes).sum(1), given_sizes.sum(1))


@EXAMPLES
@given(case=cases())
def test_protected_tokens_stay_alone_and_are_found_again(case: dict[str, Any]) -> None:
    token_map, metric = run(case), case["metric"]
    if case["protected"] is None:
        assert token_map.protected is None
        return
    single = isinstance(case["protected"], int) or (
        isinstance(case["protected"], Tensor) and case["protected"].ndim == 1
    )
    assert token_map.protected.shape == ((len(metric),) if single else (len(metric), len(case["guards"][0])))
    fused, sizes = token_map.fuse(metric), token_map.sizes()
    for i, guards in enumerate(case["guards"]):
        moved = token_map.protected[i].reshape(-1).tolist()
        for before, after in zip(guards, moved, strict=True):
            assert torch.equal(fused[i, after], metric[i, before])
            assert sizes[i, after] == 1


@EXAMPLES
@given(case=cases())
def test_order_of_what_is_left(case: dict[str, Any]) -> None:
    """In the scan's order no token that stands alone, or is joined, passes another one."""
    places = run({**case, "order": "sequence"}).places
    for image, guards in zip(places.tolist(), case["guards"], strict=True):
        # A token of A that fuses lies in the place of its partner; all others ascend.
        places_seen = [p for i, p in enumerate(image) if image.count(p) == 1 or i == _stands_for(image, i, guards)]
        assert places_seen == sorted(places_seen)
        assert set(image) == set(range(len(image) - case["r"]))


def _stands_for(image: list[int], token: int, guards: list[int]) -> int:
    """The member of B among the tokens in this token's place."""
    free = [i for i in range(len(image)) if i not in guards]
    in_b = free[1 - len(guards) % 2 :: 2]
    return next(i for i in in_b if image[i] == image[token])


def test_class_token_at_the_head_gives_the_places_of_the_paper() -> None:
    # 0 is the class token. Even places make A (2, 4), odd ones B (1, 3, 5); 2 is drawn to 5, 4 to 1.
    x, y, w = [1.0, 0.0], [0.0, 1.0], [-1.0, 0.2]
    metric = torch.tensor([[[0.3, 0.3], y, x, w, y, x]])
    assert match(metric, 2, 0, "sequence").places.tolist() == [[0, 1, 3, 2, 1, 3]]
    assert match(metric, 2, 0, "tome").places.tolist() == [[0, 1, 3, 2, 1, 3]]
    assert match(metric, 1, 0, "sequence").places.tolist() == [[0, 1, 4, 2, 3, 4]]
    # ToMe's order: the class token and the rest of A (4), then B (1, 3, 5).
    assert match(metric, 1, 0, "tome").places.tolist() == [[0, 2, 4, 3, 1, 4]]


def test_without_protection_places_from_the_first_make_a() -> None:
    same, other, third = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]
    metric = torch.tensor([[same, other, third, same]])
    assert match(metric, 1).places.tolist() == [[2, 0, 1, 2]]
    assert match(metric, 1, order="tome").places.tolist() == [[2, 1, 0, 2]]


def test_of_equal_similarities_the_first_wins() -> None:
    metric = torch.ones(2, 8, 3)
    assert match(metric, 2).places.tolist() == [[0, 0, 0, 1, 2, 3, 4, 5]] * 2
    assert match(metric, 2, 0).places.tolist() == [[0, 1, 1, 2, 1, 3, 4, 5]] * 2


@EXAMPLES
@given(case=cases())
def test_fusing_is_deterministic(case: dict[str, Any]) -> None:
    first, second = run(case), run(case)
    assert torch.equal(first.places, second.places)
    x = torch.randn(*case["metric"].shape[:2], 5)
    assert torch.equal(first.fuse(x), second.fuse(x))


@EXAMPLES
@given(case=cases(), exponents=st.integers(0, 2**31))
def test_the_length_of_a_token_does_not_matter(case: dict[str, Any], exponents: int) -> None:
    generator = torch.Generator().manual_seed(exponents)
    scales = 2.0 ** torch.randint(-9, 10, (*case["metric"].shape[:2], 1), generator=generator)
    scaled = run({**case, "metric": case["metric"] * scales})
    assert torch.equal(run(case).places, scaled.places)


@EXAMPLES
@given(case=cases(), weighted=st.booleans())
def test_fused_tokens_are_means(case: dict[str, Any], weighted: bool) -> None:
    token_map = run(case)
    batch, length, _ = case["metric"].shape
    x = torch.randn(batch, length, 5)
    sizes = torch.randint(1, 9, (batch, length)).float() if weighted else None
    expected, expected_sizes = naive.fuse(x.double(), token_map.places.tolist(), token_map.length, sizes)
    torch.testing.assert_close(token_map.fuse(x, sizes).double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(token_map.sizes(sizes).double(), expected_sizes)
    torch.testing.assert_close(token_map.fuse(x.bfloat16(), sizes).double(), expected, rtol=1e-2, atol=1e-2)


def groups_of_three() -> TokenMap:
    return TokenMap(torch.tensor([[0, 1, 0, 2, 0, 1]]), 3)


@pytest.mark.parametrize("weighted", [False, True])
def test_float64_tokens_are_averaged_in_float64(weighted: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 6, 4, dtype=torch.float64)
    sizes = torch.tensor([[1.0, 2.0, 3.0, 1.0, 3.0, 5.0]]) if weighted else None
    expected, _ = naive.fuse(x, groups_of_three().places.tolist(), 3, sizes)
    torch.testing.assert_close(groups_of_three().fuse(x, sizes), expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [None, 1.0, 3.0, 7.0, 0.1])
def test_tokens_that_stand_alone_pass_bit_for_bit(size: float | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 9, 16, dtype=torch.float64).to(dtype)
    token_map = match(x, 3, 0)
    sizes = None if size is None else torch.full((2, 9), size)
    fused, counts = token_map.fuse(x, sizes), token_map.sizes()
    assert fused.dtype == dtype
    alone = [(i, t) for i in range(2) for t in range(9) if counts[i, token_map.places[i, t]] == 1]
    assert len(alone) >= 6
    for i, t in alone:
        assert torch.equal(fused[i, token_map.places[i, t]], x[i, t])


def test_negative_zeros_pass_bit_for_bit() -> None:
    x = torch.tensor([[[-0.0], [1.0], [2.0]]])
    fused = TokenMap(torch.tensor([[0, 1, 1]]), 2).fuse(x)
    assert fused[0, 0].signbit().all()


def test_equal_sizes_weigh_as_none_and_larger_ones_more() -> None:
    x = torch.tensor([[[1.0], [4.0]]])
    both = TokenMap(torch.tensor([[0, 0]]), 1)
    assert both.fuse(x).item() == both.fuse(x, torch.full((1, 2), 5.0)).item() == 2.5
    assert both.fuse(x, torch.tensor([[3.0, 1.0]])).item() == 1.75


def test_identical_tokens_fuse_to_themselves_whoever_is_chosen() -> None:
    torch.manual_seed(0)
    distinct = torch.randn(1, 3, 8)
    # Each token of A (even places) has its like in B.
    x = distinct[:, [0, 1, 2, 0, 1, 2, 0, 1]]
    swapped = x[:, [6, 4, 5, 0, 7, 2, 3, 1]]
    for order in ORDERS:
        a, b = (match(t, 3, order=order).fuse(t) for t in (x, swapped))
        assert torch.equal(a, b)
        for token in a[0]:
            assert (token - distinct[0]).abs().amax(1).min() < 1e-6


def test_gradients_flow_through_fusing_and_not_through_matching() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    sizes = (torch.rand(2, 7, dtype=torch.float64) + 0.5).requires_grad_()
    token_map = match(x, 3, 1)
    assert not token_map.places.is_floating_point()
    assert not token_map.places.requires_grad
    assert torch.autograd.gradcheck(lambda t: token_map.fuse(t), x)
    assert torch.autograd.gradcheck(lambda t, s: token_map.fuse(t, s), (x, sizes))
    assert torch.autograd.gradcheck(lambda s: token_map.sizes(s), sizes)
    grad = torch.autograd.grad(match(x, 3).fuse(torch.ones(2, 7, 1)).sum() + 0 * x.sum(), x)[0]
    assert grad.eq(0).all()


def test_matching_is_in_float32_under_autocast() -> None:
    # The closest partner of token 0 differs from the second closest by less than bfloat16 resolves.
    metric = torch.tensor([[[1.0, 0.0], [1.0, 2.0**-6], [0.0, 1.0], [1.0, 2.0**-7]]])
    unit = torch.nn.functional.normalize(metric, dim=-1).bfloat16()[0]
    assert (unit[0] @ unit[1]).eq(unit[0] @ unit[3])
    plain = match(metric, 1)
    assert plain.places.tolist() == [[2, 0, 1, 2]]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(match(metric, 1).places, plain.places)
        x = torch.randn(1, 4, 3)
        assert torch.equal(plain.fuse(x), match(metric, 1).fuse(x))
        assert plain.fuse(x).dtype == torch.float32


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("protected", [None, 2, [0, 3]])
def test_removing_nothing_changes_nothing(order: str, protected: Any) -> None:
    x = torch.randn(2, 5, 3)
    token_map = match(x, 0, protected, order)
    assert token_map.places.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert torch.equal(token_map.fuse(x), x)
    assert token_map.sizes().eq(1).all()
    if protected is not None:
        assert token_map.protected.tolist() == [protected] * 2


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("protected", [None, 0, "per image", "several"])
def test_a_batch_of_no_images(order: str, protected: Any) -> None:
    places = {"per image": torch.zeros(0, dtype=torch.int64), "several": torch.zeros(0, 2, dtype=torch.int64)}
    token_map = match(torch.zeros(0, 6, 3), 2, places.get(protected, protected), order)
    assert token_map.places.shape == (0, 6)
    assert token_map.fuse(torch.zeros(0, 6, 5)).shape == (0, 4, 5)


def test_zeros_and_nans_still_give_a_map() -> None:
    for value in (0.0, float("nan"), float("inf")):
        places = match(torch.full((1, 7, 2), value), 3).places
        assert sorted(set(places[0].tolist())) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": -1}, "r is -1: of 5 tokens that may fuse, 0 to 2 can be removed"),
        ({"r": 3}, "r is 3: of 5 tokens"),
        ({"r": 2, "protected": [0, 1]}, "r is 2: of 3 tokens that may fuse, 0 to 1"),
        ({"r": True}, "r is True"),
        ({"r": 1.0}, "r is 1.0"),
        ({"order": "sequense"}, "unknown order 'sequense', did you mean 'sequence'.; allowed: sequence, tome"),
        ({"order": "x"}, "unknown order 'x'; allowed"),
        ({"protected": 5}, "are not distinct places of a sequence of 5 tokens"),
        ({"protected": -1}, "are not distinct places"),
        ({"protected": [1, 1]}, "are not distinct places"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict[str, Any], message: str) -> None:
    with naive.as_users_run_it(), pytest.raises(ConfigError, match=message):
        match(torch.randn(1, 5, 2), **{"r": 1, **arguments})


@pytest.mark.parametrize("order", ORDERS)
def test_sizes_over_several_layers_weigh_patches_equally(order: str) -> None:
    torch.manual_seed(0)
    patches = torch.randn(3, 17, 4, dtype=torch.float64)
    x, sizes, maps, cls = patches, torch.ones(3, 17, dtype=torch.float64), [], torch.tensor([0, 5, 16])
    first = cls
    for r in (4, 0, 5, 3):
        token_map = match(x, r, cls, order)
        x, sizes, cls = token_map.fuse(x, sizes), token_map.sizes(sizes), token_map.protected
        maps.append(token_map)
    assert sizes.sum(1).eq(17).all()
    held = trace(maps, torch.arange(17).expand(3, -1))
    assert [h.max().item() + 1 for h in held] == [13, 13, 8, 5]
    for i in range(3):
        assert torch.equal(x[i, cls[i]], patches[i, first[i]])
        for place in range(5):
            members = held[-1][i] == place
            assert sizes[i, place] == members.sum()
            torch.testing.assert_close(x[i, place], patches[i, members].mean(0))


def test_trace_follows_patches_through_layers() -> None:
    first, second = TokenMap(torch.tensor([[0, 1, 1, 2]]), 3), TokenMap(torch.tensor([[1, 0, 1]]), 2)
    held = trace([None, first, None, second], torch.tensor([[1, 2, 3]]))
    assert [h.tolist() for h in held] == [[[1, 2, 3]], [[1, 1, 2]], [[1, 1, 2]], [[0, 0, 1]]]
    assert trace([], torch.tensor([[0]])) == ()


@EXAMPLES
@given(case=cases())
def test_pruning_drops_the_tokens_that_would_have_fused_into_another(case: dict[str, Any]) -> None:
    fused = run(case)
    pruned = match(case["metric"], case["r"], case["protected"], case["order"], mode="prune")
    assert torch.equal(pruned.places, fused.places)
    assert pruned.length == fused.length
    batch, length, _ = case["metric"].shape
    x = torch.arange(1.0, batch * length + 1).reshape(batch, length, 1)
    left = pruned.fuse(x)[..., 0]
    for image in range(batch):
        places, guards = fused.places[image].tolist(), case["guards"][image]
        alone = {token for token in range(length) if places.count(places[token]) == 1}
        stays = alone | {_stands_for(places, token, guards) for token in set(range(length)) - alone}
        wanted = {places[token]: x[image, token, 0].item() for token in stays}
        assert left[image].tolist() == [wanted[place] for place in range(fused.length)]
    assert torch.equal(pruned.sizes(), torch.ones(batch, fused.length))


def test_pruned_tokens_get_no_gradient_and_kept_ones_all_of_it() -> None:
    metric = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 9, 5, requires_grad=True)
    pruned = match(metric, 3, protected=0, mode="prune")
    pruned.fuse(x).sum().backward()
    assert pruned.kept is not None
    assert x.grad is not None
    assert pruned.kept.sum(1).tolist() == [6, 6]
    assert torch.equal(x.grad, pruned.kept.unsqueeze(2).expand_as(x))


def test_sizes_of_what_pruning_leaves_are_the_kept_tokens_own() -> None:
    metric = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [-1.0, 0.0]]])
    pruned = match(metric, 1, mode="prune")
    assert pruned.sizes(torch.tensor([[1.0, 2.0, 4.0, 8.0]])).tolist() == [[2.0, 4.0, 8.0]]


def test_pruning_of_nothing_and_an_unknown_mode() -> None:
    metric = torch.randn(1, 6, 4)
    assert torch.equal(match(metric, 0, mode="prune").fuse(metric), metric)
    with pytest.raises(ConfigError, match="unknown mode 'merge'; allowed: fuse, prune"):
        match(metric, 1, mode="merge")


def test_a_patch_that_was_pruned_does_not_come_back_with_the_token_at_its_place() -> None:
    torch.manual_seed(0)
    metric = torch.randn(2, 13, 4)
    first = match(metric, 5, 0, mode="prune")
    second = match(first.fuse(metric), 3, 0, mode="prune")
    patches = torch.arange(1, 13).expand(2, -1)
    there = not_pruned([first, None, second], patches)
    assert [mask.sum(1).tolist() for mask in there] == [[7, 7], [7, 7], [4, 4]]
    assert not (there[2] & ~there[0]).any()
    # What is left are the very tokens that the patches began as.
    left = second.fuse(first.fuse(metric))
    held = trace([first, None, second], patches)[-1]
    for image in range(2):
        for patch in range(12):
            same = torch.equal(left[image, held[image, patch]], metric[image, patch + 1])
            assert same == bool(there[2][image, patch])
    fused = match(metric, 5, 0)
    assert not_pruned([fused, None], patches)[0].all()
