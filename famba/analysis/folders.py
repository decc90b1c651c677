"""Folders that a command reads, and those that it writes to, looked at before there is anything to lose."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from famba.errors import ConfigError, DataError

_TOLD = 8


def check_folder(path: Path) -> None:
    """Raise DataError, with what to do, where a path that runs are looked for in is no folder."""
    if path.is_dir():
        return
    if path.exists():
        raise DataError(
            f"no run in {path}: it is a file; give the folder of a run, or one that holds some: {path.parent}, perhaps"
        )
    there = next((parent for parent in path.absolute().parents if parent.is_dir()), path)
    raise DataError(
        f"no run in {path}: it is not there; {there} holds {_contents(there)}. Give the run_dir of a run or a sweep, "
        "or a folder that holds some"
    )


def prepare_folder(path: str | Path) -> Path:
    """Make a folder, or take the one that is there. Raises ConfigError where nothing could be written to it."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        kind = "is a file" if folder.is_file() else f"cannot be written ({error.strerror})"
        raise ConfigError(f"--out {folder} {kind}; name a folder to write to") from error
    return folder


@contextmanager
def prepared(*folders: Path) -> Iterator[None]:
    """Prepare folders, the innermost last, and take away again those that were made where nothing comes of it."""
    made = [folder for folder in (*reversed(folders), *folders[0].parents) if not folder.exists()]
    try:
        for folder in folders:
            prepare_folder(folder)
        yield
    except BaseException:
        for folder in made:
            with suppress(OSError):  # not empty
                folder.rmdir()
        raise


def _contents(folder: Path) -> str:
    """The folders in a folder, a few of them."""
    try:
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return "what cannot be read"
    more = ", ..." if len(names) > _TOLD else ""
    return f"the folders {', '.join(names[:_TOLD])}{more}" if names else "no folder"
