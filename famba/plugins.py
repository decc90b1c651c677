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
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from famba.errors import ConfigError

VARIABLE = "FAMBA_PLUGINS"


def load_all() -> None:
    """Import every plugin that is installed, or named by the environment variable."""
    for plugin in entry_points(group="famba.plugins"):
        plugin.load()
    load(name for name in os.environ.get(VARIABLE, "").split(os.pathsep) if name)


def load(names: Iterable[str], folder: Path | None = None) -> None:
    """Import modules by their names, or Python files by their paths, here and in the processes that start from here.

    A path is relative to the current folder, or else to `folder`. Each is imported once. Raises ConfigError for what is
    not there or fails.
    """
    for name in names:
        places = [Path(name).absolute(), *([] if folder is None else [folder.absolute() / name])]
        file = next((place for place in places if place.suffix == ".py" and place.is_file()), None)
        try:
            _import_file(file) if file is not None else importlib.import_module(name)
        except Exception as error:  # whatever the code of others raises
            looked = f"; looked for the file at {', '.join(map(str, places))}" if file is None else ""
            raise ConfigError(
                f"plugin {name!r} cannot be imported ({type(error).__name__}: {error}){looked}; give the path of a .py "
                "file, or the name of a module that Python finds",
                "plugins",
            ) from error
        known = [one for one in os.environ.get(VARIABLE, "").split(os.pathsep) if one]
        os.environ[VARIABLE] = os.pathsep.join(dict.fromkeys([*known, name if file is None else str(file)]))


def _import_file(file: Path) -> None:
    loaded = sys.modules.get(file.stem)
    if loaded is not None and getattr(loaded, "__file__", None) == str(file):
        return
    if loaded is not None:
        raise ImportError(f"a module named {file.stem!r} is imported already; rename the file")
    spec = spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    # By its name, so that classes in it can be pickled, and found by what they register with.
    sys.modules[file.stem] = module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[file.stem]
        raise
