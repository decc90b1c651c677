"""The folder that a report goes to: its files are written whole, and nothing else there is touched."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from famba.analysis.report import formats
from famba.analysis.report.contents import Report, gather
from famba.errors import ConfigError
from famba.files import write_whole

PAGE = "report.html"


def write_report(paths: Iterable[str | Path], out: Path) -> Report:
    """Report on the runs in some folders: report.md, .csv, .tex and .html, and plots/ with each picture as SVG and PNG.

    Raises ConfigError where the folder cannot be written, before any run is read, DataError where no table can be made,
    and CheckpointError where the disk refuses later.
    """
    with _claimed(out):
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


@contextmanager
def _claimed(out: Path) -> Iterator[None]:
    """Make the folder, and see that it can be written; take it away again where nothing came of it."""
    made = [folder for folder in (out / "plots", out, *out.parents) if not folder.exists()]
    try:
        (out / "plots").mkdir(parents=True, exist_ok=True)
        for folder in (out, out / "plots"):
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        _remove(made)
        kind = "is a file" if out.is_file() else f"cannot be written ({error.strerror})"
        raise ConfigError(f"--out {out} {kind}; name a folder for the report") from error
    try:
        yield
    except BaseException:
        _remove(made)
        raise


def _remove(folders: Iterable[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # not empty
            folder.rmdir()
