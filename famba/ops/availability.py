"""Find out whether the kernels for GPUs and mamba-ssm's and causal-conv1d's extensions can run here.

Triton is not imported for that.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch

from famba.errors import BackendError
from famba.ops.cuda import driver, nvrtc

_OLDEST_OF_TRITON = (7, 0)
_OLDEST_OF_CUDA = (8, 0)  # the first with instructions for bfloat16


def interpreted() -> bool:
    """Return whether Triton's interpreter runs the kernels: TRITON_INTERPRET=1 when Triton was imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_obstacle() -> str | None:
    """Say what hinders Triton kernels here, with the remedy behind a semicolon; return None where nothing does."""
    if importlib.util.find_spec("triton") is None:
        if platform.system() != "Linux":
            return f"Triton does not exist for {platform.system()}; use 'auto', or a Linux machine with an NVIDIA GPU"
        return "the package triton is not installed; pip install triton"
    if interpreted():
        return None
    if torch.version.hip is not None:
        return "torch is built for ROCm, for which these kernels are not made; use 'reference'"
    if not torch.cuda.is_available():
        slowly = "set TRITON_INTERPRET=1 before Python starts to try the kernels on a CPU, thousands of times slower"
        return f"{no_device()}; use 'auto', or {slowly}"
    major, minor = capability = torch.cuda.get_device_capability()
    if capability < _OLDEST_OF_TRITON:
        return f"Triton needs a GPU of compute capability 7.0 or more, this one has {major}.{minor}; use 'reference'"
    return None


def triton_on_request() -> tuple[str, ...]:
    """Return the device types for whoever asks for Triton by name: the interpreter takes CPU tensors too, slowly."""
    return ("cpu", "cuda") if interpreted() else ()


@cache
def cuda_obstacle() -> str | None:
    """Say what hinders the CUDA kernels here, with the remedy behind a semicolon; compiles nothing."""
    if torch.version.hip is not None:
        return "torch is built for ROCm, for which these kernels are not made; use 'reference'"
    if not torch.cuda.is_available():
        return f"{no_device()}; use 'auto', or a Linux machine with an NVIDIA GPU"
    if interpreted() or importlib.util.find_spec("triton") is None:
        reason = "is interpreted (TRITON_INTERPRET=1); unset TRITON_INTERPRET"
        reason = reason if interpreted() else "is not installed; pip install triton"
        return f"norms, matching and fusing are left to Triton, which {reason}"
    major, minor = capability = torch.cuda.get_device_capability()
    if capability < _OLDEST_OF_CUDA:
        return f"these kernels need a GPU of compute capability 8.0 or more, this one has {major}.{minor}; use 'triton'"
    try:
        driver.library()
        nvrtc.architecture(capability)
    except BackendError as error:
        return str(error)
    return None


@dataclass(frozen=True)
class Extension:
    """Name a package with a CUDA extension, and its supported releases, from `oldest` to those before `below`."""

    package: str
    module: str
    oldest: str
    below: str

    def version(self) -> str | None:
        """Return the installed version, None where there is none."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def load(self) -> ModuleType:
        """Import the extension."""
        return importlib.import_module(self.module)

    def hindrance(self) -> str | None:
        """Say why it cannot be imported; return None where it can."""
        version = self.version()
        if version is None:
            return f"{self.package} is not installed"
        if not _numbers(self.oldest) <= _numbers(version) < _numbers(self.below):
            return f"{self.package} {version} is not supported, only {self.oldest} to below {self.below}"
        try:
            self.load()
        except (ImportError, OSError) as error:
            if isinstance(error, ModuleNotFoundError) and error.name == self.module:
                return f"{self.package} {version} is installed without its extension {self.module}"
            named = f"the extension {self.module} of {self.package} {version}"
            built = f"torch {torch.__version__} of CUDA {torch.version.cuda}"
            return f"{named} is built for another torch or CUDA than {built}: {_first_line(error)}"
        return None


CAUSAL_CONV1D = Extension("causal-conv1d", "causal_conv1d_cuda", "1.4", "2")
MAMBA_SSM = Extension("mamba-ssm", "selective_scan_cuda", "2.2", "3")
INSTALL = "pip install --no-build-isolation --no-deps --force-reinstall causal-conv1d==1.6.1 mamba-ssm==2.3.2.post1"
"""Install both packages; docs/gpu.md says what else it takes where no wheel fits."""

# Where the extensions run; the tests put stand-ins in their place that run elsewhere.
DEVICE = "cuda"


@cache
def mamba_ssm_obstacle() -> str | None:
    """Say what hinders the extensions here, with the remedy behind the last semicolon; return None where they run.

    They are imported, and run once for one step of one channel, so that nothing is left for the first training step to
    find out. mamba_ssm itself, which takes seconds to import and is not needed, is not.
    """
    if torch.version.hip is not None:
        return "torch is built for ROCm, for which this backend is not made; use backend 'auto'"
    if not torch.cuda.is_available():
        return f"{no_device()}; use backend 'auto'"
    reasons = [reason for reason in (CAUSAL_CONV1D.hindrance(), MAMBA_SSM.hindrance()) if reason is not None]
    reasons = reasons or _trial()
    return f"{', and '.join(reasons).replace('; ', ', ')}; {INSTALL}" if reasons else None


@cache
def convolution() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return forward and backward of causal-conv1d, which take the same arguments in all its releases.

    Since 1.5.1 the extension writes into memory that it is given, and `cpp_functions` gives it memory.
    """
    if _numbers(CAUSAL_CONV1D.version() or CAUSAL_CONV1D.oldest) < (1, 5, 1):
        extension = CAUSAL_CONV1D.load()
        return extension.causal_conv1d_fwd, extension.causal_conv1d_bwd
    functions = importlib.import_module("causal_conv1d.cpp_functions")
    return functions.causal_conv1d_fwd_function, functions.causal_conv1d_bwd_function


def _trial() -> list[str]:
    """Run both extensions: neither import nor version tells for which GPUs they were compiled."""
    x, weight = torch.zeros(1, 1, 1, device=DEVICE), torch.zeros(1, 4, device=DEVICE)
    for extension, run in (
        (MAMBA_SSM, lambda: MAMBA_SSM.load().fwd(x, x, x[0], x[None], x[None], None, None, None, True)),
        (CAUSAL_CONV1D, lambda: convolution()[0](x, weight, None, None, None, None, True)),
    ):
        try:
            run()
        except (RuntimeError, ImportError, TypeError) as error:
            named = f"the extension {extension.module} of {extension.package} {extension.version()}"
            return [f"{named} does not run here: {_first_line(error)}"]
    return []


def _numbers(version: str) -> tuple[int, ...]:
    """Return the numbers of a version without its local part: (2, 3, 2, 1) of 2.3.2.post1+cu12."""
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0]))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def no_device() -> str:
    """Say that torch sees no GPU, and for what it is built."""
    cuda = torch.version.cuda
    built = "is built without CUDA and" if cuda is None else f"is built for CUDA {cuda}, but"
    return f"torch {torch.__version__} {built} sees no CUDA device"
