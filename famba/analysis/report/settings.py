"""The fusion settings of runs, and what to call them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from famba.analysis.report.runs import Run
from famba.fusion.schedules import ADAPTIVE

NONE = "none"
STRATEGIES = (NONE, "all", "interleaved", "lower", "upper", "decreasing", ADAPTIVE, "custom")
_USUAL = {"order": "sequence", "weighting": "mean", "place": "before_mixer", "mode": "fuse", "layers": "None"}
_TOLD = ("order", "weighting", "place", "mode", "proportional", "budget", "layers")
_TOLD_WHERE_ALIKE = ("adapt_at", "adapt_images", "schedule")


@dataclass(frozen=True, order=True)
class Fusion:
    """What fuses where, as texts; budget is the tokens that are removed in all, schedule those of each layer.

    An adaptive schedule is a result, so it is no setting; without fusion nothing but the strategy is one. What layers
    were asked for does not count beside the schedule that came of it.
    """

    strategy: str
    order: str = ""
    weighting: str = ""
    place: str = ""
    budget: str = ""
    layers: str = field(default="", compare=False)
    adapt_at: str = ""
    adapt_images: str = ""
    schedule: str = ""
    mode: str = ""
    proportional: str = ""


def fusion_of(run: Run) -> Fusion:
    """Return the fusion setting of a run."""
    if run.strategy == NONE:
        return Fusion(NONE)
    adaptive = run.strategy == ADAPTIVE
    return Fusion(
        strategy=run.strategy,
        order=_value(run, "order"),
        weighting=_value(run, "weighting"),
        place=_value(run, "place"),
        budget=str(sum(run.schedule)),
        layers=_value(run, "layers"),
        adapt_at=_value(run, "adapt_at") if adaptive else "",
        adapt_images=_value(run, "adapt_images") if adaptive else "",
        schedule="" if adaptive else " ".join(map(str, run.schedule)),
        mode=_value(run, "mode"),
        proportional="True" if run.config.get("fusion.proportional") else "",
    )


def order_of(fusion: Fusion) -> tuple[int, Fusion]:
    """Return a key that sorts strategies as the paper lists them, and the others behind them."""
    place = STRATEGIES.index(fusion.strategy) if fusion.strategy in STRATEGIES else len(STRATEGIES)
    return place, fusion


def usual(settings: Collection[Fusion]) -> dict[str, str]:
    """Return what holds where a label says nothing else: the default where any has it, else what most have."""
    found = {}
    for name in _TOLD:
        counts = Counter(getattr(setting, name) for setting in settings if setting.strategy != NONE)
        if counts:
            default = _USUAL.get(name, "")
            most = min(counts, key=lambda value: (-counts[value], value))
            found[name] = default if default in counts or name == "layers" else most
    return found


def labels(settings: Iterable[Fusion]) -> dict[Fusion, str]:
    """Return a label for each setting: its strategy, and what tells it from the others of the report."""
    settings = sorted(set(settings))
    common = usual(settings)
    made = {setting: _label(setting, _unusual(setting, common)) for setting in settings}
    for label, count in Counter(made.values()).items():
        if count > 1:
            alike = [setting for setting in settings if made[setting] == label]
            differs = [name for name in _TOLD_WHERE_ALIKE if len({getattr(setting, name) for setting in alike}) > 1]
            made |= {setting: _label(setting, [*_unusual(setting, common), *differs]) for setting in alike}
    return made


def _unusual(setting: Fusion, common: Mapping[str, str]) -> list[str]:
    return [name for name in _TOLD if getattr(setting, name) not in ("", common.get(name))]


def _label(setting: Fusion, names: Iterable[str]) -> str:
    return ", ".join([setting.strategy, *(f"{name} {getattr(setting, name)}" for name in names)])


def _value(run: Run, key: str) -> str:
    value: Any = run.config.get(f"fusion.{key}")
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value)
