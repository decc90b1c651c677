"""Which runs may stand in one table, and what is different about the others.

Runs of a model are compared where they share data, recipe, precision and code, whatever their fusion and seed. Time,
throughput and memory are compared where they share the machine as well: a run from elsewhere counts for accuracy alone.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from famba.analysis.report.runs import LeftOut, Run, printable
from famba.analysis.report.settings import labels
from famba.data import PUBLISHED
from famba.fusion import Fusion
from famba.fusion.schedules import NONE

_MODEL = ("model.name", "model.patch_size", "model.depth", "model.embed_dim", "model.d_state", "model.cls_position")
# What a run was told of where and how fast to compute, as far as it does not change what is learnt.
_PLACE = (
    "trainer.compile",
    "trainer.cuda_graphs",
    "trainer.grad_checkpointing",
    "trainer.accumulation",
    "data.workers",
)
# What has no bearing on results, or is known in another way: from the summary, where "auto" has become something.
_IGNORED = (
    "fusion.",
    "logger.",
    "seed",
    "run_dir",
    "resume",
    "trainer.device",
    "trainer.log_every",
    "trainer.eval_every",
    "trainer.save_every_min",
    "trainer.precision",
    "data.image_size",
    "ops.backend",
)
# Data sets whose images are the same wherever they lie.
_DIRTY = "-dirty"
_SHOWN = 80

Identity = Mapping[str, Any]


@dataclass(frozen=True)
class Comparable:
    """The runs of a model that stand in one table.

    what: what they share, by key. place: the machine that times and memory are of. elsewhere: those of the runs that
    come from another one. remarks: those, and what differs.
    """

    model: str
    runs: tuple[Run, ...]
    what: Identity
    place: Identity
    elsewhere: frozenset[str]
    remarks: tuple[LeftOut, ...]


def sort_out(runs: Sequence[Run]) -> tuple[list[Comparable], list[LeftOut]]:
    """For each model the largest group of runs that may be compared, and the runs that may not, with what differs."""
    spread = Counter(_frozen(what_of(run)) for run in runs)
    by_model: dict[Hashable, list[Run]] = defaultdict(list)
    for run in runs:
        by_model[_model_of(run)].append(run)
    names = _model_names(by_model)
    tables, others = [], []
    for model in sorted(by_model, key=lambda key: (min(run.parameters or 0 for run in by_model[key]), names[key])):
        table, left = _largest(names[model], by_model[model], spread)
        tables.append(table)
        others += left
    return tables, others


def what_of(run: Run) -> dict[str, Any]:
    """Return all that a run has to share with another to be averaged or compared with it."""
    config = {key: value for key, value in run.config.items() if _counts(key, run)}
    return {
        **config,
        **_initial_weights(run),
        "image size": run.image_size,
        "precision": run.precision,
        "steps": run.steps,
        "parameters": run.parameters,
        "layers": len(run.schedule),
        "tokens": run.tokens,
        "famba version": run.provenance.get("famba"),
        "git commit": run.provenance.get("git_commit"),
    }


def _initial_weights(run: Run) -> dict[str, Any]:
    """What a run began with, by what the weights are: not by their path, where others may lie by now."""
    digest = run.started_from.get("weights_sha256")
    if digest is None:
        return {}
    head = ", a new classifier" if run.started_from.get("new_classifier") else ""
    return {"init_from": printable(f"weights of SHA-256 {str(digest)[:16]}{head}")}


def place_of(run: Run) -> dict[str, Any]:
    """Return all that a run has to share with another for their times and memory to be compared."""
    packages = run.provenance.get("packages")
    return {
        "device": run.provenance.get("device"),
        "processes": run.provenance.get("processes"),
        "backend": run.provenance.get("backend"),
        "CUDA": run.provenance.get("cuda"),
        **{key: run.config.get(key) for key in _PLACE},
        **(packages if isinstance(packages, Mapping) else {}),
    }


def differences(table: Identity, run: Identity) -> tuple[str, ...]:
    """Return a line for each key in which a run differs from what a table's runs share."""
    lines = []
    for key in sorted(table.keys() | run.keys()):
        here, there = run.get(key), table.get(key)
        if here != there:
            lines.append(printable(f"{key}: {_shown(here)}, in the table {_shown(there)}{_why(key, here, there)}"))
    return tuple(lines)


def is_dirty(commit: object) -> bool:
    """Whether a commit stands for code with changes that nobody recorded."""
    return isinstance(commit, str) and commit.endswith(_DIRTY)


def _counts(key: str, run: Run) -> bool:
    if key.startswith(_IGNORED) or key in _MODEL or key in _PLACE:
        return False
    return key != "data.root" or run.config.get("data.name") not in PUBLISHED


