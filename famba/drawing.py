"""Draw figures in one style, whatever the user's matplotlib is set to, and the curves of a run.

Equal figures are equal bytes.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import matplotlib as mpl
from matplotlib.figure import Figure

INK, FAINT = "#222222", "#777777"
_STYLE: dict[str, Any] = {
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
_METADATA = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None, "Format": None, "Type": None}}


@contextmanager
def drawing() -> Iterator[None]:
    """Use the project's style inside the block; `files` belongs inside too."""
    with mpl.rc_context():
        mpl.rcdefaults()
        cast(Any, mpl.rcParams).update(_STYLE)  # some releases' stubs know each name, others none
        yield


def files(stem: str, figure: Figure, kinds: Sequence[str] = ("svg", "png")) -> dict[str, bytes]:
    """Return a figure as the content of files by their names."""
    found = {}
    for kind in kinds:
        content = io.BytesIO()
        figure.savefig(content, format=kind, dpi=200, metadata=_METADATA[kind])
        found[f"{stem}.{kind}"] = content.getvalue()
    return found


_TOP1 = {
    "test_top1": ("test images", "#0072B2", "o-"),
    "validation_top1": ("validation images", "#0072B2", "o-"),
    "test_ema_top1": ("test images, averaged weights", "#D55E00", "s--"),
    "validation_ema_top1": ("validation images, averaged weights", "#D55E00", "s--"),
}


def curves(lines: Iterable[Mapping[str, Any]]) -> bytes:
    """Draw loss and Top-1 by step, from the lines of a run's metrics.jsonl; return a PNG."""
    known = list(lines)
    train, epochs = ([line for line in known if line["kind"] == kind] for kind in ("train", "epoch"))
    with drawing():
        figure = Figure(figsize=(8.0, 3.2), layout="tight")
        loss = figure.add_subplot(1, 2, 1, xlabel="step", ylabel="training loss")
        loss.plot([line["step"] for line in train], [line["loss"] for line in train], color="#9dbfd6", label="step")
        means = [(line["step"], line["train_loss"]) for line in epochs]
        loss.plot(*zip(*means, strict=True), "o-", color=INK, markersize=3, label="mean of an epoch")
        top1 = figure.add_subplot(1, 2, 2, xlabel="step", ylabel="Top-1, %")
        for name, (label, color, form) in _TOP1.items():
            if points := [(line["step"], line[name]) for line in epochs if name in line]:
                top1.plot(*zip(*points, strict=True), form, color=color, markersize=4, label=label)
        for axes in (loss, top1):
            axes.grid(visible=True)
            axes.legend()
        return files("curves", figure, ["png"])["curves.png"]
