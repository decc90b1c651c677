"""Load compiled kernels by NVIDIA's driver, and launch them on torch's current stream, in a captured graph too."""

from __future__ import annotations

import ctypes
import functools
from ctypes import byref, c_char_p, c_int, c_void_p

import torch

from famba.errors import BackendError


@functools.cache
def library() -> ctypes.CDLL:
    """Load the driver. Raises BackendError where there is none."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise BackendError(f"NVIDIA's driver does not load ({error}); install it, or use 'auto'") from error


def load(cubin: bytes, kernel: str, device: int) -> c_void_p:
    """Load a kernel of a cubin onto a device, for the life of the process."""
    cuda, module, function = library(), c_void_p(), c_void_p()
    _enter(device)
    _check(cuda.cuModuleLoadData(byref(module), cubin))
    _check(cuda.cuModuleGetFunction(byref(function), module, kernel.encode()))
    return function


def launch(function: c_void_p, device: int, grid: tuple[int, int], threads: int, argument: bytes) -> None:
    """Launch a loaded kernel, which takes one structure, on the current stream of its device."""
    # A thread that torch has started may have no context yet: one that runs a backward, for example.
    _enter(device)
    stream = c_void_p(torch.cuda.current_stream(device).cuda_stream)
    # The driver has copied the argument when the call returns.
    parameters = (c_void_p * 1)(ctypes.cast(c_char_p(argument), c_void_p))
    _check(library().cuLaunchKernel(function, *grid, 1, threads, 1, 1, 0, stream, parameters, None))


def _enter(device: int) -> None:
    _check(library().cuCtxSetCurrent(_context(device)))


@functools.cache
def _context(device: int) -> c_void_p:
    """Return the context that torch uses on a device."""
    context, handle = c_void_p(), c_int()
    _check(library().cuDeviceGet(byref(handle), device))
    _check(library().cuDevicePrimaryCtxRetain(byref(context), handle))
    return context


def _check(status: int) -> None:
    if status != 0:
        name, text = c_char_p(), c_char_p()
        library().cuGetErrorName(status, byref(name))
        library().cuGetErrorString(status, byref(text))
        said = [(x.value or b"?").decode() for x in (name, text)]
        raise BackendError(f"the CUDA driver fails with {said[0]}: {said[1]}")
