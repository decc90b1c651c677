"""Choose the backend that serves a device, and say why another does not."""

from __future__ import annotations

import importlib
import itertools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from famba.errors import BackendError, near_miss
from famba.ops.availability import cuda_obstacle, mamba_ssm_obstacle, triton_obstacle, triton_on_request
from famba.ops.inputs import ScanGradients, ScanInputs
from famba.ops.native import library

AUTO = "auto"
ENVIRONMENT_VARIABLE = "FAMBA_BACKEND"

_log = logging.getLogger(__name__)


@runtime_checkable
class Kernels(Protocol):
    """List what a backend's module provides; `famba.ops.reference` says what each function takes and means.

    `selective_scan` returns its result and a state for its backward, of shape `scan_state_shape`, in float32, or in
    float64 where u is.
    """

    scan_state_shape: Callable[[int, int, int, int], tuple[int, ...]]
    selective_scan: Callable[[ScanInputs], tuple[Tensor, Tensor]]
    selective_scan_backward: Callable[[Tensor, ScanInputs, Tensor], ScanGradients]
    causal_conv1d: Callable[[Tensor, Tensor, Tensor | None, bool, bool], Tensor]
    causal_conv1d_backward: Callable[
        [Tensor, Tensor, Tensor, Tensor | None, bool, bool], tuple[Tensor, Tensor, Tensor | None]
    ]
    add_rms_norm: Callable[[Tensor, Tensor | None, Tensor, float], tuple[Tensor, Tensor]]
    add_rms_norm_backward: Callable[[Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    match_tokens: Callable[[Tensor, int, Tensor | None, Tensor | None, int, str], tuple[Tensor, Tensor, Tensor]]
    fuse_tokens: Callable[[Tensor, Tensor, Tensor, int], Tensor]
    fuse_tokens_backward: Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Backend:
    """Say where a backend's kernels lie and when they can be used.

    module: imported at first use. devices: the torch device types it serves, None for all. obstacle: None where it
    works here, else the reason and behind a semicolon the remedy. dtypes: what an op's first input may be, None for
    all. on_request: device types that it serves, also of `devices`, only where it is chosen by name.
    """

    module: str
    devices: tuple[str, ...] | None
    obstacle: Callable[[], str | None]
    dtypes: tuple[torch.dtype, ...] | None = None
    on_request: Callable[[], tuple[str, ...]] = tuple

    def serves_device(self, device: str) -> bool:
        """Return whether "auto" may choose it for a device type."""
        return (self.devices is None or device in self.devices) and device not in self.on_request()

    def serves_dtype(self, dtype: torch.dtype) -> bool:
        """Return whether it takes tensors of a dtype."""
        return self.dtypes is None or dtype in self.dtypes

    def dtype_names(self) -> str:
        """List the dtypes that it takes."""
        return " and ".join(str(kind).removeprefix("torch.") for kind in self.dtypes or ())

    def passed_over(self, device: str, dtype: torch.dtype) -> str | None:
        """Say why "auto" passes over it for a device type, the remedy behind a semicolon; None if not made for that."""
        if self.devices is not None and device not in self.devices:
            return None
        if device in self.on_request():
            return self.obstacle() or "taken only by name where TRITON_INTERPRET=1 is set; unset it"
        unserved = None if self.serves_dtype(dtype) else f"serves {self.dtype_names()} alone; cast the tensors"
        return self.obstacle() or unserved


_HALF = (torch.float32, torch.bfloat16, torch.float16)

# In the order in which "auto" prefers them.
_BACKENDS: dict[str, Backend] = {
    "cuda": Backend("famba.ops.cuda.backend", ("cuda",), cuda_obstacle, _HALF),
    "triton": Backend("famba.ops.triton", ("cuda",), triton_obstacle, _HALF, triton_on_request),
    "mamba_ssm": Backend("famba.ops.mamba_ssm", ("cuda",), mamba_ssm_obstacle, _HALF),
    "native": Backend("famba.ops.native.kernels", ("cpu",), library.obstacle, (torch.float32, torch.bfloat16)),
    "reference": Backend("famba.ops.reference", None, lambda: None),
}

_chosen: str | None = None
_counted: str | None = None
_warned = False


def backends() -> dict[str, str | None]:
    """Map each backend's name to None where it can be used, else to the reason and the remedy."""
    return {name: backend.obstacle() for name, backend in _BACKENDS.items()}


class use_backend:  # noqa: N801 - called like a function, and a context manager as well
    """Choose the backend of all ops in this process: by itself for good, in a `with` block until its end.

    name: "cuda", "triton", "mamba_ssm", "native", "reference", or "auto" (the first of these that can be used
    for a tensor's device and dtype). Call it anew for a `with` block. Raises BackendError, with reason and
    remedy, for an unknown name or a backend that cannot be used here.
    """

    def __init__(self, name: str) -> None:
        global _chosen
        _check(name)
        self._previous = _chosen
        _chosen = name

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None:
        global _chosen
        _chosen = self._previous


@contextmanager
def counting_as(name: str) -> Iterator[None]:
    """Let tensors without data pass inside the block as if this backend computed them, whether it works here or not."""
    global _counted
    _counted = name
    try:
        yield
    finally:
        _counted = None


def resolve(device: str, dtype: torch.dtype = torch.float32) -> str:
    """Name the backend that serves a device type such as "cpu" and a dtype: the chosen one, or the first usable.

    The choice is that of `use_backend`, else of the environment variable FAMBA_BACKEND, else "auto".
    """
    if _counted is not None:
        return _counted
    name = _asked_for()
    if name == AUTO:
        fitting = (n for n, b in _BACKENDS.items() if b.serves_device(device) and b.serves_dtype(dtype))
        return next(name for name in fitting if _obstacle(name) is None)
    _check(name)
    backend = _BACKENDS[name]
    if not backend.serves_device(device) and device not in backend.on_request():
        raise BackendError(
            f"backend {name!r} does not serve {device!r} tensors, only {', '.join(backend.devices or ())}; "
            "use 'auto', or move the tensors"
        )
    if not backend.serves_dtype(dtype):
        given = str(dtype).removeprefix("torch.")
        raise BackendError(
            f"backend {name!r} does not serve {given} tensors, only {backend.dtype_names()}; "
            "use 'auto', or cast the tensors"
        )
    return name


def backend_of(x: Tensor, dtype: torch.dtype | None = None) -> str:
    """Name the backend that runs an op on a tensor, in a dtype that may be another than the tensor's.

    As `resolve` does, and warns once in a process where "auto" finds nothing but the reference for a GPU.
    """
    device, dtype = x.device.type, x.dtype if dtype is None else dtype
    name = resolve(device, dtype)
    if name == "reference" and device == "cuda":
        _warn_if_slow(device, dtype)
    return name


def explain(device: str, dtype: torch.dtype = torch.float32) -> str:
    """Say in one line which backend serves a device type and dtype, and why none that "auto" would prefer does."""
    name = resolve(device, dtype)
    faster = itertools.takewhile(lambda known: known != name, _BACKENDS)
    reasons = {known: _BACKENDS[known].passed_over(device, dtype) for known in faster}
    told = "; ".join(f"{known}: {reason.split(';')[0]}" for known, reason in reasons.items() if reason is not None)
    return f"{name} ({told})" if told else name


def slow_choice(device: str, dtype: torch.dtype = torch.float32) -> str | None:
    """Say what is wrong, and what to do, where "auto" finds nothing but the reference for a GPU; else return None."""
    if device != "cuda" or _asked_for() != AUTO or resolve(device, dtype) != "reference":
        return None
    slow = "the ops run in plain torch (backend 'reference') on the GPU, hundreds of times slower than by kernels"
    return f"{slow}; triton: {_BACKENDS['triton'].passed_over(device, dtype)}"


@torch.compiler.assume_constant_result
def _warn_if_slow(device: str, dtype: torch.dtype) -> None:
    """Log `slow_choice` once; not traced by torch.compile, which cannot log."""
    global _warned
    text = slow_choice(device, dtype)
    if text is not None and not _warned:
        _warned = True
        _log.warning("%s", text)


def kernels(name: str) -> Kernels:
    """Import the functions of a backend that `resolve` named."""
    return cast("Kernels", importlib.import_module(_BACKENDS[name].module))


def _asked_for() -> str:
    return _chosen if _chosen is not None else os.environ.get(ENVIRONMENT_VARIABLE) or AUTO


@torch.compiler.assume_constant_result
def _obstacle(name: str) -> str | None:
    """Say what hinders a backend; not traced by torch.compile, since it looks at files."""
    return _BACKENDS[name].obstacle()


def _check(name: str) -> None:
    if name == AUTO:
        return
    if name not in _BACKENDS:
        allowed = [*_BACKENDS, AUTO]
        raise BackendError(f"unknown backend {name!r}{near_miss(name, allowed)}; allowed: {', '.join(allowed)}")
    obstacle = _obstacle(name)
    if obstacle is not None:
        raise BackendError(f"backend {name!r} cannot be used: {obstacle}")
