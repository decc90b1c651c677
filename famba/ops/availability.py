"""Whether Triton can run here; known without importing it, which takes seconds and is not possible everywhere."""

from __future__ import annotations

import importlib.util
import os
import platform

import torch

_OLDEST_CAPABILITY = (7, 0)  # of those that Triton compiles for; bf16 wants (8, 0)


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels: TRITON_INTERPRET=1 when Triton was imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_obstacle() -> str | None:
    """What hinders Triton kernels here, with the remedy behind a semicolon."""
    if importlib.util.find_spec("triton") is None:
        if platform.system() != "Linux":
            return f"Triton does not exist for {platform.system()}; use 'auto', or a Linux machine with an NVIDIA GPU"
        return "the package triton is not installed; pip install triton"
    if interpreted():
        return None
    if torch.version.hip is not None:
        return "torch is built for ROCm, for which these kernels are not made; use 'reference'"
    if not torch.cuda.is_available():
        return (
            f"{_no_device()}; use 'auto', or set TRITON_INTERPRET=1 before Python starts to try the kernels on a CPU, "
            "thousands of times slower"
        )
    if torch.cuda.get_device_capability() < _OLDEST_CAPABILITY:
        major, minor = torch.cuda.get_device_capability()
        return f"Triton needs a GPU of compute capability 7.0 or more, this one has {major}.{minor}; use 'reference'"
    return None


def triton_on_request() -> tuple[str, ...]:
    """Device types for whoever asks for it by name: the interpreter takes CPU tensors too, and is slow on any."""
    return ("cpu", "cuda") if interpreted() else ()


def _no_device() -> str:
    built = "is built without CUDA" if torch.version.cuda is None else f"is built for CUDA {torch.version.cuda}, but"
    return f"torch {torch.__version__} {built} {'and ' if torch.version.cuda is None else ''}sees no CUDA device"
