"""What a benchmark runs on: threads, device, precisions, and what a reader has to know of them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import Any

import torch

from famba.errors import ConfigError
from famba.ops.native import library
from famba.training.devices import choose_device, has_bf16
from famba.training.provenance import provenance

PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Name to the dtype of autocast, None for no autocast; fp16 is for CUDA devices alone."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Name to the dtype of activations."""
SEED = 0
# Of glibc's malloc.h; the library takes no larger threshold.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT_BYTES, _SMALLEST_RETURNED_BYTES = 2**25, 2**17


def describe(device: torch.device) -> dict[str, Any]:
    """Machine, threads, instruction set, versions, commit and date."""
    found = provenance(device, seed=SEED, world_size=1)
    with contextlib.suppress(metadata.PackageNotFoundError):
        found["packages"]["mambapy"] = metadata.version("mambapy")
    obstacle = library.obstacle()
    found["threads"] = torch.get_num_threads()
    found["native_isa"] = library.isa() if obstacle is None else f"none ({obstacle})"
    return found


def pick_device(name: str) -> torch.device:
    """Turn "auto", "cpu", "cuda" or "mps" into a device. Raises ConfigError for one that is not here."""
    try:
        return choose_device(name)
    except ConfigError as error:
        raise ConfigError(str(error).replace("trainer.device", "--device")) from error


def default_precisions(device: torch.device) -> list[str]:
    """Name float32, and bfloat16 where the device computes in it."""
    return ["fp32", "bf16"] if has_bf16(device) else ["fp32"]


def check_precisions(precisions: Sequence[str], device: torch.device) -> None:
    """Raise ConfigError for one that is not timed on this device."""
    if "fp16" in precisions and device.type != "cuda":
        raise ConfigError(f"fp16 is timed on CUDA devices alone, this is a {device.type} device; use fp32 or bf16")


def precision_notes(precisions: Sequence[str], device: torch.device) -> list[str]:
    """What to know of the chosen precisions on this device."""
    if device.type == "cuda":
        return _cuda_precision_notes(precisions)
    if "bf16" not in precisions or has_bf16(device):
        return []
    return [
        "this processor has no bfloat16 instructions; torch emulates them, slowly, so times in bf16 here say nothing "
        "about a processor that has them"
    ]


def _cuda_precision_notes(precisions: Sequence[str]) -> list[str]:
    notes = []
    if "fp32" in precisions and torch.get_float32_matmul_precision() == "highest":
        notes.append("products in fp32 do not use TF32, which torch has to be told to use")
    if "fp16" in precisions:
        notes.append("steps in fp16 are taken without a loss scaler")
    return notes


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let torch use `count` threads inside the block; as many as it likes for None."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def keep_freed_memory() -> list[str]:
    """Let the C library keep what is freed for the next use, in this process; return what to say of it.

    Alone in a loop, an op gets its memory page by page from the system at every call, and its time is mostly that. In
    the middle of a training step it does not: there, memory is at hand.
    """
    if not _set_malloc(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES):
        return []
    _set_malloc(_M_TRIM_THRESHOLD, 2**31 - 1)
    return [
        "freed memory is kept for the next use, for all contestants, as it is in the middle of a training step; the C "
        f"library does so for tensors of up to {_LARGEST_KEPT_BYTES // 2**20} MiB"
    ]


def return_freed_memory() -> None:
    """Let the C library return at once what is freed, in this process: resident memory is then what is in use.

    By itself it keeps some of it, now a tenth and now twice as much as is in use, by the order of the requests.
    """
    _set_malloc(_M_MMAP_THRESHOLD, _SMALLEST_RETURNED_BYTES)


def _set_malloc(parameter: int, value: int) -> bool:
    if platform.system() != "Linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return False
    return bool(libc.mallopt(parameter, value))


def memory_bytes(device: torch.device) -> int:
    """Memory of a CUDA device, or of this machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
