"""Matching chooses the right tokens, and fusing leaves their means."""

from __future__ import annotations

from typing import Any

import naive
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from ops_helpers import TOLERANCE, Backend, all_backends, assert_close, draw, examples
from torch import Tensor

from famba.errors import ConfigError
from famba.fusion import TokenMap, match, trace
from famba.ops import match_tokens, use_backend

EXAMPLES = settings(max_examples=80, deadline=None)
ORDERS = ("sequence", "tome")
OWN = all_backends("reference", "triton")  # the others match by one of these


def many(backend: Backend) -> settings:
    return settings(examples(backend, share=2), suppress_health_check=[HealthCheck.filter_too_much])


@st.composite
def cases(choose: st.DrawFn) -> dict[str, Any]:
    """A metric and what `match` takes; `guards` is the protected places of each image."""
    batch, length = choose(st.integers(1, 3)), choose(st.integers(1, 15))
    generator = torch.Generator().manual_seed(choose(st.integers(0, 2**31)))
    if choose(st.booleans()):
        metric = torch.randn(batch, length, 4, dtype=torch.float64, generator=generator)
    else:
        # Few directions of exact length: ties everywhere, and none by rounding.
        metric = torch.eye(3, dtype=torch.float64)[torch.randint(3, (batch, length), generator=generator)]
        metric = metric * 2.0 ** torch.randint(-2, 3, (batch, length, 1), generator=generator)
    kind = choose(st.sampled_from(["none", "int", "several", "per image", "several per image"]))
    count = choose(st.integers(1, min(3, length))) if "several" in kind else int(kind != "none")
    guards = [list(choose(st.permutations(range(length))))[:count] for _ in range(batch)]
    protected: Any = None if kind == "none" else torch.tensor([guard[0] for guard in guards])
    if kind in ("int", "several"):
        guards = guards[:1] * batch
        protected = guards[0] if kind == "several" else guards[0][0]
    elif kind == "several per image":
        protected = torch.tensor(guards)
    r, order = choose(st.integers(0, (length - len(guards[0])) // 2)), choose(st.sampled_from(ORDERS))
    return {"metric": metric, "r": r, "protected": protected, "order": order, "guards": guards}


def run(case: dict[str, Any], device: str = "cpu", **more: Any) -> TokenMap:
    protected = case["protected"].to(device) if isinstance(case["protected"], Tensor) else case["protected"]
    return match(case["metric"].to(device), case["r"], protected, case["order"], **more)


def is_clear(metric: Tensor) -> bool:
    """Return whether no two pairs of tokens are nearly equally similar, so that float32 must choose the same pairs."""
    unit = torch.nn.functional.normalize(metric, dim=2)
    gaps = (unit @ unit.transpose(1, 2)).flatten(1).sort(1).values.diff(dim=1)
    return not ((gaps > 1e-12) & (gaps < 2e-6)).any()


@OWN
def test_places_agree_with_a_slow_search(backend: Backend) -> None:
    @many(backend)
    @given(case=cases(), scale=st.integers(-9, 9))
    def check(case: dict[str, Any], scale: int) -> None:
        metric, guards = case["metric"], case["guards"]
        if backend.name == "triton":
            metric = metric.float().double()
            assume(is_clear(metric))
        batch, length, _ = metric.shape
        with backend.running():
            scaled = (metric * 2.0**scale).to(backend.dtypes[0])
            token_map = run({**case, "metric": scaled}, backend.device)
            fused, sizes = token_map.fuse(scaled.to(backend.device)).cpu(), token_map.sizes().cpu()
        assert token_map.places.tolist() == naive.match(metric, case["r"], guards, case["order"])
        assert (token_map.places.dtype, token_map.length) == (torch.int64, length - case["r"])
        assert sizes.shape == (batch, token_map.length)
        assert sizes.ge(1).all()
        assert sizes.sum(1).eq(length).all()
        if case["protected"] is None:
            assert token_map.protected is None
            return
        single = isinstance(case["protected"], int) or getattr(case["protected"], "ndim", 2) == 1
        assert token_map.protected.shape == ((batch,) if single else (batch, len(guards[0])))
        for i, after in enumerate(token_map.protected.reshape(batch, -1).tolist()):
            assert torch.equal(fused[i, after], scaled[i, guards[i]])
            assert sizes[i, after].eq(1).all()

    check()


@OWN
def test_fused_tokens_are_means(backend: Backend) -> None:
    @many(backend)
    @given(case=cases(), weighted=st.booleans())
    def check(case: dict[str, Any], weighted: bool) -> None:
        batch, length, _ = case["metric"].shape
        sizes = torch.randint(1, 9, (batch, length)).float().to(backend.device) if weighted else None
        with backend.running():
            token_map = run({**case, "metric": case["metric"].to(backend.dtypes[0])}, backend.device, sizes=sizes)
            for dtype in backend.dtypes:
                x = draw(batch, length, 5, dtype=dtype)
                wanted, counts = naive.fuse(x.double(), token_map.places.tolist(), token_map.length, sizes)
                assert_close(token_map.fuse(x.to(backend.device), sizes).cpu(), wanted, TOLERANCE[dtype])
                assert torch.equal(token_map.sizes(sizes).double().cpu(), counts)

    check()


@all_backends("triton")
@pytest.mark.parametrize("order", ORDERS)
def test_longer_sequences_agree_with_the_reference(backend: Backend, order: str) -> None:
    device, mixed = backend.device, torch.randn(1, 33, 4)
    mixed[0, 4:20:3], mixed[0, 7], mixed[0, 12], mixed[0, 25] = 0, torch.nan, torch.nan, mixed[0, 26]
    cases = [(mixed, 1, r) for r in (1, 3)] + [(torch.full((1, 70, 2), v), 1, 30) for v in (0.0, 1.0, torch.nan)]
    for length, leading, dtype in ((38, 0, torch.float32), (101, 1, torch.float32), (70, 3, torch.bfloat16)):
        # Four ones among zeros: all similarities are exact, whoever computes them.
        ones = torch.zeros(2, length, 70).scatter(2, torch.rand(2, length, 70).topk(4).indices, 1.0).to(dtype)
        cases += [(ones, leading, r) for r in (1, (length - leading) // 2)]
    for metric, leading, r in cases:
        with use_backend("reference"):
            wanted = match_tokens(metric.to(device), leading, None, None, r, order)
        with backend.running():
            found = match_tokens(metric.to(device), leading, None, None, r, order)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(("r", "protected"), [(2, 0), (1, None), (0, 2), (2, [0, 3])])
@pytest.mark.parametrize("order", ORDERS)
def test_degenerate_tokens_still_give_exact_totals(r: int, protected: Any, order: str) -> None:
    for value in (0.0, 1.0, float("nan"), float("inf")):
        places = match(torch.full((1, 6, 2), value), r, protected, order).places
        assert sorted(set(places[0].tolist())) == list(range(6 - r))
    empty = match(torch.zeros(0, 6, 2), r, None if protected is None else torch.zeros(0, 2).long(), order)
    assert empty.fuse(torch.zeros(0, 6, 5)).shape == (0, 6 - r, 5)


def test_gradients_flow_through_fusing_and_sizes_and_not_through_matching() -> None:
    x = draw(2, 7, 3).requires_grad_()
    sizes = (torch.rand(2, 7, dtype=torch.float64) + 0.5).requires_grad_()
    token_map = match(x, 3, 1)
    assert torch.autograd.gradcheck(lambda t, s: (token_map.fuse(t, s), token_map.sizes(s)), (x, sizes))
    grad = torch.autograd.grad(match(x, 3).fuse(torch.ones(2, 7, 1)).sum() + 0 * x.sum(), x)[0]
    assert grad.eq(0).all()


def test_matching_is_in_float32_under_autocast() -> None:
    # The closest partner of token 0 differs from the second closest by less than bfloat16 resolves.
    metric = torch.tensor([[[1.0, 0.0], [1.0, 2.0**-6], [0.0, 1.0], [1.0, 2.0**-7]]])
    unit, x = torch.nn.functional.normalize(metric, dim=-1).bfloat16()[0], torch.randn(1, 4, 3)
    assert (unit[0] @ unit[1]).eq(unit[0] @ unit[3])
    plain = match(metric, 1)
    with torch.autocast("cpu", torch.bfloat16):
        inside = match(metric, 1)
        assert inside.fuse(x).dtype == torch.float32
        assert torch.equal(plain.fuse(x), inside.fuse(x))
    assert plain.places.tolist() == inside.places.tolist() == [[2, 0, 1, 2]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": -1}, "r is -1: of 5 tokens that may fuse, 0 to 2 can be removed"),
        ({"r": 2, "protected": [0, 1]}, "r is 2: of 3 tokens that may fuse, 0 to 1"),
        *(({"r": r}, f"r is {r}") for r in (True, 1.0)),
        ({"order": "sequense"}, "unknown order 'sequense', did you mean 'sequence'.; allowed: sequence, tome"),
        ({"mode": "merge"}, "unknown mode 'merge'; allowed: fuse, prune"),
        *(({"protected": p}, "are not distinct places of a sequence of 5 tokens") for p in (5, -1, [1, 1])),
        ({"protected": torch.zeros(2)}, r"protected is a torch.float32 tensor of shape \(2,\); expected whole numbers"),
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
    first, left = cls, [13, 13, 8, 5]
    for r in (4, 0, 5, 3):
        token_map = match(x, r, cls, order)
        x, sizes, cls = token_map.fuse(x, sizes), token_map.sizes(sizes), token_map.protected
        maps.append(token_map)
    assert sizes.sum(1).eq(17).all()
    held = trace(maps, torch.arange(17).expand(3, -1))
    assert [h.max().item() + 1 for h in held] == left
    assert trace([None, maps[0]], torch.arange(17).expand(3, -1))[1].equal(held[0])
    for i in range(3):
        assert torch.equal(x[i, cls[i]], patches[i, first[i]])
        for place in range(5):
            members = held[-1][i] == place
            assert sizes[i, place] == members.sum()
            torch.testing.assert_close(x[i, place], patches[i, members].mean(0))


@EXAMPLES
@given(case=cases())
def test_pruning_drops_the_tokens_that_would_have_fused_into_another(case: dict[str, Any]) -> None:
    fused = run(case)
    pruned = match(case["metric"], case["r"], case["protected"], case["order"], mode="prune")
    assert torch.equal(pruned.places, fused.places)
    assert pruned.length == fused.length
    batch, length, _ = case["metric"].shape
    x = torch.arange(1.0, batch * length + 1).reshape(batch, length, 1).requires_grad_()
    left = pruned.fuse(x)[..., 0]
    left.sum().backward()
    kept = torch.ones(batch, length) if pruned.kept is None else pruned.kept  # where nothing is removed
    assert torch.equal(x.grad[..., 0], kept)
    for image in range(batch):
        places, guards = fused.places[image].tolist(), case["guards"][image]
        # The free tokens are dealt in turn; of a pair the one in the second set stays.
        second = [token for token in range(length) if token not in guards][1 - len(guards) % 2 :: 2]
        alone = [token for token in range(length) if places.count(places[token]) == 1]
        wanted = {places[token]: x[image, token, 0].item() for token in {*alone, *second}}
        assert left[image].tolist() == [wanted[place] for place in range(fused.length)]
    assert torch.equal(pruned.sizes(), torch.ones(batch, fused.length))
    assert torch.equal(pruned.sizes(x[..., 0]), left)
