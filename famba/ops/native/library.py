"""Find, load and call the compiled kernels, and choose the instruction set that they use.

The interface is `src/interface.h`; the structures below mirror it field by field.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sysconfig
from ctypes import c_double, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from famba.errors import BackendError, near_miss

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
ISAS = ("portable", "avx2", "avx512")
ENVIRONMENT_VARIABLE = "FAMBA_ISA"
PATH = Path(__file__).with_name("libfamba_kernels.so")
# What the build left behind where it failed.
FAILURE = Path(__file__).with_name("build_failure.txt")


class Array(ctypes.Structure):
    """Describe a (batch, length, channels) array with adjacent channels; strides in elements."""

    _fields_ = (("data", c_void_p), ("batch_stride", c_int64), ("row_stride", c_int64))

    @classmethod
    def of(cls, tensor: Tensor) -> Array:
        """Describe a tensor whose last stride is 1."""
        return cls(tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


def _structure(*fields: tuple[type, str]) -> type[ctypes.Structure]:
    """Make a structure from the types and names of its fields, in their order."""
    named = [(name, kind) for kind, names in fields for name in names.split()]
    return type("Arguments", (ctypes.Structure,), {"_fields_": named})


Scan = _structure(
    (c_int64, "batch length channels states chunk"),
    (c_int32, "dtype threads softplus reverse accumulate"),
    (c_float, "scale"),
    (Array, "u delta B C z y"),
    (c_void_p, "A D delta_bias state step_means output_sums"),
    (Array, "dy du ddelta dB dC dz"),
    (c_void_p, "dA dD ddelta_bias"),
)
Conv = _structure(
    (c_int64, "batch length channels width"),
    (c_int32, "dtype threads silu reverse accumulate"),
    (Array, "x y"),
    (c_void_p, "weight bias"),
    (Array, "dy dx"),
    (c_void_p, "dweight dbias"),
)
Norm = _structure(
    (c_int64, "rows channels"),
    (c_int32, "dtype threads"),
    (c_float, "eps"),
    (c_void_p, "x dnormed normed residual weight dtotal total grad dweight"),
)
Fuse = _structure(
    (c_int64, "batch length fused channels"),
    (c_int32, "dtype threads"),
    (Array, "x y"),
    (c_void_p, "places weights"),
)
Scaling = _structure(
    (c_int64, "batch height width size"),
    (c_int32, "dtype threads bicubic"),
    (c_void_p, "images rows columns"),
    (c_double, "down across"),
    (c_void_p, "out"),
)
Motion = _structure(
    (c_int64, "count height width"),
    (c_int32, "dtype threads bicubic"),
    (c_void_p, "images rows matrices fill"),
)
Lookup = _structure(
    (c_int64, "count area"),
    (c_int32, "dtype threads"),
    (c_void_p, "images rows tables"),
)


_isa: int | None = None
_PROCESS = os.getpid()


def obstacle() -> str | None:
    """Return None where the kernels can be used, else the reason and behind a semicolon the remedy."""
    found = _loaded()
    return found if isinstance(found, str) else None


def isas() -> list[str]:
    """Return the instruction sets that this processor has of those that were built, in rising order."""
    return list(ISAS[: _library().famba_isa_best() + 1])


def isa() -> str:
    """Return the instruction set in use: the environment variable FAMBA_ISA, else the best of this processor."""
    return ISAS[_isa_number()]


def use_isa(name: str | None) -> None:
    """Choose the instruction set for this process; None for what FAMBA_ISA says, else the best."""
    global _isa
    _isa = None if name is None else _checked_isa(name)


def call(kernel: str, kind: type[ctypes.Structure], dtype: torch.dtype, **arguments: Any) -> None:
    """Run a kernel on a structure with these fields, of which tensors become arrays or addresses; others are 0.

    Raises MemoryError where its scratch memory cannot be had.
    """
    # One thread in a forked child, which has none of its parent's.
    threads = torch.get_num_threads() if os.getpid() == _PROCESS else 1
    structure = kind(dtype=_DTYPES[dtype], threads=threads)
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            value = Array.of(value) if isinstance(getattr(structure, name), Array) else value.data_ptr()
        if value is not None:
            setattr(structure, name, value)
    status = getattr(_library(), f"famba_{kernel}")(_isa_number(), ctypes.byref(structure))
    if status == 1:
        raise MemoryError(f"native {kernel}: out of memory for scratch space")
    assert status == 0


def _isa_number() -> int:
    global _isa
    if _isa is None:
        name = os.environ.get(ENVIRONMENT_VARIABLE)
        _isa = _checked_isa(name) if name else _library().famba_isa_best()
    return _isa


def _checked_isa(name: str) -> int:
    usable = isas()
    if name not in usable:
        unknown = f"{near_miss(name.lower(), ISAS)} is unknown"
        fault = " cannot be used on this processor" if name in ISAS else unknown
        where = f"(chosen by {ENVIRONMENT_VARIABLE} where that is set)"
        raise BackendError(f"instruction set {name!r}{fault}; usable: {', '.join(usable)} {where}")
    return ISAS.index(name)


def _library() -> ctypes.CDLL:
    found = _loaded()
    if isinstance(found, str):
        raise BackendError(found)
    return found


@functools.cache
def _loaded() -> ctypes.CDLL | str:
    """Load the library, or say what hinders that, which is kept as well: every op asks."""
    remedy = "install a C++ compiler (g++ or clang++) and install famba again, or use 'reference'"
    if not PATH.exists():
        reason = FAILURE.read_text().strip() if FAILURE.exists() else "the kernels were not compiled at installation"
        return f"{reason}; {remedy}"
    try:
        library = ctypes.CDLL(str(PATH))
    except OSError as error:
        return f"{PATH.name} does not load on {sysconfig.get_platform()} ({error}); {remedy}"
    sizes = (c_int64 * 7)()
    if hasattr(library, "famba_struct_sizes"):
        library.famba_struct_sizes(sizes)
    if list(sizes) != [ctypes.sizeof(kind) for kind in (Scan, Conv, Norm, Fuse, Scaling, Motion, Lookup)]:
        return f"{PATH.name} is of another version of famba; install famba again, or use 'reference'"
    return library