def _largest(name: str, runs: Sequence[Run], spread: Counter[Hashable]) -> tuple[Comparable, list[LeftOut]]:
    groups: dict[Hashable, list[Run]] = defaultdict(list)
    for run in runs:
        groups[_frozen(what_of(run))].append(run)

    def size(group: Hashable) -> tuple[int, int, bool, str]:
        members = groups[group]
        trials = {(run.fusion, run.seed) for run in members}
        with_none = any(run.strategy == NONE for run in members)
        return len(trials), spread[group], with_none, max(run.started for run in members)

    chosen = groups[max(groups, key=size)]
    what = what_of(chosen[0])
    taken = {run.name for run in chosen}
    others = [
        LeftOut(run.name, "other recipe, data or code", differences(what, what_of(run)))
        for run in runs
        if run.name not in taken
    ]
    place = _most_common([place_of(run) for run in chosen], chosen)
    chosen, repeated = _each_once(chosen, place)
    elsewhere = [
        LeftOut(run.name, "elsewhere", differences(place, place_of(run))) for run in chosen if place_of(run) != place
    ]
    table = Comparable(name, tuple(chosen), what, place, frozenset(run.name for run in elsewhere), tuple(elsewhere))
    return table, [*others, *repeated]


def _most_common(places: Sequence[dict[str, Any]], runs: Sequence[Run]) -> dict[str, Any]:
    """The place of most runs; of several such, one that has a run without fusion, then that of the latest run."""
    counts = Counter(map(_frozen, places))
    with_none = {_frozen(place) for place, run in zip(places, runs, strict=True) if run.strategy == NONE}
    best = max(
        range(len(runs)),
        key=lambda i: (counts[_frozen(places[i])], _frozen(places[i]) in with_none, runs[i].started),
    )
    return places[best]


def _each_once(runs: Sequence[Run], place: Identity) -> tuple[list[Run], list[LeftOut]]:
    """Each setting and seed once.

    Repeats that came to the same result are one trial, of which the first counts. Where the results differ none does:
    whichever one took would be a choice, and their mean would pass two draws off as one seed.
    """
    names = labels(run.fusion for run in runs)
    trials: dict[tuple[Fusion, int], list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: (place_of(run) != place, run.started, run.name)):
        trials[run.fusion, run.seed].append(run)
    once: list[Run] = []
    others: list[LeftOut] = []
    for (fusion, seed), same in trials.items():
        first = same[0]
        trial = f"seed {seed} of {names[fusion]}"
        if len({(run.top1, run.top5, run.schedule) for run in same}) == 1:
            once.append(first)
            reason = f"{trial}, with the same result as {first.name}, which counts"
            others += [LeftOut(run.name, "repeated", (reason,)) for run in same[1:]]
            continue
        for run in same:
            rest = ", ".join(f"{other.name} ({other.top1:.2f} %)" for other in same if other is not run)
            reason = f"{trial} ({run.top1:.2f} %) was trained again, with another result: {rest}; none of them counts"
            others.append(LeftOut(run.name, "repeated", (reason,)))
    return sorted(once, key=lambda run: run.name), others


def _model_of(run: Run) -> tuple[Hashable, ...]:
    return (run.model, *(_frozen(run.config.get(key)) for key in _MODEL[1:]))


def _model_names(models: Iterable[Hashable]) -> dict[Hashable, str]:
    """The name of each model, and what tells it from others of that name."""
    listed: list[Any] = list(models)
    names: dict[Hashable, str] = {}
    for model in listed:
        same = [other for other in listed if other[0] == model[0]]
        differs = [i for i in range(1, len(model)) if len({other[i] for other in same}) > 1]
        told = [f"{_MODEL[i].removeprefix('model.')} {_default(model[i])}" for i in differs]
        names[model] = ", ".join([model[0], *told])
    return names


def _default(value: object) -> object:
    return "as registered" if value is None else value


def _why(key: str, here: object, there: object) -> str:
    if key != "git commit":
        return ""
    if is_dirty(here) != is_dirty(there):
        return f" ({_DIRTY.removeprefix('-')}: with changes that were not committed, which is other code too)"
    return " (other code)"


def _shown(value: object) -> str:
    text = "not known" if value is None else str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _frozen(value: Any) -> Hashable:
    """Return a hashable stand-in for plain values, the same for equal ones."""
    if isinstance(value, Mapping):
        return tuple(sorted((str(key), _frozen(entry)) for key, entry in value.items()))
    if isinstance(value, list | tuple):
        return tuple(map(_frozen, value))
    return value if isinstance(value, Hashable) else repr(value)
