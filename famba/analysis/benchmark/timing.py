"""Contestants timed in turn, so that what else the machine does falls on all of them alike."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from tqdm import tqdm

from famba.training.devices import synchronize

K = TypeVar("K")


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


class Race(Generic[K]):
    """Contestants that take turns: a warm-up each, then round after round, each once a round in the order given."""

    def __init__(
        self,
        title: str,
        contestants: Mapping[K, Callable[[], object]],
        device: torch.device | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._title = title
        self._contestants = dict(contestants)
        self._device = device or torch.device("cpu")
        self._clock = clock
        self._samples: dict[K, list[float]] = {name: [] for name in self._contestants}

    def run(self, rounds: int) -> None:
        """Time `rounds` rounds; the progress is shown on stderr."""
        total = (rounds + 1) * len(self._contestants)
        with tqdm(total=total, desc=self._title, file=sys.stderr, leave=False, mininterval=1) as bar:
            for number in range(rounds + 1):
                for name, contestant in self._contestants.items():
                    milliseconds = self._time(contestant)
                    if number:
                        self._samples[name].append(milliseconds)
                    bar.update()

    @property
    def times(self) -> dict[K, Times]:
        """What has been measured, also after an interruption; contestants without a sample are missing."""
        return {name: Times(tuple(samples)) for name, samples in self._samples.items() if samples}

    def _time(self, contestant: Callable[[], object]) -> float:
        synchronize(self._device)
        begin = self._clock()
        contestant()
        synchronize(self._device)
        return 1000 * (self._clock() - begin)


def ratio(value: float | None, of: float | None) -> float | None:
    """How many times as much as `of`; None where either is unknown, or `of` nothing."""
    return value / of if value is not None and of else None
