"""Choose the backend that serves a device, and say why another does not."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from famba.errors import BackendError, near_miss
from famba.ops.availability import mamba_ssm_obstacle, triton_obstacle, triton_on_request
from famba.ops.cuda import obstacle as cuda
from famba.ops.inputs import ScanGradients, ScanInputs
from famba.ops.native import library

AUTO = "auto"
ENVIRONMENT_VARIABLE = "FAMBA_BACKEND"

_log = logging.getLogger(__name__)


@runtime_checkable
class Kernels(Protocol):
    """List what a backend's module provides; `famba.ops.reference` says what each function means.

    `selective_scan` returns its result and a state for its backward, of shape `scan_state_shape`, in float32, or in
    float64 where u is.
    """

    @staticmethod
    def scan_state_shape(batch: int, length: int, channels: int, states: int) -> tuple[int, ...]: ...

    @staticmethod
    def selective_scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]: ...

    @staticmethod
    def selective_scan_backward(dy: Tensor, inputs: ScanInputs, state: Tensor) -> ScanGradients: ...

    @staticmethod
    def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor: ...

    @staticmethod
    def causal_conv1d_backward(
        dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]: ...

    @staticmethod
    def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]: ...

    @staticmethod
    def add_rms_norm_backward(
        dnormed: Tensor, dtotal: Tensor, total: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]: ...

    @staticmethod
    def match_tokens(
        metric: Tensor, leading: int, protected: Tensor | None, sizes: Tensor | None, r: int, order: str
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    @staticmethod
    def fuse_tokens(x: Tensor, places: Tensor, weights: Tensor, length: int) -> Tensor: ...

    @staticmethod
    def fuse_tokens_backward(dy: Tensor, places: Tensor, weights: Tensor) -> Tensor: ...


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


_HALF = (torch.float32, torch.bfloat16, torch.float16)


# In the order in which "auto" prefers them.
_BACKENDS: dict[str, Backend] = {
    "cuda": Backend("famba.ops.cuda.backend", ("cuda",), cuda.obstacle, _HALF),
    "triton": Backend("famba.ops.triton", ("cuda",), triton_obstacle, _HALF, triton_on_request),
    "mamba_ssm": Backend("famba.ops.mamba_ssm", ("cuda",), mamba_ssm_obstacle, _HALF),
    "native": Backend("famba.ops.native", ("cpu",), library.obstacle, dtypes=(torch.float32, torch.bfloat16)),
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

    name: "cuda", "triton", "mamba_ssm", "native", "reference", or "auto" (the fastest usable one for a tensor's
    device). A `with` block takes a fresh call. Raises BackendError for an unknown name, or for a backend that cannot
    be used here, with reason and remedy.
    """

    def __init__(self, name: str) -> None:
        global _chosen
        _check(name)
        self._previous = _chosen
        _chosen = name

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
        return next(n for n, b in _BACKENDS.items() if _serves(b, device, dtype) and _obstacle(n) is None)
    _check(name)
    backend = _BACKENDS[name]
    if not _serves_device(backend, device) and device not in backend.on_request():
        raise BackendError(
            f"backend {name!r} does not serve {device!r} tensors, only {', '.join(backend.devices or ())}; "
            "use 'auto', or move the tensors"
        )
    if not _serves_dtype(backend, dtype):
        raise BackendError(
            f"backend {name!r} does not serve {str(dtype).removeprefix('torch.')} tensors, only {_dtypes(backend)}; "
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
    faster = list(_BACKENDS)[: list(_BACKENDS).index(name)]
    reasons = {n: _passed_over(_BACKENDS[n], device, dtype) for n in faster}
    told = "; ".join(f"{n}: {reason.split(';')[0]}" for n, reason in reasons.items() if reason is not None)
    return f"{name} ({told})" if told else name


def slow_choice(device: str, dtype: torch.dtype = torch.float32) -> str | None:
    """Say what is wrong, and what to do, where "auto" finds nothing but the reference for a GPU; else return None."""
    if device != "cuda" or _asked_for() != AUTO or resolve(device, dtype) != "reference":
        return None
    return (
        "the ops run in plain torch (backend 'reference') on the GPU, hundreds of times slower than by Triton's "
        f"kernels; triton: {_passed_over(_BACKENDS['triton'], device, dtype)}"
    )


@torch.compiler.assume_constant_result
def _warn_if_slow(device: str, dtype: torch.dtype) -> None:
    """Log `slow_choice` once; not traced by torch.compile, which cannot log."""
    global _warned
    text = slow_choice(device, dtype)
    if text is not None and not _warned:
        _warned = True
        _log.warning("%s", text)


def _passed_over(backend: Backend, device: str, dtype: torch.dtype) -> str | None:
    """Say why "auto" passes over a backend made for a device type, the remedy behind a semicolon; else return None."""
    if backend.devices is not None and device not in backend.devices:
        return None
    obstacle = backend.obstacle()
    if obstacle is not None:
        return obstacle
    if device in backend.on_request():
        return "taken only by name where TRITON_INTERPRET=1 is set; unset it"
    return None if _serves_dtype(backend, dtype) else f"serves {_dtypes(backend)} alone; cast the tensors"


def kernels(name: str) -> Kernels:
    """Import the functions of a backend that `resolve` named."""
    return cast("Kernels", importlib.import_module(_BACKENDS[name].module))


def _asked_for() -> str:
    return _chosen if _chosen is not None else os.environ.get(ENVIRONMENT_VARIABLE) or AUTO


@torch.compiler.assume_constant_result
def _obstacle(name: str) -> str | None:
    """Say what hinders a backend; not traced by torch.compile, since it looks at files."""
    return _BACKENDS[name].obstacle()


def _serves_device(backend: Backend, device: str) -> bool:
    """Return whether "auto" may choose a backend for a device type."""
    return (backend.devices is None or device in backend.devices) and device not in backend.on_request()


def _serves(backend: Backend, device: str, dtype: torch.dtype = torch.float32) -> bool:
    return _serves_device(backend, device) and _serves_dtype(backend, dtype)


def _serves_dtype(backend: Backend, dtype: torch.dtype) -> bool:
    return backend.dtypes is None or dtype in backend.dtypes


def _dtypes(backend: Backend) -> str:
    return " and ".join(str(kind).removeprefix("torch.") for kind in backend.dtypes or ())


def _check(name: str) -> None:
    if name == AUTO:
        return
    if name not in _BACKENDS:
        allowed = [*_BACKENDS, AUTO]
        raise BackendError(f"unknown backend {name!r}{near_miss(name, allowed)}; allowed: {', '.join(allowed)}")
    obstacle = _obstacle(name)
    if obstacle is not None:
        raise BackendError(f"backend {name!r} cannot be used: {obstacle}")
