"""Time steps by strategy and by an image's tokens, and fusing in a layer: the benchmarks model, length and fusion."""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from famba.analysis.benchmark.floors import Linear, step
from famba.analysis.benchmark.ops import DTYPES
from famba.analysis.benchmark.report import Report, Row
from famba.analysis.benchmark.steps import DEITS, NOTE, Contestant, measure
from famba.analysis.benchmark.timing import Call, Race, compared
from famba.fusion import match, schedule
from famba.models import Vim, create_network
from famba.models.backbone import Tokens

STRATEGIES = ("none", "all", "interleaved", "lower", "upper")
PRODUCTS, PATCH, BUDGET, _BASE = "matrix products of none", 16, 6 / 7, 197
_PRODUCTS_NOTE = f"'{PRODUCTS}' is what an unfused step multiplies and nothing else, in memory allocated ahead"


def vim(name: str, strategy: str, **arguments: int) -> Vim:
    """Build a Vim with a strategy at the budget of `configs/fusion`."""
    model = cast(Vim, create_network(name, **arguments))
    model.set_fusion(schedule(strategy, model.depth, model.num_tokens, BUDGET, protected=model.protected))
    return model


def measure_models(options: argparse.Namespace, report: Report) -> None:
    """Time steps and inferences of Vims with each strategy, of a DeiT, and the products alone."""
    report.notes += [NOTE, _PRODUCTS_NOTE]
    for name, precision in itertools.product(options.model, options.precision):
        deit, size = DEITS[name], (options.batch, options.image_size, precision)
        asked = [Contestant(s, name, s, *size) for s in dict.fromkeys(("none", *options.fusion))]
        title = f"{name}, {options.batch} images of {options.image_size} x {options.image_size}, {precision}"
        race, inference = Race(title, options.device), Race(f"{title}, inference", options.device)
        with torch.device("meta"):
            _, multiplied = step(vim(name, "none", img_size=options.image_size), options.batch, 1)
        race.enter(PRODUCTS, [products(multiplied, DTYPES[precision], options.device)])
        report.tables[title] = rows = list[Row]()
        try:
            asked.append(Contestant(deit, deit, "none", *size))
            steps = measure(race, asked, options.rounds, rows)
            for key, timed in steps.items():
                timed.model.eval()
                inference.enter(key, [timed.infer])
            inference.run(options.rounds)
        finally:
            rows.append({"contestant": PRODUCTS, **race.entries(PRODUCTS)})
            for row in rows:
                row |= inference.entries(row["contestant"], "inference_")
            for word, base in (("none", "none"), ("products", PRODUCTS), ("DeiT", deit)):
                compared(rows, f"of_{word}", "ms", base)
                compared(rows, f"inference_of_{word}", "inference_ms", base)
            compared(rows, "saved_of_none", "saved_bytes_per_image", "none")


def measure_lengths(options: argparse.Namespace, report: Report) -> None:
    """Time steps of a Vim and its DeiT at several image sizes, each of about as many tokens."""
    report.notes.append(NOTE)
    lengths = {size: (size // PATCH) ** 2 + 1 for size in options.image_size}
    base = _BASE if _BASE in lengths.values() else min(lengths.values())
    for precision, name in itertools.product(options.precision, (options.model, DEITS[options.model])):
        title = f"{name}, {precision}: steps of about {options.tokens} tokens, the base being {base} to an image"
        report.tables[title] = rows = list[Row]()
        # Mixing pairs images.
        batches = {size: max(2, 2 * round(options.tokens / tokens / 2)) for size, tokens in lengths.items()}
        asked = [Contestant(str(lengths[s]), name, "none", batches[s], s, precision) for s in lengths]
        try:
            measure(Race(title, options.device), asked, options.rounds, rows)
        finally:
            for row in rows:
                row["us_per_token"] = 1000 * row["ms"] / (row["batch"] * row["tokens"])
                row["saved_bytes_per_token"] = row["saved_bytes_per_image"] / row["tokens"]
            compared(rows, "time_of_base", "us_per_token", str(base))
            compared(rows, "saved_of_base", "saved_bytes_per_token", str(base))


def measure_fusing(options: argparse.Namespace, report: Report) -> None:
    """Time matching and fusing, forward and backward, against a step of the layer in which they happen."""
    torch.manual_seed(0)
    model = vim(options.model, "none", img_size=options.image_size, depth=1).to(options.device)
    shape = (options.batch, model.num_tokens, model.embed_dim)
    title = f"Matching and fusing r tokens of {shape}, both ways, as a share of a layer's step without them"
    depth, tokens = create_network(options.model).depth, model.num_tokens
    most = {max(schedule(strategy, depth, tokens, BUDGET)) for strategy in STRATEGIES}
    # What the paper's "all" removes in a layer, and the most of each strategy.
    counts = sorted(r for r in {7, *most} if 0 < r <= (tokens - 1) // 2)
    for precision in options.precision:
        hidden = torch.randn(shape).to(options.device, DTYPES[precision]).requires_grad_()
        residual = torch.randn(shape, device=options.device, requires_grad=True)
        race = Race(f"fusion {precision}", options.device)
        race.enter("layer", [functools.partial(_layer_step, model.layers[0], hidden, residual)])
        for r in counts:
            race.enter(f"match {r}", [functools.partial(match, hidden, r, 0)])
            race.enter(f"all of {r}", [functools.partial(_fuse, hidden, residual, r)])
        race.run(options.rounds)
        for r in counts:
            row = {"precision": precision, "r": r, **race.entries(f"match {r}", "match_")}
            row |= race.entries(f"all of {r}", "all_") | race.entries("layer", "layer_")
            report.tables.setdefault(title, []).append(row | {"share": row["all_ms"] / row["layer_ms"]})


def _fuse(hidden: Tensor, residual: Tensor, r: int) -> None:
    token_map = match(hidden, r, 0)
    fused = [token_map.fuse(hidden), token_map.fuse(residual)]
    torch.autograd.grad(fused, [hidden, residual], [x.detach() for x in fused])


def _layer_step(layer: nn.Module, hidden: Tensor, residual: Tensor) -> None:
    with torch.autocast(hidden.device.type, dtype=hidden.dtype, enabled=hidden.dtype != torch.float32):
        outputs = layer(hidden, residual, Tokens((0,), None))[:2]
    torch.autograd.grad(outputs, [hidden, residual, *layer.parameters()], [x.detach() for x in outputs])


def products(of: Iterable[Linear], dtype: torch.dtype, device: torch.device) -> Call:
    """Return what multiplies as linears do, forward and backward, into memory that is allocated ahead."""

    @functools.cache
    def matrix(name: str, rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, device=device).to(dtype)

    calls = []
    for rows, inputs, outputs, needs_dx in of:
        x, w, y = matrix("x", rows, inputs), matrix("w", outputs, inputs), matrix("y", rows, outputs)
        calls += [(x, w.t(), y), (y.t(), x, matrix("dw", outputs, inputs))]
        calls += [(y, w, matrix("dx", rows, inputs))] * needs_dx

    def multiply() -> None:
        for left, right, out in calls:
            torch.mm(left, right, out=out)

    return multiply
