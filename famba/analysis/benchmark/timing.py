"""Time contestants in turn: on a CPU by the host's clock, on a GPU as CUDA graphs and as the calls come."""

from __future__ import annotations

import ctypes
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch

from famba.analysis.benchmark.report import Row
from famba.training.devices import synchronize
from famba.training.graph import captured, graph_memory

Call = Callable[[], object]
_SAMPLE_MS, _MOST_REPLAYS = 5.0, 100  # a sample of a graph takes about so long, and holds no more replays than that
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES = -1, -3, 2**25  # of glibc's malloc.h
NOTE = (
    "on CUDA, ms is a replay of a CUDA graph, which is the time of the kernels; eager ms lies between events around "
    "the calls as they come, as in a step of trainer.cuda_graphs=false"
)


class Race:
    """Contestants that take turns, so that whatever else the machine does falls on all of them alike.

    samples: milliseconds of each contestant by column.
    """

    def __init__(self, title: str, device: torch.device) -> None:
        self.title, self.device = title, device
        self.samples: dict[str, dict[str, list[float]]] = {}
        self._clocks: dict[str, dict[str, Callable[[], float]]] = {}

    def enter(self, name: str, calls: Sequence[Call], graph: Call | None = None) -> None:
        """Warm a contestant up and take its first sample.

        calls: the same work on one copy of the inputs each; a sample holds all of them. graph: replays the work of all
        calls as a CUDA graph; captured here where None. Read on CUDA alone.
        """
        sys.stderr.write(f"{self.title}: {name}\n")

        def every() -> None:
            for call in calls:
                call()

        every()
        clocks = {"ms": lambda: self._by_host(every) / len(calls)}
        if self.device.type == "cuda":
            every()
            replay = graph or captured(every, graph_memory(self.device))
            replays = min(_MOST_REPLAYS, math.ceil(_SAMPLE_MS / max(self._by_events(replay), 1e-3)))
            clocks = {
                "ms": lambda: self._by_events(replay, replays) / len(calls),
                "eager_ms": lambda: self._by_events(every) / len(calls),
            }
        self._clocks[name] = clocks
        self.samples[name] = {column: [clock()] for column, clock in clocks.items()}

    def run(self, rounds: int) -> None:
        """Take samples in turn until each contestant has one of each of `rounds`."""
        for _ in range(rounds - 1):
            for name, clocks in self._clocks.items():
                for column, clock in clocks.items():
                    self.samples[name][column].append(clock())

    def entries(self, name: str) -> Row:
        """Return a row's entries: medians of a call in ms, and all samples."""
        found: Row = {}
        for column, samples in self.samples[name].items():
            found |= {column: statistics.median(samples), f"{column}_samples": list(samples)}
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

    def _by_host(self, run: Call) -> float:
        """Return the milliseconds of a run by the host's clock, from an idle device to an idle one."""
        synchronize(self.device)
        begin = time.perf_counter()
        run()
        synchronize(self.device)
        return 1000 * (time.perf_counter() - begin)


def keep_freed_memory() -> None:
    """Let this process keep freed memory for the next use, for tensors of up to 32 MiB, as the middle of a step has it.

    Otherwise an op that is alone in a loop gets its memory page by page at every call, which takes most of its time.
    """
    if platform.system() == "Linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
