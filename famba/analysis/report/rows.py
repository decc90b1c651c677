"""The rows of a table: a fusion setting each, over its seeds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from famba.analysis.report.comparable import Comparable, place_of
from famba.analysis.report.paper import Printed, printed
from famba.analysis.report.runs import Run
from famba.analysis.report.settings import labels, order_of
from famba.analysis.report.statistics import Difference, Sample, paired, sample
from famba.fusion import Fusion
from famba.fusion.schedules import NONE


class Cost(NamedTuple):
    """What a run costs, None where that is not known; is_exact where it is worked out, and so no matter of chance."""

    of: Callable[[Run], float | None]
    is_exact: bool = False


TIME = Cost(lambda run: run.train_time_s)
MEMORY = Cost(lambda run: run.peak_memory_mib)
SAVED = Cost(lambda run: run.saved_bytes_per_image, is_exact=True)


@dataclass(frozen=True)
class Row:
    """A fusion setting over its seeds; None where nothing is known.

    difference and time_difference are to the runs without fusion, in points of Top-1 and in seconds. Time, throughput
    and memory are of the timed ones of the runs: those of the table's machine, where is_elsewhere of one other. Shares
    are of the runs without fusion, over the seeds that both have; that of token_layers is of as many tokens in each
    layer as enter the first. tokens_left are those after the last layer.
    """

    label: str
    fusion: Fusion
    runs: tuple[Run, ...]
    timed: tuple[Run, ...]
    is_elsewhere: bool
    top1: Sample
    top5: Sample | None
    difference: Difference | None
    time_s: Sample | None
    time_share: float | None
    time_difference: Difference | None
    memory_mib: Sample | None
    memory_share: float | None
    saved_bytes: Sample | None
    saved_share: float | None
    images_per_s: Sample | None
    macs: Sample | None
    parameters: Sample | None
    tokens: int
    tokens_left: Sample
    token_layers: float
    printed: Printed

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of the row, in order."""
        return tuple(sorted(run.seed for run in self.runs))

    def by_seed(self) -> dict[int, float]:
        """Top-1 by seed, in percent."""
        return {run.seed: run.top1 for run in self.runs}

    def cost(self, cost: Cost) -> Sample | None:
        """A cost over the seeds that were timed."""
        return sample(map(cost.of, self.timed))

    def cost_by_seed(self, cost: Cost) -> dict[int, float]:
        """A cost by seed, of those that were timed."""
        return _by_seed(cost, self.timed)


@dataclass(frozen=True)
class Table:
    """All settings of a model that may be compared."""

    comparable: Comparable
    rows: tuple[Row, ...]

    @property
    def model(self) -> str:
        """What the model is called in this report."""
        return self.comparable.model

    @property
    def base(self) -> Row | None:
        """The row without fusion; None where the table has none."""
        return next((row for row in self.rows if row.fusion.strategy == NONE), None)


def build_table(comparable: Comparable) -> Table:
    """Gather runs, at least one, into rows by fusion setting."""
    settings: dict[Fusion, list[Run]] = defaultdict(list)
    for run in comparable.runs:
        settings[run.fusion].append(run)
    names = labels(settings)
    base = next((runs for fusion, runs in settings.items() if fusion.strategy == NONE), [])
    order = sorted(settings, key=order_of)
    rows = [_row(names[fusion], fusion, settings[fusion], base, comparable.elsewhere) for fusion in order]
    return Table(comparable, tuple(rows))


def pareto(rows: Iterable[Row], cost: Cost) -> list[Row]:
    """Rows that no other beats, cheapest first; of known cost on the table's machine only."""
    known = [(found.mean, row) for row in rows if not row.is_elsewhere and (found := row.cost(cost)) is not None]

    def is_beaten(own: float, row: Row) -> bool:
        return any(other <= own and _beats(rival, row, cost) for other, rival in known)

    front = [(own, row) for own, row in known if not is_beaten(own, row)]
    return [row for _, row in sorted(front, key=lambda pair: pair[0])]


def _beats(rival: Row, row: Row, cost: Cost) -> bool:
    """Whether a rival of no higher cost is as accurate by the mean, and better in one of both by more than chance."""
    if rival.top1.mean < row.top1.mean:
        return False
    more = paired(rival.by_seed(), row.by_seed())
    less = paired(rival.cost_by_seed(cost), row.cost_by_seed(cost))
    is_cheaper = less is not None and (less.is_lower or (cost.is_exact and less.low is None and less.mean < 0))
    return is_cheaper or (more is not None and more.is_higher)


def _row(label: str, fusion: Fusion, runs: Sequence[Run], base: Sequence[Run], elsewhere: frozenset[str]) -> Row:
    is_base = fusion.strategy == NONE
    here = [run for run in runs if run.name not in elsewhere]
    timed = here or _one_place(runs)
    base_here = [run for run in base if run.name not in elsewhere] if here else []

    def of_both(cost: Cost) -> tuple[Sample | None, float | None]:
        return sample(map(cost.of, timed)), share_of(_by_seed(cost, timed), _by_seed(cost, base_here))

    time_s, time_share = of_both(TIME)
    memory, memory_share = of_both(MEMORY)
    saved, saved_share = of_both(SAVED)
    first = runs[0]
    left = sample(run.tokens_per_layer[-1] for run in runs)
    shares = sample(sum(run.tokens_per_layer) / (run.tokens * len(run.tokens_per_layer)) for run in runs)
    top1 = sample(run.top1 for run in runs)
    assert left is not None
    assert shares is not None
    assert top1 is not None
    return Row(
        label=label,
        fusion=fusion,
        runs=tuple(sorted(runs, key=lambda run: run.seed)),
        timed=tuple(sorted(timed, key=lambda run: run.seed)),
        is_elsewhere=not here,
        top1=top1,
        top5=sample(run.top5 for run in runs),
        difference=None if is_base else paired({r.seed: r.top1 for r in runs}, {r.seed: r.top1 for r in base}),
        time_s=time_s,
        time_share=time_share,
        time_difference=None if is_base or not here else paired(_by_seed(TIME, here), _by_seed(TIME, base_here)),
        memory_mib=memory,
        memory_share=memory_share,
        saved_bytes=saved,
        saved_share=saved_share,
        images_per_s=sample(run.images_per_s for run in timed),
        macs=sample(run.macs_per_image for run in runs),
        parameters=sample(run.parameters for run in runs),
        tokens=first.tokens,
        tokens_left=left,
        token_layers=shares.mean,
        printed=printed(first),
    )


def _one_place(runs: Sequence[Run]) -> list[Run]:
    """Those of the runs that ran where most of them did."""
    places: Mapping[str, list[Run]] = defaultdict(list)
    for run in runs:
        places[repr(sorted(place_of(run).items(), key=str))].append(run)
    return max(places.values(), key=len)


def share_of(own: Mapping[int, float], base: Mapping[int, float]) -> float | None:
    """A cost as a share of another, both by seed, over the seeds that both have; None where they share none."""
    seeds = own.keys() & base.keys()
    return sum(own[seed] for seed in seeds) / sum(base[seed] for seed in seeds) if seeds else None


def _by_seed(cost: Cost, runs: Iterable[Run]) -> dict[int, float]:
    return {run.seed: found for run in runs if (found := cost.of(run)) is not None}
