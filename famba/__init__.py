"""Train Vision Mamba models with cross-layer token fusion.

Importing famba registers its models with timm.
"""

from famba import fusion, models, ops

__all__ = ["fusion", "models", "ops"]
__version__ = "0.1.0"
