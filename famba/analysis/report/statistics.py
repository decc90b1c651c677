"""Means over seeds, and differences paired by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from scipy.stats import t

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Sample:
    """Mean and sample standard deviation (n - 1 below the line) of n values; sd is None for one value."""

    mean: float
    sd: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences, and its 95 % interval by Student's t; low and high are None for one pair.

    seeds: those that both sides have. unpaired: those that one side alone has, which count for nothing here.
    """

    mean: float
    low: float | None
    high: float | None
    seeds: tuple[int, ...]
    unpaired: tuple[int, ...]

    @property
    def is_higher(self) -> bool:
        """Whether the whole interval lies above 0."""
        return self.low is not None and self.low > 0

    @property
    def is_lower(self) -> bool:
        """Whether the whole interval lies below 0."""
        return self.high is not None and self.high < 0


def sample(values: Iterable[float | None]) -> Sample | None:
    """Mean and standard deviation of the values that are known; None where none is."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Sample(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


def paired(ours: Mapping[int, float], base: Mapping[int, float]) -> Difference | None:
    """Difference of ours to the base, both by seed; None where they have no seed in common."""
    seeds = tuple(sorted(ours.keys() & base.keys()))
    if not seeds:
        return None
    unpaired = tuple(sorted(ours.keys() ^ base.keys()))
    differences = sample(ours[seed] - base[seed] for seed in seeds)
    assert differences is not None
    if differences.sd is None:
        return Difference(differences.mean, None, None, seeds, unpaired)
    half = float(t.ppf((1 + CONFIDENCE) / 2, len(seeds) - 1)) * differences.sd / math.sqrt(len(seeds))
    return Difference(differences.mean, differences.mean - half, differences.mean + half, seeds, unpaired)
