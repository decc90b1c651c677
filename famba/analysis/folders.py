"""Folders that a command writes to, looked at before there is anything to lose."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from famba.errors import ConfigError


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
