"""The fusion settings of runs, and what to call them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

from famba.fusion import Fusion
from famba.fusion import labels as label_each
from famba.fusion.schedules import NONE, strategy_names


def order_of(fusion: Fusion) -> tuple[int, tuple[str, ...]]:
    """Return a key that sorts strategies as the paper lists them, and the others behind them."""
    return strategy_names().index(fusion.strategy), tuple(fusion.texts().values())


def usual(settings: Collection[Fusion]) -> dict[str, str]:
    """Return what holds where a label says nothing else: the default where any has it, else what most have."""
    found = {}
    default = Fusion().texts() | {"budget": ""}
    fusing = [setting.texts() for setting in settings if setting.strategy != NONE]
    for name in fusing[0] if fusing else ():
        # Counts for each layer are no budget that others could share.
        counts = Counter(texts[name] for texts in fusing if name != "budget" or texts[name].isdecimal())
        if not counts:
            continue
        most = min(counts, key=lambda value: (-counts[value], value))
        found[name] = default[name] if default[name] in counts else most
    return {name: value for name, value in found.items() if value}


def labels(settings: Iterable[Fusion]) -> dict[Fusion, str]:
    """Return a label for each setting: its strategy, and what tells it from the others of the report."""
    settings = list(dict.fromkeys(settings))
    return dict(zip(settings, label_each(settings, usual(settings)), strict=True))
