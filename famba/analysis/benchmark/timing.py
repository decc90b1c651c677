"""Time contestants in turn: on a CPU by the host's clock, on a GPU as CUDA graphs, as calls come, and by launches."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from famba.training.devices import synchronize
from famba.training.graph import captured

Call = Callable[[], object]
# A sample of a graph takes about so long, and holds no more replays than that.
_SAMPLE_MS, _MOST_REPLAYS = 5.0, 100
# Launches of a few calls fit into a GPU's queue, and do not make the host wait.
_QUEUED_CALLS = 8
COLUMNS = ("ms", "eager_ms", "host_ms", "kernels_ms", "launches")
NOTE = (
    "on CUDA, ms is a replay of a CUDA graph, which is the time of the kernels; eager ms lies between events around "
    "the calls as they come; host ms is what the host needs to launch a call, without waiting for it; kernels ms and "
    "launches are those of one call by torch.profiler"
)


class Race:
    """Contestants that take turns, so that whatever else the machine does falls on all of them alike."""

    def __init__(self, title: str, device: torch.device) -> None:
        self.title, self.device = title, device
        self.kernels: dict[str, dict[str, tuple[float, int]]] = {}
        """Milliseconds and launches of each kernel in one call of a contestant, on CUDA."""
        self.samples: dict[str, dict[str, list[float]]] = {}
        """Milliseconds of each contestant by column."""
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
        if self.device.type == "cuda":
            every()
            replay = graph or captured(every, self.device, None)
            replays = min(_MOST_REPLAYS, math.ceil(_SAMPLE_MS / max(self._by_events(replay), 1e-3)))
            self.kernels[name] = _kernels(calls[0], self.device)
            self._clocks[name] = {
                "ms": lambda: self._by_events(replay, replays) / len(calls),
                "eager_ms": lambda: self._by_events(every) / len(calls),
                "host_ms": lambda: self._by_host(calls[:_QUEUED_CALLS], waits=False),
            }
        else:
            self._clocks[name] = {"ms": lambda: self._by_host(calls)}
        self.samples[name] = {column: [clock()] for column, clock in self._clocks[name].items()}

    def run(self, rounds: int) -> None:
        """Take samples in turn until each contestant has one of each of `rounds`."""
        for _ in range(rounds - 1):
            for name, clocks in self._clocks.items():
                for column, clock in clocks.items():
                    self.samples[name][column].append(clock())

    def entries(self, name: str, prefix: str = "") -> dict[str, Any]:
        """Return a row's entries: medians of a call in ms, and all samples; nothing for one that has not entered."""
        found: dict[str, Any] = {}
        for column, samples in self.samples.get(name, {}).items():
            found[prefix + column], found[f"{prefix}{column}_samples"] = statistics.median(samples), list(samples)
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


def ratio(value: float | None, of: float | None) -> float | None:
    """Return how many times as much as `of` a value is; None where either is unknown, or `of` is nothing."""
    return value / of if value is not None and of else None
