"""Contestants timed in turn, so that what else the machine does falls on all of them alike."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from tqdm import tqdm

from famba.training.devices import synchronize

K = TypeVar("K")
# Calls of an event clock: those that warm up, the least time of a sample, and the most calls that it holds.
_WARM_UP_CALLS, _SAMPLE_MS, _MOST_CALLS = 3, 1.0, 100
# More than the second-level cache of any GPU so far (50 MB on an H100, 126 MB on a B200).
_OVERWRITTEN_BYTES = 2**28


@dataclass(frozen=True)
class Times:
    """How long one contestant took in each round, in milliseconds."""

    samples_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """The median, in milliseconds."""
        return statistics.median(self.samples_ms)

    @property
    def quartiles_ms(self) -> tuple[float, float]:
        """The first and the third quartile, in milliseconds."""
        if len(self.samples_ms) == 1:
            return self.samples_ms[0], self.samples_ms[0]
        first, _, third = statistics.quantiles(self.samples_ms, n=4, method="inclusive")
        return first, third

    def entries(self, key: str) -> dict[str, Any]:
        """Entries of a report's row: the median under `key`, quartiles and all samples under names that begin so."""
        return {key: self.median_ms, f"{key}_quartiles": self.quartiles_ms, f"{key}_samples": self.samples_ms}


class Clock(Protocol):
    """How a contestant is timed."""

    def warm_up(self, contestant: Callable[[], object]) -> int:
        """Call until nothing is left to compile, tune or allocate; return how many calls a sample should hold."""

    def time(self, contestant: Callable[[], object], calls: int) -> float:
        """Make so many calls; return the milliseconds that one took on average."""


class HostClock:
    """The host's clock, from an idle device to an idle device."""

    def __init__(self, device: torch.device, now: Callable[[], float] = time.perf_counter) -> None:
        self._device = device
        self._now = now

    def warm_up(self, contestant: Callable[[], object]) -> int:
        """One call; a sample is one call as well."""
        self.time(contestant, 1)
        return 1

    def time(self, contestant: Callable[[], object], calls: int) -> float:
        """Milliseconds of a call."""
        synchronize(self._device)
        begin = self._now()
        for _ in range(calls):
            contestant()
        synchronize(self._device)
        return 1000 * (self._now() - begin) / calls


class EventClock:
    """The clock of a CUDA device: events on the stream around the calls, and one wait at the end of a sample.

    Nothing waits for the host between calls, so that launches count only where they take longer than what the device
    does meanwhile, as in training.

    device: a CUDA device. before: run before each call and not timed, such as `overwriting_cache`; calls follow
    directly on one another where None. cuda: what the events come from.
    """

    def __init__(
        self, device: torch.device, before: Callable[[], object] | None = None, cuda: Any = torch.cuda
    ) -> None:
        self._device = device
        self._before = before
        self._cuda = cuda

    def warm_up(self, contestant: Callable[[], object]) -> int:
        """A few calls, in the first of which kernels are compiled and tuned; a sample takes a millisecond or more."""
        self.time(contestant, _WARM_UP_CALLS)
        milliseconds = self.time(contestant, 1)
        return min(_MOST_CALLS, max(1, math.ceil(_SAMPLE_MS / max(milliseconds, 1e-6))))

    def time(self, contestant: Callable[[], object], calls: int) -> float:
        """Milliseconds of a call on the device."""
        stream = self._cuda.current_stream(self._device)
        # With nothing between the calls one pair of events holds them all, and what lies between two calls counts.
        calls_in_a_pair = calls if self._before is None else 1
        pairs = []
        for _ in range(calls // calls_in_a_pair):
            if self._before is not None:
                self._before()
            begin, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
            begin.record(stream)
            for _ in range(calls_in_a_pair):
                contestant()
            end.record(stream)
            pairs.append((begin, end))
        self._cuda.synchronize(self._device)
        return sum(begin.elapsed_time(end) for begin, end in pairs) / calls


def overwriting_cache(device: torch.device) -> Callable[[], object]:
    """Return what overwrites a device's second-level cache, so that a call finds its inputs in memory.

    It takes a device about a tenth of a millisecond, in which the host gets ahead with launching the call.
    """
    return torch.empty(_OVERWRITTEN_BYTES, dtype=torch.int8, device=device).zero_


def cache_note(cold: bool) -> str:
    """What to know of times by an `EventClock`."""
    if cold:
        return (
            "times are between two CUDA events around each call; before it the cache is overwritten, so that inputs "
            "come from memory, and launches count only where the host needs longer for them than that takes"
        )
    return (
        "times are between CUDA events around calls that follow one another without a wait; launches count where the "
        "host needs longer for them than the device for its work, and what fits in the cache may be found there"
    )


def clock_for(device: torch.device) -> Clock:
    """Events where the device has them, else the host's clock."""
    return EventClock(device) if device.type == "cuda" else HostClock(device)


class Race(Generic[K]):
    """Contestants that take turns: a warm-up each, then round after round, each once a round in the order given.

    clock: that of the device where None.
    """

    def __init__(
        self,
        title: str,
        contestants: Mapping[K, Callable[[], object]],
        device: torch.device | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._title = title
        self._contestants = dict(contestants)
        self._clock = clock or clock_for(device or torch.device("cpu"))
        self._samples: dict[K, list[float]] = {name: [] for name in self._contestants}

    def run(self, rounds: int) -> None:
        """Time `rounds` rounds; the progress is shown on stderr."""
        total = (rounds + 1) * len(self._contestants)
        calls: dict[K, int] = {}
        with tqdm(total=total, desc=self._title, file=sys.stderr, leave=False, mininterval=1) as bar:
            for name, contestant in self._contestants.items():
                calls[name] = self._clock.warm_up(contestant)
                bar.update()
            for _ in range(rounds):
                for name, contestant in self._contestants.items():
                    self._samples[name].append(self._clock.time(contestant, calls[name]))
                    bar.update()

    @property
    def times(self) -> dict[K, Times]:
        """What has been measured, also after an interruption; contestants without a sample are missing."""
        return {name: Times(tuple(samples)) for name, samples in self._samples.items() if samples}


def ratio(value: float | None, of: float | None) -> float | None:
    """How many times as much as `of`; None where either is unknown, or `of` nothing."""
    return value / of if value is not None and of else None
