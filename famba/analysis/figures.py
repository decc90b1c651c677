"""How figures are drawn and saved: the same whatever the user's matplotlib is set to; equal figures are equal bytes."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import matplotlib as mpl
from matplotlib.figure import Figure

from famba.files import write_whole

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
    """Inside the block, figures are made in the project's style; saving belongs inside too."""
    with mpl.rc_context():
        mpl.rcdefaults()
        cast(Any, mpl.rcParams).update(_STYLE)  # some releases' stubs know each name, others none
        yield


def rendered(figure: Figure, kind: str, dpi: int = 200) -> bytes:
    """Return a figure as the content of a PNG or SVG file."""
    content = io.BytesIO()
    figure.savefig(content, format=kind, dpi=dpi, metadata=_METADATA[kind])
    return content.getvalue()


def save(figure: Figure, folder: Path, name: str, kinds: Sequence[str] = ("png", "svg"), dpi: int = 200) -> list[Path]:
    """Write a figure as name.png, name.svg or both; return the files. Raises CheckpointError where the disk refuses."""
    files = []
    for kind in kinds:
        file = folder / f"{name}.{kind}"
        write_whole(file, lambda path, kind=kind: Path(path).write_bytes(rendered(figure, kind, dpi)))  # type: ignore[misc]
        files.append(file)
    return files
