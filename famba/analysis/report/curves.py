"""Learning curves and tokens per layer over seeds: a mean and the range from the lowest to the highest seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from famba.analysis.report.rows import Row, Table
from famba.analysis.report.runs import IMAGES, Run

Values = NDArray[np.float64]
# A running mean over a twelfth of the logged steps.
_SMOOTH = 12


class Curve(NamedTuple):
    """Mean, lowest and highest over seeds at places x; all of one length."""

    x: Values
    mean: Values
    low: Values
    high: Values


def evaluated_on(table: Table) -> str:
    """Return which images most epochs of a table were evaluated on, "test" or "validation"."""
    counts = [sum(len(run.evaluations.get(images, ())) for row in table.rows for run in row.runs) for images in IMAGES]
    return IMAGES[int(np.argmax(counts))]


def accuracy(row: Row, images: str) -> Curve | None:
    """Top-1 in percent over the epochs that all seeds have; None where there is none."""
    return _over_seeds([dict(run.evaluations.get(images, ())) for run in row.runs])


def loss(row: Row) -> Curve | None:
    """Training loss over steps, each seed smoothed by a running mean first; None where there is none."""
    return _over_seeds([_smoothed(run) for run in row.runs])


def tokens(row: Row) -> Curve:
    """Tokens after each layer, and at 0 those that enter the first."""
    return _stacked(
        np.arange(len(row.runs[0].tokens_per_layer) + 1.0),
        [(run.tokens, *run.tokens_per_layer) for run in row.runs],
    )


def smoothing(table: Table) -> int:
    """How many logged steps a point of the loss is the mean of, at most."""
    return max((_window(len(run.losses)) for row in table.rows for run in row.runs), default=1)


def _over_seeds(curves: Sequence[dict[int, float]]) -> Curve | None:
    known = [curve for curve in curves if curve]
    if not known:
        return None
    shared = sorted(set.intersection(*(set(curve) for curve in known)))
    if not shared:
        return None
    return _stacked(np.array(shared, dtype=float), [[curve[x] for x in shared] for curve in known])


def _stacked(x: Values, lines: Sequence[Sequence[float]]) -> Curve:
    values = np.array(lines, dtype=float)
    return Curve(x, values.mean(axis=0), values.min(axis=0), values.max(axis=0))


def _smoothed(run: Run) -> dict[int, float]:
    if not run.losses:
        return {}
    steps, losses = zip(*run.losses, strict=True)
    half = _window(len(losses)) // 2
    sums = np.concatenate([[0.0], np.cumsum(losses)])
    places = np.arange(len(losses))
    first, last = np.maximum(places - half, 0), np.minimum(places + half + 1, len(losses))
    means = (sums[last] - sums[first]) / (last - first)
    return dict(zip(steps, means.tolist(), strict=True))


def _window(points: int) -> int:
    """An odd number of points."""
    return 2 * (points // _SMOOTH // 2) + 1
