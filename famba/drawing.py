"""Draw figures in one style, whatever the user's matplotlib is set to, and the curves of a run.

Equal figures are equal bytes.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from matplotlib import style
from matplotlib.figure import Figure

INK, FAINT = "#222222", "#777777"
_STYLE: Any = {  # some releases' stubs know each name, others none
    "axes.axisbelow": True,
    "axes.edgecolor": "#555555",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "famba",
    "text.parse_math": False,
}
# The vertical axis of a plot, and what it shows of metrics.jsonl.
_CURVES = (
    ("loss in training", "loss", "train_loss"),
    ("Top-1, %", "test_top1", "test_ema_top1", "validation_top1", "validation_ema_top1"),
)
_DOTTED = 100  # points
_METADATA = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None, "Format": None, "Type": None}}


def drawing() -> AbstractContextManager[None]:
    """Use the project's style inside the block; `files` belongs inside too."""
    return style.context(_STYLE, after_reset=True)


def files(stem: str, figure: Figure, kinds: Sequence[str] = ("svg", "png")) -> dict[str, bytes]:
    """Return a figure as the content of files by their names."""
    found = {}
    for kind in kinds:
        content = io.BytesIO()
        figure.savefig(content, format=kind, dpi=200, metadata=_METADATA[kind])
        found[f"{stem}.{kind}"] = content.getvalue()
    return found


def curves(lines: Iterable[Mapping[str, Any]]) -> bytes:
    """Draw loss and Top-1 by step, from the lines of a run's metrics.jsonl; return a PNG."""
    known = list(lines)
    with drawing():
        figure = Figure(figsize=(8.0, 3.2), layout="tight")
        for column, (unit, *shown) in enumerate(_CURVES, start=1):
            axes = figure.add_subplot(1, 2, column, xlabel="step", ylabel=unit)
            for name in shown:
                if points := [(line["step"], line[name]) for line in known if name in line]:
                    marker = "." if len(points) < _DOTTED else None
                    axes.plot(*zip(*points, strict=True), marker=marker, label=name.replace("_", " "))
            axes.grid(visible=True)
            axes.legend()
        return files("curves", figure, ["png"])["curves.png"]
