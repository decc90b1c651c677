"""The folder that a report goes to: its files are written whole, and nothing else there is touched."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from famba.analysis.folders import prepared
from famba.analysis.report import formats
from famba.analysis.report.contents import Report, gather
from famba.files import write_whole

PAGE = "report.html"


def write_report(paths: Iterable[str | Path], out: Path) -> Report:
    """Report on the runs in some folders: report.md, .csv, .tex and .html, and plots/ with each picture as SVG and PNG.

    Raises ConfigError where the folder cannot be written, before any run is read, DataError where no table can be made,
    and CheckpointError where the disk refuses later.
    """
    with prepared(out, out / "plots"):
        report = gather(paths)
        for name, content in _files(report).items():
            write_whole(out / name, lambda file, content=content: Path(file).write_bytes(content))  # type: ignore[misc]
    return report


def summary(report: Report, out: Path) -> str:
    """What there is to say on the terminal of a report that has been written."""
    lines = []
    for part in report.parts:
        lines += [part.table.model, *(f"  {sentence}" for sentence in part.conclusions), ""]
    for group in report.left_out:
        lines += [f"{group.title}:", *(f"  {names}: {'; '.join(reasons)}" for names, reasons in group.listed), ""]
    return "\n".join([*lines, report.headline.replace("listed below", "listed above"), f"{out / PAGE}"])


def _files(report: Report) -> dict[str, bytes]:
    texts = {
        "report.md": formats.markdown(report),
        "report.csv": formats.table_csv(report),
        "report.tex": formats.latex(report),
    }
    files = {name: text.encode() for name, text in texts.items()}
    for part in report.parts:
        for plot in part.plots:
            if plot.svg is not None and plot.png is not None:
                files[f"plots/{plot.name}.svg"] = plot.svg.encode()
                files[f"plots/{plot.name}.png"] = plot.png
    # Last, so that a page is there only with all that belongs to it.
    return files | {PAGE: formats.page(report).encode()}
