"""Train Vision Mamba models with cross-layer token fusion.

Importing famba registers its models with timm once timm is imported, and imports the plugins of `famba.plugins`.
torch and timm, which take seconds, are imported when they are first needed: `famba status` does without.
"""

import importlib
import sys
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from famba import fusion, models, ops

__all__ = ["fusion", "models", "ops"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'famba' has no attribute {name!r}")
    importlib.import_module("famba.models")
    return importlib.import_module(f"famba.{name}")


class _WithTimm(MetaPathFinder):
    """Import the models right after timm, the first time that it is imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Find timm as others do, and let its loader import the models too."""
        if name != "timm":
            return None
        sys.meta_path.remove(self)
        spec: Any = find_spec(name)
        execute = spec.loader.exec_module

        def execute_both(module: Any) -> None:
            execute(module)
            importlib.import_module("famba.models")

        spec.loader.exec_module = execute_both
        return spec


if "timm" in sys.modules:
    importlib.import_module("famba.models")
else:
    sys.meta_path.insert(0, _WithTimm())
