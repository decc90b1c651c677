"""Train Vision Mamba models with cross-layer token fusion.

Importing famba registers its models with timm, and imports the packages that have an entry point in the group
"famba.plugins": these add rules (`famba.fusion.register_rule`) and networks (`famba.models.register_backbone`).
"""

import gc
from importlib.metadata import entry_points

# torch and timm make some 400,000 objects that live to the end; looking for garbage among them again and again
# would take a fifth of the time that the import takes.
_collects = gc.isenabled()
gc.disable()
try:
    from famba import fusion, models, ops
finally:
    if _collects:
        gc.enable()

__all__ = ["fusion", "models", "ops"]
__version__ = "0.1.0"

for _plugin in entry_points(group="famba.plugins"):
    _plugin.load()
