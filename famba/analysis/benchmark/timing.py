"""Time contestants in turn: on a CPU by the host's clock, on a GPU as CUDA graphs, as calls come, and by launches."""

from __future__ import annotations

import ctypes
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from famba.analysis.benchmark.report import Row
from famba.training.devices import synchronize
from famba.training.graph import captured, graph_memory

Call = Callable[[], object]
# A sample of a graph takes about so long, and holds no more replays than that. Launches of a few calls fit into a GPU's
# queue, and do not make the host wait.
_SAMPLE_MS, _MOST_REPLAYS, _QUEUED_CALLS = 5.0, 100, 8
# Of glibc's malloc.h, which takes no larger threshold; other systems have none of it.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT_BYTES, _SMALLEST_RETURNED_BYTES = 2**25, 2**17
NOTE = (
    "on CUDA, ms is a replay of a CUDA graph, which is the time of the kernels; eager ms lies between events around "
    "the calls as they come; host ms is what the host needs to launch a call, without waiting for it; kernels ms and "
    "launches are those of one call by torch.profiler"
)


class Race:
    """Contestants that take turns, so that whatever else the machine does falls on all of them alike.

    samples: milliseconds of each contestant by column. kernels: milliseconds and launches of each kernel in one call of
    a contestant, on CUDA.
    """

    def __init__(self, title: str, device: torch.device) -> None:
        self.title, self.device = title, device
        self.samples: dict[str, dict[str, list[float]]] = {}
        self.kernels: dict[str, dict[str, tuple[float, int]]] = {}
        self._clocks: dict[str, dict[str, Callable[[], float]]] = {}

    def enter(self, name: str, calls: Sequence[Call], graph: Call | None = None) -> None:
        """Warm a contestant up and take its first sample.

        Args:
            name: of the contestant.
            calls: the same work on one copy of the inputs each; a sample holds all of them.
            graph: replays the work of all calls as a CUDA graph; captured here where None. Read on CUDA alone.
        """
        sys.stderr.write(f"{self.title}: {name}\n")

        def every() -> None:
            for call in calls:
                call()

        every()
        self._clocks[name] = {"ms": lambda: self._by_host(calls)}
        if self.device.type == "cuda":
            every()
            replay = graph or captured(every, graph_memory(self.device))
            replays = min(_MOST_REPLAYS, math.ceil(_SAMPLE_MS / max(self._by_events(replay), 1e-3)))
            self.kernels[name] = _kernels(calls[0], self.device)
            self._clocks[name] = {
                "ms": lambda: self._by_events(replay, replays) / len(calls),
                "eager_ms": lambda: self._by_events(every) / len(calls),
                "host_ms": lambda: self._by_host(calls[:_QUEUED_CALLS], waits=False),
            }
        self.samples[name] = {column: [clock()] for column, clock in self._clocks[name].items()}

    def run(self, rounds: int) -> None:
        """Take samples in turn until each contestant has one of each of `rounds`."""
        for _ in range(rounds - 1):
            for name, clocks in self._clocks.items():
                for column, clock in clocks.items():
                    self.samples[name][column].append(clock())

    def entries(self, name: str, prefix: str = "") -> Row:
        """Return a row's entries: medians of a call in ms, and all samples; nothing for one that has not entered."""
        found: Row = {}
        for column, samples in self.samples.get(name, {}).items():
            found |= {prefix + column: statistics.median(samples), f"{prefix}{column}_samples": list(samples)}
        if name in self.kernels:
            times, launches = zip(*self.kernels[name].values(), strict=True)
            found |= {f"{prefix}kernels_ms": sum(times), f"{prefix}launches": sum(launches)}
        return found

    def _by_events(self, run: Call, times: int = 1) -> float:
        """Return the milliseconds of one of several runs between two events on the device."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        synchronize(self.device)
        begin.record()
        for _ in range(times):
            run()
        end.record()
        synchronize(self.device)
        return begin.elapsed_time(end) / times

    def _by_host(self, calls: Sequence[Call], waits: bool = True) -> float:
        """Return the milliseconds of a call by the host's clock, from an idle device, to an idle one where it waits."""
        synchronize(self.device)
        begin = time.perf_counter()
        for call in calls:
            call()
        if waits:
            synchronize(self.device)
        return 1000 * (time.perf_counter() - begin) / len(calls)


def _kernels(call: Call, device: torch.device) -> dict[str, tuple[float, int]]:
    """Return milliseconds and launches of each kernel, copy and fill that a call makes a CUDA device do."""
    synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        synchronize(device)
    events = [e for e in seen.key_averages() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    return {event.key: (event.self_device_time_total / 1000, event.count) for event in events}


def compared(rows: list[Row], column: str, key: str, base: str) -> None:
    """Put into each row how many times as much of `key` it takes as the contestant `base`, where both are known."""
    of = next((row.get(key) for row in rows if row["contestant"] == base), None)
    for row in rows:
        row[column] = row[key] / of if of and row.get(key) is not None else None


def keep_freed_memory() -> None:
    """Let this process keep freed memory for the next use, for tensors of up to 32 MiB, as the middle of a step has it.

    Otherwise an op that is alone in a loop gets its memory page by page at every call, which takes most of its time.
    """
    _set(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES)
    _set(_M_TRIM_THRESHOLD, 2**31 - 1)


def return_freed_memory() -> None:
    """Let this process return freed memory at once, so that resident memory is what is in use."""
    _set(_M_MMAP_THRESHOLD, _SMALLEST_RETURNED_BYTES)


def _set(parameter: int, value: int) -> None:
    if platform.system() == "Linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(parameter, value)
