"""`famba benchmark model`, `length` and `fusion`: steps by strategy, by an image's tokens, and fusing in a layer."""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Iterable
from typing import Any

import timm
import torch
from torch import Tensor, nn

from famba.analysis.benchmark.floors import Linear, linears
from famba.analysis.benchmark.ops import DTYPES
from famba.analysis.benchmark.report import Report, Table
from famba.analysis.benchmark.steps import Contestant, TimedStep, compared, measure
from famba.analysis.benchmark.timing import COLUMNS, Call, Race, ratio
from famba.fusion import match, schedule
from famba.models.vim import Tokens, Vim

# Each Vim's counterpart, by their timm names.
DEITS = {
    "vim_tiny_patch16_224": "deit_tiny_patch16_224",
    "vim_small_patch16_224": "deit_small_patch16_224",
}
STRATEGIES = ("none", "all", "interleaved", "lower", "upper")
PRODUCTS, PATCH, BUDGET, _BASE = "matrix products of none", 16, 6 / 7, 197
NOTE = "a step is that of `train.py recipe=light` on random images that lie on the device"
_PRODUCTS_NOTE = f"'{PRODUCTS}' is what an unfused step multiplies and nothing else, in memory allocated ahead"
_MODEL = ("model", "precision", "contestant", "token_layers", *COLUMNS, "of_none", "of_products", "of_DeiT")
_MEASURED = ("images_per_s", "floor_ms", "floor_share", "inference_ms", "inference_of_none", "inference_of_DeiT")
_LENGTH = ("contestant", "precision", "tokens", "batch", *COLUMNS, "us_per_token", "of_base")


def measure_models(options: argparse.Namespace, report: Report) -> None:
    """Time steps and inferences of Vims with each strategy, of a DeiT, and the products alone."""
    title = f"Training step and inference of {options.batch} images, {options.image_size} x {options.image_size}"
    report.tables["times"] = table = Table(title, (*_MODEL, *_MEASURED, "saved_bytes_per_image", "saved_of_none"))
    report.notes += [NOTE, _PRODUCTS_NOTE]
    for name, precision in itertools.product(options.model, options.precision):
        deit, size = DEITS[name], (options.batch, options.image_size, precision)
        asked = [Contestant(s, name, s, *size) for s in dict.fromkeys(("none", *options.fusion))]
        race, inference = (Race(f"{name} {precision}, {what}", options.device) for what in ("step", "inference"))
        with torch.device("meta"):
            unfused = linears(timm.create_model(name, img_size=options.image_size), options.batch)
        race.enter(PRODUCTS, [products(unfused, DTYPES[precision], options.device)])
        rows: list[dict[str, Any]] = []
        steps: list[tuple[str, TimedStep]] = []
        try:
            asked.append(Contestant(deit, deit, "none", *size))
            measure(race, asked, options.rounds, rows, lambda one, step, row, to=steps: to.append((one.name, step)))
            for key, step in steps:
                step.model.eval()
                inference.enter(key, [step.infer])
            inference.run(options.rounds)
        finally:
            rows += [{"contestant": PRODUCTS, "precision": precision, **race.entries(PRODUCTS)}]
            for row in rows:
                row |= {"model": name, **inference.entries(row["contestant"], "inference_")}
            for word, base in (("none", "none"), ("products", PRODUCTS), ("DeiT", deit)):
                compared(rows, f"of_{word}", "ms", base)
                compared(rows, f"inference_of_{word}", "inference_ms", base)
            compared(rows, "saved_of_none", "saved_bytes_per_image", "none")
            table.rows += rows


def measure_lengths(options: argparse.Namespace, report: Report) -> None:
    """Time steps of a Vim and its DeiT at several image sizes, each of about as many tokens."""
    lengths = {size: (size // PATCH) ** 2 + 1 for size in options.image_size}
    base = _BASE if _BASE in lengths.values() else min(lengths.values())
    title = f"Steps of about {options.tokens} tokens; the base is an image of {base}, 1.00 is linear growth"
    report.tables["length"] = table = Table(title, (*_LENGTH, "saved_bytes_per_token", "saved_of_base"))
    report.notes.append(NOTE)
    for precision, name in itertools.product(options.precision, (options.model, DEITS[options.model])):
        # Mixing pairs images.
        batches = {size: max(2, 2 * round(options.tokens / tokens / 2)) for size, tokens in lengths.items()}
        asked = [Contestant(f"{name} at {lengths[s]}", name, "none", batches[s], s, precision) for s in lengths]
        rows: list[dict[str, Any]] = []
        try:
            measure(Race(f"length {precision}", options.device), asked, options.rounds, rows)
        finally:
            for row in rows:
                row["us_per_token"] = 1000 * row["ms"] / (row["batch"] * row["tokens"])
                row["saved_bytes_per_token"] = row["saved_bytes_per_image"] / row["tokens"]
            compared(rows, "of_base", "us_per_token", f"{name} at {base}")
            compared(rows, "saved_of_base", "saved_bytes_per_token", f"{name} at {base}")
            table.rows += rows


def measure_fusing(options: argparse.Namespace, report: Report) -> None:
    """Time matching and fusing, forward and backward, against a step of the layer in which they happen."""
    torch.manual_seed(0)
    model = timm.create_model(options.model, img_size=options.image_size, depth=1).to(options.device)
    assert isinstance(model, Vim)
    shape = (options.batch, model.num_tokens, model.embed_dim)
    title = f"Matching and fusing r tokens of {shape}, both ways, as a share of a layer's step without them"
    report.tables["fusion"] = table = Table(title, ("precision", "r", "match_ms", "all_ms", "layer_ms", "share"))
    counts = removed_in_a_layer(options.model, model.num_tokens)
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
            table.rows.append(row | {"share": ratio(row["all_ms"], row["layer_ms"])})


def removed_in_a_layer(model: str, tokens: int) -> list[int]:
    """Return what a layer removes: 7 as in the paper's "all", and the most of each strategy; as far as tokens go."""
    depth = timm.create_model(model).depth
    most = {max(schedule(strategy, depth, tokens, BUDGET)) for strategy in STRATEGIES}
    return sorted(r for r in {7, *most} if 0 < r <= (tokens - 1) // 2)


def _fuse(hidden: Tensor, residual: Tensor, r: int) -> None:
    token_map = match(hidden, r, 0)
    fused = [token_map.fuse(hidden), token_map.fuse(residual)]
    torch.autograd.grad(fused, [hidden, residual], [x.detach() for x in fused])


def _layer_step(layer: nn.Module, hidden: Tensor, residual: Tensor) -> None:
    with torch.autocast(hidden.device.type, dtype=hidden.dtype, enabled=hidden.dtype != torch.float32):
        outputs = layer(hidden, residual, Tokens(0, None))[:2]
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
