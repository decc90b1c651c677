"""The packages' CUDA extensions: what hinders them here, and their functions."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch

from famba.ops.mamba_ssm.packages import CAUSAL_CONV1D, MAMBA_SSM, PACKAGES, Package, numbers, remedy

# Where the extensions run; the tests put stand-ins in their place that run elsewhere.
DEVICE = "cuda"


@cache
def obstacle() -> str | None:
    """What hinders the extensions here, with the remedy behind the last semicolon; None where they run.

    They are imported, and run once for one step of one channel, so that nothing is left for the first training step to
    find out. mamba_ssm itself, which takes seconds to import, is not.
    """
    if torch.version.hip is not None:
        return "torch is built for ROCm, for which this backend is not made; use backend 'auto'"
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        return f"no CUDA device is seen by torch {torch.__version__}, {built}; use backend 'auto'"
    hindrances = {package: _hindrance(package) for package in PACKAGES}
    hindered = [package for package, reason in hindrances.items() if reason is not None]
    if hindered:
        reasons = ", and ".join(hindrances[package] or "" for package in hindered)
        return f"{reasons.replace('; ', ', ')}; {remedy(hindered)}"
    return _trial()


def scan() -> ModuleType:
    """The extension of mamba-ssm, with `fwd` and `bwd`."""
    return importlib.import_module(MAMBA_SSM.extension)


@cache
def convolution() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Forward and backward of causal-conv1d, which take the same arguments in all its releases.

    Since 1.5.1 the extension writes into memory that it is given, and `cpp_functions` gives it memory.
    """
    if numbers(CAUSAL_CONV1D.installed() or CAUSAL_CONV1D.oldest) < (1, 5, 1):
        extension = importlib.import_module(CAUSAL_CONV1D.extension)
        return extension.causal_conv1d_fwd, extension.causal_conv1d_bwd
    functions = importlib.import_module("causal_conv1d.cpp_functions")
    return functions.causal_conv1d_fwd_function, functions.causal_conv1d_bwd_function


def _hindrance(package: Package) -> str | None:
    version = package.installed()
    if version is None:
        return f"{package.name} is not installed"
    if not package.supports(version):
        return f"{package.name} {version} is not supported, only {package.oldest} to below {package.below}"
    try:
        importlib.import_module(package.extension)
    except (ImportError, OSError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == package.extension:
            switch = (
                ", which this release builds only where MAMBA_KEEP_CUDA_BUILD=TRUE"
                if package.is_opt_in(version)
                else ""
            )
            return f"{package.name} {version} is installed without its extension {package.extension}{switch}"
        return (
            f"the extension {package.extension} of {package.name} {version} is built for another torch or CUDA than "
            f"torch {torch.__version__} of CUDA {torch.version.cuda}: {_first_line(error)}"
        )
    return None


def _trial() -> str | None:
    """Run both extensions: neither import nor version tells for which GPUs they were compiled."""
    x, weight = torch.zeros(1, 1, 1, device=DEVICE), torch.zeros(1, 4, device=DEVICE)
    for package, run in (
        (MAMBA_SSM, lambda: scan().fwd(x, x, x[0], x[None], x[None], None, None, None, True)),
        (CAUSAL_CONV1D, lambda: convolution()[0](x, weight, None, None, None, None, True)),
    ):
        try:
            run()
        except (RuntimeError, ImportError, TypeError) as error:
            reason = f"the extension {package.extension} of {package.name} {package.installed()} does not run here"
            return f"{reason}: {_first_line(error).replace('; ', ', ')}; {remedy([package])}"
    return None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
