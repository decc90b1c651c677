"""What `famba plan` shows: tables, files, and a plot of tokens over layers."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tabulate import tabulate

from famba.analysis.figures import drawing, save
from famba.analysis.palette import looks
from famba.analysis.plan import NONE, Planned
from famba.files import write_whole
from famba.fusion.schedules import ADAPTIVE
from famba.models.cost import LayerCost

_MIB = 2**20


def tables(plans: Sequence[Planned]) -> str:
    """Return tokens, multiply-adds and bytes layer by layer, and the totals, as text."""
    totals = [_row(one, _base(one, plans)) for one in plans]
    sides = ["left", *["right"] * (len(totals[0]) - 1)]
    parts = [
        _by_layer(plans, "Tokens after each layer's fusion", lambda layer: layer.leaving),
        _by_layer(plans, "Multiply-adds per image, millions", lambda layer: layer.macs / 1e6),
        _by_layer(plans, "Kept for the backward per image, kB", lambda layer: layer.saved_bytes / 1e3),
        "In total",
        tabulate(totals, headers="keys", disable_numparse=True, colalign=sides),
        "",
        *_notes(plans),
    ]
    return "\n".join(parts)


def write(plans: Sequence[Planned], folder: Path) -> None:
    """Write plan.csv, plan.json, tokens.svg and tokens.png."""
    rows = [_values(one, _base(one, plans)) for one in plans]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(folder / "plan.csv", lambda file: Path(file).write_text(text.getvalue()))
    layers = [[asdict(layer) for layer in one.cost.layers] for one in plans]
    content = json.dumps([row | {"layers": of} for row, of in zip(rows, layers, strict=True)], indent=2) + "\n"
    write_whole(folder / "plan.json", lambda file: Path(file).write_text(content))
    with drawing():
        save(tokens_plot({one.name: (one.config.fusion.strategy, _tokens(one)) for one in plans}), folder, "tokens")


def tokens_plot(sequences: Mapping[str, tuple[str, Sequence[int]]]) -> Figure:
    """Draw tokens over layers: for each name its strategy, and the tokens before the first layer and after each.

    Curves that are equal are drawn as one, under all of their names.
    """
    figure = Figure(figsize=(8.0, 4.0), layout="constrained")
    axes = figure.add_subplot()
    equal: dict[tuple[int, ...], list[str]] = {}
    for name, (_, tokens) in sequences.items():
        equal.setdefault(tuple(tokens), []).append(name)
    styles = looks([sequences[names[0]][0] for names in equal.values()])
    for (tokens, names), style in zip(equal.items(), styles, strict=True):
        axes.plot(
            range(len(tokens)),
            tokens,
            linestyle=style.line,
            color=style.color,
            marker=style.marker,
            markersize=4.5,
            markerfacecolor=style.face,
            label=" = ".join(names),
        )
    axes.set_xlabel("layers done")
    axes.set_ylabel("tokens")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(visible=True)
    figure.legend(loc="outside right upper", handlelength=3.5)
    return figure


def _base(one: Planned, plans: Sequence[Planned]) -> Planned:
    """The same without fusion."""
    return next(
        other
        for other in plans
        if other.config.fusion.strategy == NONE and replace(other.config, fusion=one.config.fusion) == one.config
    )


def _tokens(one: Planned) -> list[int]:
    """Tokens before the first layer and after each."""
    return [one.setup.tokens, *(layer.leaving for layer in one.cost.layers)]


def _by_layer(plans: Sequence[Planned], title: str, value: Callable[[LayerCost], float]) -> str:
    depth = max(len(one.cost.layers) for one in plans)
    columns = [[value(layer) for layer in one.cost.layers] for one in plans]
    rows = [[index, *(column[index] if index < len(column) else None for column in columns)] for index in range(depth)]
    whole = all(isinstance(cell, int) for column in columns for cell in column)
    table = tabulate(rows, headers=["layer", *(one.name for one in plans)], floatfmt=".0f" if whole else ".2f")
    return f"{title}\n{table}\n"


def _values(one: Planned, base: Planned) -> dict[str, Any]:
    """One configuration in numbers, with units in their names."""
    measured = one.step_ms is not None and base.step_ms is not None
    return {
        "model": one.config.model.name,
        "name": one.name,
        "strategy": one.config.fusion.strategy,
        "tokens": one.setup.tokens,
        "tokens_removed": sum(one.setup.schedule),
        "tokens_left": one.setup.tokens - sum(one.setup.schedule),
        "token_layers_of_none": one.cost.token_layers / base.cost.token_layers,
        "parameters": one.parameters,
        "macs_per_image": one.cost.macs,
        "step_time_of_none_predicted": one.cost.macs / base.cost.macs,
        "step_ms_measured": one.step_ms,
        "step_time_of_none_measured": one.step_ms / base.step_ms if measured else None,  # type: ignore[operator]
        "saved_bytes_per_image": one.cost.saved_bytes,
        "saved_bytes_of_none": one.cost.saved_bytes / base.cost.saved_bytes,
        "memory_bytes_predicted": one.memory,
        "memory_of_none_predicted": one.memory / base.memory,
        "schedule": " ".join(map(str, one.setup.schedule)),
    }


def _row(one: Planned, base: Planned) -> dict[str, str]:
    values = _values(one, base)
    row = {
        "fusion": one.name,
        "removed": str(values["tokens_removed"]),
        "left": f"{values['tokens_left']} of {one.setup.tokens}",
        "token-layers": f"{values['token_layers_of_none']:.3f}",
        "G multiply-adds": f"{one.cost.macs / 1e9:.3f}",
        "step time, of none": f"{values['step_time_of_none_predicted']:.3f}",
        "kept, MB": f"{one.cost.saved_bytes / 1e6:.2f}",
        "kept, of none": f"{values['saved_bytes_of_none']:.3f}",
        "memory, MiB": f"{one.memory / _MIB:,.0f}",
        "memory, of none": f"{values['memory_of_none_predicted']:.3f}",
    }
    if one.step_ms is not None:
        row["step, ms, measured"] = f"{one.step_ms:.1f}"
        row["step time, of none, measured"] = f"{values['step_time_of_none_measured']:.3f}"
    return row


def _notes(plans: Sequence[Planned]) -> list[str]:
    computed = " and ".join(dict.fromkeys(f"{str(one.setup.dtype)[6:]} by {one.where.backend}" for one in plans))
    batches = " and ".join(dict.fromkeys(str(one.batch) for one in plans))
    notes = [
        "Layers are counted from 0 at the input, as fusion.layers takes them.",
        "Multiply-adds are those of one image's forward pass, what papers on vision backbones call FLOPs: matrix "
        "products, convolutions, scans and the similarities between tokens. A step does three times as many.",
        "Step time, of none, is predicted from them: nearly all of a Vim's work is linear in tokens.",
        f"Kept is what autograd holds of one image for the backward, computed in {computed}; memory adds weights, cast "
        f"weights, gradients and AdamW's moments, for {batches} images.",
    ]
    obstacles = dict.fromkeys(one.where.obstacle for one in plans if one.where.obstacle)
    notes += [f"Planned for another machine; here it could not run: {reason}." for reason in obstacles]
    if any(one.config.fusion.strategy == ADAPTIVE for one in plans):
        notes.append("What adaptive removes where is measured in training; until then it is spread as that of all.")
    if not all(one.setup.matched for one in plans):
        notes.append("Counts per layer are as given: their totals are not matched between strategies.")
    return notes
