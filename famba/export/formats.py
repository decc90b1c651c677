"""The formats that there are."""

from __future__ import annotations

FORMATS = {"safetensors": None, "torch_export": ".pt2", "onnx": ".onnx"}
"""Each format's name, and how its files' names end; None where it is a folder."""
