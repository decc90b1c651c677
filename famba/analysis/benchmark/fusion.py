"""`famba benchmark fusion`: what fusing costs a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor

from famba.analysis.benchmark.machine import DTYPES, PRECISIONS, SEED
from famba.analysis.benchmark.model import STRATEGIES
from famba.analysis.benchmark.report import Report, Table
from famba.analysis.benchmark.steps import BUDGET
from famba.analysis.benchmark.timing import Race, Times, ratio
from famba.fusion import TokenMap, match, schedule
from famba.models.backbone import Tokens
from famba.models.vim import Vim, VimBlock

_LAYER = "layer"
_PAPER = 7  # what the paper's "all" removes in each layer of 196 patches
_COLUMNS = {
    "precision": "precision",
    "r": "r",
    "match ms": "match_ms",
    "hidden ms": "hidden_forward_ms",
    "and backward": "hidden_ms",
    "residual ms": "residual_forward_ms",
    "and backward ": "residual_ms",
    "all of it ms": "together_ms",
    "unfused layer ms": "layer_ms",
    "share": "share",
}


@dataclass(frozen=True)
class Plan:
    """What to time: one layer of a model on a batch of images of its size in pixels a side, in each precision."""

    model: str
    batch: int
    image_size: int
    precisions: tuple[str, ...]
    rounds: int
    device: torch.device


def benchmark_fusion(plan: Plan, report: Report) -> None:
    """Time matching and fusing against the layer in which they happen, in turn."""
    torch.manual_seed(SEED)
    model = timm.create_model(plan.model, img_size=plan.image_size, depth=1).to(plan.device)
    assert isinstance(model, Vim)
    shape = (plan.batch, model.num_tokens, model.embed_dim)
    title = f"Fusing r tokens of a sequence {shape} against forward and backward of one layer of {plan.model}"
    report.tables["fusion"] = table = Table(title, _COLUMNS)
    report.notes.append(
        "'all of it' is the matching and the fusing of hidden and residual, forward and backward, timed as one; "
        "share is its time divided by that of a layer that does not fuse"
    )
    counts = removed_in_a_layer(plan.model, model.num_tokens)
    for precision in plan.precisions:
        hidden = torch.randn(shape).to(plan.device, DTYPES[precision]).requires_grad_()
        residual = torch.randn(shape, device=plan.device, requires_grad=True)
        contestants: dict[tuple[str, int], Callable[[], object]] = {}
        for r in counts:
            contestants |= {(part, r): run for part, run in _parts(hidden, residual, r).items()}
        layer = model.layers[0]
        assert isinstance(layer, VimBlock)
        contestants[_LAYER, 0] = _layer(layer, hidden, residual, PRECISIONS[precision])
        race = Race(f"fusion {precision}", contestants, plan.device)
        try:
            race.run(plan.rounds)
        finally:
            table.rows += _rows(precision, counts, race.times)


def removed_in_a_layer(model: str, tokens: int) -> list[int]:
    """What a layer removes: 7 as in the paper, and the most of each strategy; ascending, as far as the tokens go."""
    built = timm.create_model(model)
    assert isinstance(built, Vim)
    depth = len(built.layers)
    most = {max(schedule(strategy, depth, tokens, BUDGET)) for strategy in STRATEGIES}
    return sorted(r for r in {_PAPER, *most} if 0 < r <= (tokens - 1) // 2)


def _parts(hidden: Tensor, residual: Tensor, r: int) -> dict[str, Callable[[], object]]:
    """What there is to do in a layer that removes r tokens, with the class token at the head."""
    token_map = match(hidden, r, 0)
    both = [_like_fused(hidden, token_map), _like_fused(residual, token_map)]

    def forward(x: Tensor) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return token_map.fuse(x)

        return run

    def backward(x: Tensor, grad: Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(token_map.fuse(x), x, grad)

    def together() -> object:
        fresh = match(hidden, r, 0)
        return torch.autograd.grad([fresh.fuse(hidden), fresh.fuse(residual)], [hidden, residual], both)

    return {
        "match": lambda: match(hidden, r, 0),
        "hidden_forward": forward(hidden),
        "hidden": backward(hidden, both[0]),
        "residual_forward": forward(residual),
        "residual": backward(residual, both[1]),
        "together": together,
    }


def _like_fused(x: Tensor, token_map: TokenMap) -> Tensor:
    """A gradient of what fusing makes of x."""
    return torch.randn_like(x[:, : token_map.length])


def _layer(layer: VimBlock, hidden: Tensor, residual: Tensor, autocast: torch.dtype | None) -> Callable[[], object]:
    learned = [hidden, residual, *layer.parameters()]
    grads = [torch.randn_like(hidden), torch.randn_like(residual)]

    def run() -> object:
        with torch.autocast(hidden.device.type, dtype=autocast, enabled=autocast is not None):
            outputs = layer(hidden, residual, Tokens((0,), None))[:2]
        return torch.autograd.grad(outputs, learned, grads)

    return run


def _rows(precision: str, counts: list[int], times: dict[tuple[str, int], Times]) -> list[dict[str, Any]]:
    layer = times.get((_LAYER, 0))
    rows = []
    for r in counts:
        row: dict[str, Any] = {"precision": precision, "r": r}
        for (part, count), measured in times.items():
            if count == r:
                row |= measured.entries(f"{part}_ms")
        if layer is not None:
            row |= layer.entries("layer_ms")
            row["share"] = ratio(row["together_ms"], layer.median_ms)
        if len(row) > 2:
            rows.append(row)
    return rows
