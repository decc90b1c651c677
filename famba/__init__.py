"""Train Vision Mamba models with cross-layer token fusion.

Importing famba registers its models with timm.
"""

import gc

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
