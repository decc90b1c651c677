"""Tell glibc's allocator what to do with freed memory in this process; other systems have none of it."""

from __future__ import annotations

import ctypes
import platform

# Of malloc.h; the library takes no larger threshold.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT_BYTES, _SMALLEST_RETURNED_BYTES = 2**25, 2**17


def keep_freed_memory() -> None:
    """Keep what is freed for the next use, for tensors of up to 32 MiB.

    Alone in a loop, an op gets its memory page by page from the system at every call, and its time is mostly that. In
    the middle of a training step it does not: there, memory is at hand.
    """
    _set(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES)
    _set(_M_TRIM_THRESHOLD, 2**31 - 1)


def return_freed_memory() -> None:
    """Return to the system at once what is freed: resident memory is then what is in use.

    By itself the library keeps some of it, now a tenth and now twice what is in use, by the order of the requests.
    """
    _set(_M_MMAP_THRESHOLD, _SMALLEST_RETURNED_BYTES)


def _set(parameter: int, value: int) -> None:
    if platform.system() == "Linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(parameter, value)
