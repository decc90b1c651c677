"""Find NVIDIA's compiler library NVRTC, which torch brings, and compile for an architecture.

It needs no GPU, no driver and no toolkit.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from ctypes import byref, c_char_p, c_int, c_size_t, c_void_p
from pathlib import Path

import torch

from famba.errors import BackendError

_REMEDY = "pip install nvidia-cuda-nvrtc for the CUDA of your torch, or use 'triton'"


@functools.cache
def library() -> ctypes.CDLL:
    """Load NVRTC, of the same major version as torch's CUDA. Raises BackendError where there is none."""
    major = (torch.version.cuda or "").split(".")[0]
    if not major:
        raise BackendError(f"torch {torch.__version__} is built without CUDA; install torch for CUDA, or use 'auto'")
    for path in _paths(major):
        try:
            found = ctypes.CDLL(str(path))
        except OSError:
            continue
        if hasattr(found, "nvrtcGetSupportedArchs"):  # since CUDA 11.2
            found.nvrtcGetErrorString.restype = c_char_p
            return found
    raise BackendError(f"no libnvrtc.so.{major} was found, NVIDIA's compiler library, which torch brings; {_REMEDY}")


def version() -> tuple[int, int]:
    """Return the version of NVRTC, such as (13, 0)."""
    major, minor = c_int(), c_int()
    _check(library().nvrtcVersion(byref(major), byref(minor)))
    return major.value, minor.value


@functools.cache
def architectures() -> tuple[int, ...]:
    """Return the compute capabilities that NVRTC compiles for, times ten, in rising order."""
    count = c_int()
    _check(library().nvrtcGetNumSupportedArchs(byref(count)))
    numbers = (c_int * count.value)()
    _check(library().nvrtcGetSupportedArchs(numbers))
    return tuple(numbers)


def architecture(capability: tuple[int, int]) -> int:
    """Return the best that NVRTC compiles for what a device of this compute capability runs, or raise BackendError."""
    major, minor = capability
    fitting = [known for known in architectures() if known // 10 == major and known % 10 <= minor]
    if not fitting:
        known = ", ".join(f"{x // 10}.{x % 10}" for x in architectures())
        raise BackendError(
            f"NVRTC {'.'.join(map(str, version()))} does not compile for compute capability {major}.{minor}, only for "
            f"{known}; install torch for another CUDA, or use 'triton'"
        )
    return max(fitting)


def compile_source(source: str, name: str, options: Sequence[str]) -> bytes:
    """Compile a source into a cubin. Raises BackendError with what the compiler says."""
    nvrtc, program = library(), c_void_p()
    _check(nvrtc.nvrtcCreateProgram(byref(program), source.encode(), name.encode(), 0, None, None))
    try:
        arguments = (c_char_p * len(options))(*(option.encode() for option in options))
        status = nvrtc.nvrtcCompileProgram(program, len(options), arguments)
        if status != 0:
            log = _read(program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
            text = log.rstrip(b"\0").decode(errors="replace").strip()
            raise BackendError(f"{name} does not compile by NVRTC {version()} ({' '.join(options)}): {text}")
        return _read(program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
    finally:
        nvrtc.nvrtcDestroyProgram(byref(program))


def _paths(major: str) -> Iterator[Path | str]:
    """Give the places where NVRTC may lie: NVIDIA's packages, torch's folder, the system's, the environment's."""
    # Of several packages side by side, "nvidia" is a package without a file of its own.
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations if spec else None) or ():
        for folder in (f"cu{major}", "cuda_nvrtc"):
            yield from sorted((Path(root) / folder / "lib").glob(f"libnvrtc.so.{major}*"))
    # Some of torch's wheels hold it under a longer name.
    yield from sorted((Path(torch.__file__).parent / "lib").glob(f"libnvrtc*.so.{major}*"))
    yield f"libnvrtc.so.{major}"
    for folder in filter(None, (sys.prefix, os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"))):
        yield from sorted(Path(folder).glob(f"lib*/libnvrtc.so.{major}*"))


def _read(program: c_void_p, size_of, read) -> bytes:  # type: ignore[no-untyped-def]
    size = c_size_t()
    _check(size_of(program, byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(read(program, buffer))
    return buffer.raw


def _check(status: int) -> None:
    if status != 0:
        raise BackendError(f"NVRTC fails: {library().nvrtcGetErrorString(status).decode()}; {_REMEDY}")
