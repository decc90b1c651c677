"""Who computes an op: the backends, and for the scan the libraries that others use."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from famba.analysis.benchmark.cases import OPS, Case
from famba.analysis.benchmark.machine import memory_bytes
from famba.errors import BackendError
from famba.ops import backends, use_backend
from famba.ops.availability import interpreted
from famba.ops.registry import resolve

MAMBA_PY = "mamba.py"
MAMBA_SSM = "mamba-ssm reference"
_EXTENSIONS = ("selective_scan_cuda", "causal_conv1d_cuda")
# Arrays of all states that autograd and the scans of other libraries hold at once, at most.
_STATE_ARRAYS = 12


@dataclass(frozen=True)
class Contestant:
    """A way to compute an op.

    run: takes the op's inputs in the layout that it is made for. arrange: brings the inputs (b, l, d) into that
    layout, and restore its result and each gradient back; neither is timed.
    """

    run: Callable[..., Tensor | tuple[Tensor, ...]]
    arrange: Callable[[Tensor], Tensor] = lambda x: x
    restore: Callable[[Tensor], Tensor] = lambda x: x


def contestants(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[dict[str, Contestant], dict[str, str]]:
    """Return those that can compute a case here, by name, and of the others why they cannot."""
    found: dict[str, Contestant] = {}
    missing: dict[str, str] = {}
    for name, reason in obstacles(device, dtype).items():
        if reason is None:
            found[name] = Contestant(_by_backend(name, case.op))
        else:
            missing[name] = reason
    if case.op == "selective_scan":
        for name, offer in ((MAMBA_SSM, _mamba_ssm), (MAMBA_PY, _mamba_py)):
            reason = _too_large(case, device)
            other = offer() if reason is None else reason
            if isinstance(other, Contestant):
                found[name] = other
            else:
                missing[name] = other
    return found, missing


def obstacles(device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
    """Map each backend's name to None where it is timed on a device in a dtype, else to the reason."""
    return {name: reason or _not_served(name, device, dtype) for name, reason in backends().items()}


def _not_served(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if name == "triton" and interpreted():
        return "TRITON_INTERPRET=1 has it run in Triton's interpreter, whose times say nothing; unset it"
    try:
        with use_backend(name):
            resolve(device.type, dtype)
    except BackendError as error:
        return str(error)
    return None


def _by_backend(name: str, op: str) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    def run(*tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        with use_backend(name):
            return OPS[op].run(*tensors)

    return run


def _mamba_ssm() -> Contestant | str:
    try:
        with _missing_extensions_stubbed():
            scan = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_ref
    except Exception as error:
        return f"mamba_ssm.ops.selective_scan_interface.selective_scan_ref cannot be imported ({error})"
    return Contestant(scan, _swapped, _swapped)


@contextlib.contextmanager
def _missing_extensions_stubbed() -> Iterator[None]:
    """Let mamba_ssm be imported without its CUDA extensions, as its reference needs none, and be forgotten after."""
    missing = [name for name in _EXTENSIONS if importlib.util.find_spec(name) is None]
    before = set(sys.modules)
    sys.modules.update({name: ModuleType(name) for name in missing})
    try:
        yield
    finally:
        if missing:
            for name in set(sys.modules) - before:
                if name.split(".")[0] in ("mamba_ssm", "causal_conv1d", *missing):
                    del sys.modules[name]


def _mamba_py() -> Contestant | str:
    try:
        pscan = importlib.import_module("mambapy.pscan").pscan
    except ImportError as error:
        return f"mambapy is not installed ({error}); pip install mambapy"

    def run(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        """What mamba.py's block computes around its parallel scan; in float32, as all others keep their states."""
        dtype, (u, delta, B, C) = u.dtype, (x.float() for x in (u, delta, B, C))
        decay = torch.exp(delta.unsqueeze(-1) * A)
        drive = delta.unsqueeze(-1) * B.unsqueeze(2) * u.unsqueeze(-1)
        return ((pscan(decay, drive) @ C.unsqueeze(-1)).squeeze(3) + D * u).to(dtype)

    return Contestant(run)


def _swapped(x: Tensor) -> Tensor:
    """Exchange length and channels, as mamba-ssm has them: (b, d, l); parameters stay."""
    return x.transpose(1, 2).contiguous() if x.ndim == 3 else x


def _too_large(case: Case, device: torch.device) -> str | None:
    """Why a scan that keeps all states in memory does not fit, or None."""
    # mamba.py pads the length to a power of two.
    padded = 2 ** (case.length - 1).bit_length()
    need = _STATE_ARRAYS * 4 * case.batch * padded * case.channels * case.states
    if 2 * need <= memory_bytes(device):
        return None
    size = (
        f"about {need / 2**30:.0f} GiB, more than half of this {'GPU' if device.type == 'cuda' else 'machine'}'s memory"
    )
    return f"keeps all states and would need {size} for {case.title}"
