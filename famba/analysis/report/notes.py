"""What a reader has to know to read the tables right."""

from __future__ import annotations

from famba.analysis.report import paper
from famba.analysis.report.comparable import is_dirty
from famba.analysis.report.rows import Row, Table
from famba.analysis.report.settings import usual
from famba.fusion.schedules import ADAPTIVE, NONE

READING = (
    "± is the sample standard deviation over seeds; a single number is of one seed.",
    "Differences are paired by seed; in brackets the 95 % interval by Student's t. Each interval stands for itself: of "
    "many, about one in twenty misses the true difference.",
    "A setting is on the Pareto front, and ringed in plots, unless another beats it: by the means it is at least as "
    "accurate at no more cost, and in one of the two better by more than chance (95 % interval of the differences "
    "paired by seed). So one seed marks no front, nor does what scatters as a process's memory on a CPU.",
    "Shares of none are quotients of means. Training time is that of data and steps, evaluation apart.",
    "Top-1 and Top-5 are of the test images after the last step.",
)
_TOLD = 6  # ways in which runs are not of the paper's setting
_SHARED = (
    ("data", "data.name"),
    ("training images", "data.subset"),
    ("held out for validation", "data.val_fraction"),
    ("image size", "image size"),
    ("epochs", "trainer.epochs"),
    ("steps", "steps"),
    ("batch size", "trainer.batch_size"),
    ("optimizer", "recipe.optimizer"),
    ("learning rate", "recipe.lr"),
    ("precision", "precision"),
    ("initial weights", "init_from"),
    ("famba", "famba version"),
    ("commit", "git commit"),
)


def shared(table: Table) -> list[tuple[str, str]]:
    """Names and values of what all runs of a table share."""
    what, place = table.comparable.what, table.comparable.place
    found = [(name, str(what.get(key))) for name, key in _SHARED if what.get(key) not in (None, 0.0)]
    settings = usual([row.fusion for row in table.rows])
    found += [
        (f"fusion.{name}, unless a row says otherwise", f"{value}{' tokens' if name == 'budget' else ''}")
        for name, value in settings.items()
        if name != "layers"
    ]
    some_elsewhere = " (but for runs from elsewhere)" if table.comparable.elsewhere else ""
    found += [
        (f"{key}{some_elsewhere if key == 'device' else ''}", str(place[key]))
        for key in ("device", "processes", "backend", "CUDA")
        if place.get(key) is not None
    ]
    return [*found, *((key, str(place[key])) for key in ("torch", "timm", "mamba-ssm") if place.get(key))]


def notes(table: Table) -> list[str]:
    """Remarks on one table, each a sentence or two."""
    found = [*_of_code(table), *_of_seeds(table), *_of_cost(table)]
    removed = sorted({row.fusion.removed for row in table.rows if row.fusion.removed})
    if len(removed) > 1:
        found.append(
            f"The settings remove different numbers of tokens in all: {', '.join(map(str, removed))}. Those that "
            "remove more save more."
        )
    found += _of_paper(table)
    found += [f"{run.name}: {gap}." for row in table.rows for run in row.runs for gap in run.gaps]
    return found


def _of_paper(table: Table) -> list[str]:
    found = []
    if any(row.printed.top1 is not None for row in table.rows):
        found.append(f"Paper: {paper.SOURCE}; empty where its figure is not known here.")
    known = [row for row in table.rows if paper.known(row.runs[0]).top1 is not None and row.printed.top1 is None]
    if known:
        differs = list(dict.fromkeys(line for row in known for line in paper.deviations(row.runs[0])))
        more = f"; and {len(differs) - _TOLD} more" if len(differs) > _TOLD else ""
        found.append(
            f"The figures of {paper.SOURCE}, are not set beside {'; '.join(row.label for row in known)}, which are of "
            f"another setting: {'; '.join(differs[:_TOLD])}{more}."
        )
    return found


def _of_code(table: Table) -> list[str]:
    commit = table.comparable.what.get("git commit")
    if is_dirty(commit):
        return [
            f"Commit {commit}: the code had changes that were not committed, so these runs may differ in code all the "
            "same."
        ]
    if commit is None:
        return ["No commit is known of these runs: that they are of the same code is known by famba's version alone."]
    return []


def _of_seeds(table: Table) -> list[str]:
    found = []
    single = [row.label for row in table.rows if len(row.runs) == 1]
    if single:
        found.append(f"One seed alone, so neither spread nor interval: {'; '.join(single)}.")
    if table.base is None:
        found.append("No run without fusion (none) is among these: differences and shares are left open.")
    unpaired: dict[str, list[str]] = {}
    for row in table.rows:
        if row.fusion.strategy == NONE or table.base is None:
            continue
        if row.difference is None:
            found.append(f"{row.label}: no seed in common with none, so no difference.")
        elif row.difference.unpaired:
            unpaired.setdefault(", ".join(map(str, row.difference.unpaired)), []).append(row.label)
    if unpaired:
        listed = "; ".join(f"{seeds} ({'; '.join(labels)})" for seeds, labels in unpaired.items())
        found.append(f"Seeds that a row and none do not share are left out of its difference: {listed}.")
    return found


def _of_cost(table: Table) -> list[str]:
    found = []
    place = table.comparable.place
    if place.get("CUDA") is None:
        found.append(
            "On a CPU peak memory is all that the process keeps resident, libraries and data for the most part; the "
            "bytes saved for the backward show what fusing saves."
        )
    moved = [row.label for row in table.rows if row.is_elsewhere]
    if moved:
        found.append(
            f"* timed on another machine than the rest, so without shares and not in the plots of cost: "
            f"{'; '.join(moved)}."
        )
    partly = [row for row in table.rows if not row.is_elsewhere and len(row.timed) < len(row.runs)]
    if partly:
        listed = "; ".join(f"{row.label} {len(row.timed)} of {len(row.runs)}" for row in partly)
        found.append(f"Time, throughput and memory are of the runs on the machine of most alone: {listed}.")
    fewer = [row for row in table.rows if _timed(row) < len(row.timed)]
    if fewer:
        listed = "; ".join(f"{row.label} {_timed(row)} of {len(row.timed)}" for row in fewer)
        found.append(f"Training time is not known of every run: {listed}.")
    if any(row.fusion.strategy == ADAPTIVE for row in table.rows):
        found.append(
            "An adaptive schedule changes while it trains: FLOPs, saved bytes and tokens are of its last one, the mean "
            "over seeds; time is of all of them."
        )
    return found


def _timed(row: Row) -> int:
    return 0 if row.time_s is None else row.time_s.n
