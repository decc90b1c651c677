"""Import the code of others that adds strategies, rules, networks and data sets.

Packages have an entry point in the group "famba.plugins". A single file needs none: `plugins=mine/middle.py` on the
command line of train.py, or the environment variable FAMBA_PLUGINS for every command, with ":" between several.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable
from importlib.metadata import entry_points
from pathlib import Path

from famba.errors import ConfigError

VARIABLE = "FAMBA_PLUGINS"


def load_all() -> None:
    """Import every plugin that is installed, or named by the environment variable."""
    for plugin in entry_points(group="famba.plugins"):
        plugin.load()
    load(filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)))


def load(names: Iterable[str], folder: Path | None = None) -> None:
    """Import modules by their names, or Python files by their paths, here and in the processes that start from here.

    A path is relative to the current folder, or else to `folder`. Raises ConfigError for what is not there or fails.
    """
    for name in names:
        places = [Path(name).absolute(), *([] if folder is None else [folder.absolute() / name])]
        file = next((place for place in places if place.suffix == ".py" and place.is_file()), None)
        try:
            _import_file(file) if file is not None else importlib.import_module(name)
        except Exception as error:  # whatever the code of others raises
            looked = f"; looked for the file at {', '.join(map(str, places))}" if file is None else ""
            told = f"plugin {name!r} cannot be imported ({type(error).__name__}: {error}){looked}"
            told += "; give the path of a .py file, or the name of a module that Python finds"
            raise ConfigError(told, "plugins") from error
        known = filter(None, os.environ.get(VARIABLE, "").split(os.pathsep))
        os.environ[VARIABLE] = os.pathsep.join(dict.fromkeys([*known, str(file or name)]))


def _import_file(file: Path) -> None:
    """Import a file as a module by its name, so that classes in it can be pickled."""
    sys.path.insert(0, str(file.parent))
    importlib.invalidate_caches()  # the file may be new
    try:
        module = importlib.import_module(file.stem)
    finally:
        sys.path.remove(str(file.parent))
    if not os.path.samefile(getattr(module, "__file__", None) or os.devnull, file):
        raise ImportError(f"a module named {file.stem!r} is imported already; rename the file")
