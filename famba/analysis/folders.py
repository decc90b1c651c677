"""Folders that a command writes to, looked at before there is anything to lose."""

from __future__ import annotations

import os
from pathlib import Path

from famba.errors import ConfigError


def prepare_folder(path: str | Path) -> Path:
    """Make a folder, or take the one that is there. Raises ConfigError where nothing could be written to it."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {folder} cannot be made: {error}; give another folder") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"--out {folder} is not writable; give another folder")
    return folder
