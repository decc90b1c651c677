"""What follows from a table, and what does not: sentences worked out from its numbers."""

from __future__ import annotations

from collections.abc import Sequence

from famba.analysis.report.cells import difference, share
from famba.analysis.report.rows import TIME, Row, Table, pareto, share_of
from famba.analysis.report.settings import order_of
from famba.analysis.report.statistics import Difference, paired
from famba.fusion.schedules import ADAPTIVE, NONE


def conclusions(table: Table) -> list[str]:
    """Sentences on the best trade-off, and on whether an adaptive schedule is better than fixed ones."""
    return [*_trade_off(table), *_adaptive(table)]


def _trade_off(table: Table) -> list[str]:
    front = pareto(table.rows, TIME)
    timed = [row for row in table.rows if row.time_s and not row.is_elsewhere]
    if len(timed) < 2:
        return ["Best trade-off: not to be told, since fewer than two settings were timed on one machine."]
    found = [_front(front, len(timed))]
    if table.base is None or table.base not in timed:
        return [*found, "There is no timed run without fusion, so nothing is said of what fusing costs or saves."]
    fused = [row for row in front if row.fusion.strategy != NONE]
    return [*found, _best(fused)]


def _front(front: Sequence[Row], timed: int) -> str:
    better = "in no more time by the means, and better in one of both beyond chance"
    if len(front) == timed:
        return (
            f"No Pareto front is to be told: of the {timed} timed settings none is shown to be at least as accurate as "
            f"another {better}."
        )
    return (
        f"On the Pareto front of Top-1 against training time: {_listed([_name(row) for row in front])}. Each other of "
        f"the {timed} timed settings is beaten: another is at least as accurate {better}."
    )


def _best(fused: Sequence[Row]) -> str:
    if not fused:
        return "Best trade-off: no fusing at all. No fusing setting is on the front."
    told = [(row, row.difference) for row in fused if row.difference and row.difference.low is not None]
    if not told:
        return (
            "Best trade-off: not to be told. With fewer than two seeds that none has too there is no interval, and a "
            "difference may be chance."
        )
    faster = [(row, diff) for row, diff in told if row.time_difference and row.time_difference.is_lower]
    kept = [(row, diff) for row, diff in faster if not diff.is_lower]
    gained = [(row, diff) for row, diff in told if diff.is_higher]
    if kept:
        row, diff = max(kept, key=lambda pair: pair[0].top1.mean)  # as the paper chooses
        quicker = kept[: kept.index((row, diff))]
        others = "; ".join(f"{_name(o)} {difference(d)}, in {share(o.time_share)} of the time" for o, d in quicker)
        return (
            f"Best trade-off, the most accurate of those on the front that are faster than none and not shown to be "
            f"less accurate: {_name(row)}, in {share(row.time_share)} of the time of none. {_loss(diff)}"
            + (f" Faster still, and not shown to be less accurate than none either: {others}." if others else "")
        )
    if gained:
        row, diff = gained[0]
        return (
            f"Best trade-off: {_name(row)}, more accurate than none by {difference(diff)} points; "
            "that it is faster is not shown."
        )
    if faster:
        row, diff = min(faster, key=lambda pair: -pair[1].mean / (1 - (pair[0].time_share or 0)))
        saved = 100 * (1 - (row.time_share or 0))
        return (
            f"Best trade-off: every faster setting on the front loses Top-1 against none; {_name(row)} loses the least "
            f"for the time it saves, by the means: {difference(diff)} points for {saved:.0f} % of the time."
        )
    return "Best trade-off: not to be told. No fusing setting that is not beaten is shown to be faster than none."


def _loss(diff: Difference) -> str:
    if diff.is_higher:
        return f"It is more accurate than none: by {difference(diff)} points."
    assert diff.low is not None
    return (
        f"A loss of Top-1 is not shown: {difference(diff)} points over {len(diff.seeds)} seeds, so a loss of up to "
        f"{-diff.low:.2f} points cannot be ruled out."
    )


def _adaptive(table: Table) -> list[str]:
    found = []
    for row in table.rows:
        if row.fusion.strategy != ADAPTIVE:
            continue
        rivals = [
            other
            for other in sorted(table.rows, key=lambda other: order_of(other.fusion))
            if other.fusion.strategy not in (NONE, ADAPTIVE)
            and (other.fusion.settings(), other.fusion.removed) == (row.fusion.settings(), row.fusion.removed)
        ]
        found.append(_against(row, rivals))
    return found


def _against(row: Row, rivals: Sequence[Row]) -> str:
    compared = [(rival, diff) for rival in rivals if (diff := paired(row.by_seed(), rival.by_seed())) is not None]
    if not compared:
        return (
            f"Whether {_name(row)} is better than fixed schedules is not to be told: none here shares its settings and "
            "seeds."
        )
    listed = "; ".join(f"{_name(rival)} {difference(diff)}{_time(row, rival)}" for rival, diff in compared)
    numbers = f"Its Top-1 minus theirs, in points: {listed}."
    if all(diff.low is None for _, diff in compared):
        return (
            f"Whether {_name(row)} is better than fixed schedules is not to be told from one seed: there is no "
            f"interval. {numbers}"
        )
    better = [_name(rival) for rival, diff in compared if diff.is_higher]
    worse = [_name(rival) for rival, diff in compared if diff.is_lower]
    unclear = [_name(rival) for rival, diff in compared if not (diff.is_higher or diff.is_lower)]
    if len(better) == len(compared):
        verdict = f"{_name(row)} is more accurate than {_all_of(better)}."
    else:
        parts = [f"more accurate than {_listed(better)}"] if better else []
        parts += [f"less accurate than {_listed(worse)}"] if worse else []
        parts += [f"not shown to differ from {_listed(unclear)}"] if unclear else []
        verdict = f"{_name(row)} is not better than all of the fixed schedules in Top-1: it is {', '.join(parts)}."
    return f"{verdict} {numbers}"


def _all_of(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"all {len(names)} fixed schedules here: {_listed(names)}"


def _time(row: Row, rival: Row) -> str:
    if row.is_elsewhere or rival.is_elsewhere:
        return ""
    share = share_of(row.cost_by_seed(TIME), rival.cost_by_seed(TIME))
    return "" if share is None else f", in {share:.3f} of its time"


def _name(row: Row) -> str:
    """The label as it stands in a sentence, where commas part the settings."""
    strategy, _, rest = row.label.partition(", ")
    return f"{strategy} ({rest})" if rest else strategy


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
