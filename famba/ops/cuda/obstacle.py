"""Find out whether the CUDA kernels can be used here, without compiling anything."""

from __future__ import annotations

import importlib.util

import torch

from famba.errors import BackendError
from famba.ops import availability
from famba.ops.cuda import driver, nvrtc

# The first with instructions for bfloat16.
_OLDEST_CAPABILITY = (8, 0)


def obstacle() -> str | None:
    """Return None where the kernels can be used, else the reason and behind a semicolon the remedy."""
    if torch.version.hip is not None:
        return "torch is built for ROCm, for which these kernels are not made; use 'reference'"
    if not torch.cuda.is_available():
        return f"{availability.no_device()}; use 'auto', or a Linux machine with an NVIDIA GPU"
    if importlib.util.find_spec("triton") is None or availability.interpreted():
        reason = "is interpreted (TRITON_INTERPRET=1)" if availability.interpreted() else "is not installed"
        remedy = "unset TRITON_INTERPRET" if availability.interpreted() else "pip install triton"
        return f"norms, matching and fusing are left to Triton, which {reason}; {remedy}"
    capability = torch.cuda.get_device_capability()
    if capability < _OLDEST_CAPABILITY:
        major, minor = capability
        return f"these kernels need a GPU of compute capability 8.0 or more, this one has {major}.{minor}; use 'triton'"
    try:
        driver.library()
        nvrtc.architecture(capability)
    except BackendError as error:
        return str(error)
    return None
