"""Matching tokens by Triton against a slow search, by the interpreter or a GPU; and what a fusing layer launches."""

from __future__ import annotations

from typing import Any

import naive
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from test_fusion_matching import cases
from torch import Tensor

from famba.errors import BackendError
from famba.fusion import TokenMap, match
from famba.ops import availability, match_tokens, use_backend

pytestmark = [
    pytest.mark.skipif(availability.triton_obstacle() is not None, reason=f"triton: {availability.triton_obstacle()}"),
    # numpy says so where the interpreter meets infinity.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXAMPLES = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
ORDERS = ("sequence", "tome")


def on_triton(case: dict[str, Any]) -> TokenMap:
    protected = case["protected"]
    protected = protected.to(DEVICE) if isinstance(protected, Tensor) else protected
    with use_backend("triton"):
        return match(case["metric"].to(DEVICE, torch.float32), case["r"], protected, case["order"], case.get("sizes"))


def both_ways(*arguments: Any) -> list[tuple[Tensor, ...]]:
    """Match by Triton and by the reference."""
    results = []
    for name in ("triton", "reference"):
        with use_backend(name):
            results.append(match_tokens(*arguments))
    return results


def is_clear(metric: Tensor) -> bool:
    """Return whether no two pairs of tokens are nearly equally similar, so that float32 must choose the same pairs."""
    unit = torch.nn.functional.normalize(metric, dim=2)
    gaps = (unit @ unit.transpose(1, 2)).flatten(1).sort(1).values.diff(dim=1)
    return not ((gaps > 1e-12) & (gaps < 2e-6)).any()


@EXAMPLES
@given(case=cases())
def test_places_agree_with_a_slow_search(case: dict[str, Any]) -> None:
    case["metric"] = case["metric"].float().double()
    assume(is_clear(case["metric"]))
    token_map = on_triton(case)
    assert token_map.places.tolist() == naive.match(case["metric"], case["r"], case["guards"], case["order"])
    assert token_map.places.dtype == torch.int64


@EXAMPLES
@given(case=cases())
def test_shares_and_sizes_are_those_of_the_places(case: dict[str, Any]) -> None:
    batch, length, _ = case["metric"].shape
    sizes = torch.arange(1.0, batch * length + 1, device=DEVICE).reshape(batch, length)
    if case["r"] == 0:
        return
    for given_sizes in (None, sizes):
        token_map = on_triton({**case, "sizes": given_sizes})
        known = token_map.shares
        assert known is not None
        weights = torch.ones_like(sizes) if given_sizes is None else sizes
        totals = torch.zeros(batch, token_map.length, device=DEVICE).scatter_add(1, token_map.places, weights)
        assert torch.equal(known.totals, totals)
        assert torch.equal(known.weights, weights / totals.gather(1, token_map.places))


def clear_tokens(length: int, leading: int, dtype: torch.dtype) -> Tensor:
    """Tokens of which rounding decides neither whom one is closest to, nor which of them are closest."""
    for seed in range(100):
        metric = torch.randn(2, length, 70, generator=torch.Generator().manual_seed(seed)).to(dtype)
        free = torch.nn.functional.normalize(metric.double(), dim=2)[:, leading:]
        best = (free[:, leading % 2 :: 2] @ free[:, 1 - leading % 2 :: 2].transpose(1, 2)).topk(2, 2).values
        closest = best[..., 0].sort(1).values
        if min(best[..., 0].sub(best[..., 1]).min(), closest.diff(dim=1).min()) > 1e-6:
            return metric.to(DEVICE)
    raise AssertionError("no seed gave tokens that are apart")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("length", "leading", "dtype"),
    [(38, 0, torch.float32), (101, 1, torch.float32), (70, 3, torch.bfloat16), (70, 1, torch.float16)],
)
def test_longer_sequences_agree_with_the_reference(length: int, leading: int, order: str, dtype: torch.dtype) -> None:
    metric = clear_tokens(length, leading, dtype)
    for r in (1, (length - leading) // 2):
        found, wanted = both_ways(metric, leading, None, None, r, order)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_of_equal_similarities_the_first_wins() -> None:
    for order in ORDERS:
        case = {"metric": torch.ones(2, 70, 3), "r": 30, "protected": None, "order": order}
        places = on_triton(case).places
        assert places[0].tolist() == naive.match(case["metric"][:1], 30, [[]], order)[0]
        assert torch.equal(places[0], places[1])


def test_zeros_and_nans_choose_as_the_reference_does() -> None:
    torch.manual_seed(0)
    metric = torch.randn(1, 33, 4, device=DEVICE)
    metric[0, 4:20:3] = 0
    metric[0, 7] = metric[0, 12] = torch.nan
    metric[0, 25] = metric[0, 26]
    for value in (metric, *(torch.full((1, 7, 2), v, device=DEVICE) for v in (0.0, torch.nan, torch.inf))):
        for r in (1, 3):
            found, wanted = both_ways(value, 1, None, None, r, "sequence")
            assert torch.equal(found[0], wanted[0])


def test_more_tokens_than_it_takes_are_refused_with_a_remedy() -> None:
    with use_backend("triton"), pytest.raises(BackendError, match=r"4097 tokens.* at most 4096; use_backend\('ref"):
        match(torch.zeros(1, 4097, 1, device=DEVICE), 1)


@pytest.mark.parametrize(("position", "weighting"), [("head", "size"), ("middle", "mean"), ("none", "size")])
def test_a_layer_fuses_in_four_launches(monkeypatch: pytest.MonkeyPatch, position: str, weighting: str) -> None:
    from famba.models.vim import Vim
    from famba.ops.triton.launch import Kernel

    names: list[str] = []
    launch = Kernel.launch
    monkeypatch.setattr(
        Kernel, "launch", lambda self, *args, **how: (names.append(self.name), launch(self, *args, **how))
    )
    torch.manual_seed(0)
    options: dict[str, Any] = {"cls_position": position, "fusion_weighting": weighting, "fusion": (4,)}
    model = Vim(img_size=16, patch_size=4, num_classes=3, embed_dim=8, depth=1, **options).to(DEVICE)
    with use_backend("triton"), torch.no_grad():
        model(torch.randn(2, 3, 16, 16, device=DEVICE))
    found = [name for name in names if name.startswith(("closest_partners", "places", "fuse"))]
    assert found == ["closest_partners", "places", "fuse_forward", "fuse_forward"]
