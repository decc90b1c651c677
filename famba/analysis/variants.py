"""Work out the ways of fusing that a command compares on one trained network."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from famba.analysis.options import FUSION
from famba.analysis.trained import Trained
from famba.errors import ConfigError, named
from famba.fusion import SETTINGS, Fusion, labels
from famba.fusion.schedules import ADAPTIVE, CUSTOM, NONE
from famba.models import Backbone

Asked = Mapping[str, Sequence[Any]]  # values to compare by fields of `Fusion`


@dataclass(frozen=True)
class Variant:
    """Hold one way of fusing, as it turned out in the network, so that two that come to the same are equal.

    schedule: tokens to remove in each layer. own: whether the network was trained with it.
    """

    fusion: Fusion
    schedule: tuple[int, ...]
    own: bool

    @property
    def removed(self) -> int:
        """Count the tokens removed by all layers together."""
        return sum(self.schedule)

    def put_into(self, model: Backbone) -> None:
        """Let a network fuse this way; without fusion no other setting matters."""
        model.set_fusion(self.schedule, **({} if self.fusion.strategy == NONE else self.fusion.settings()))


def own(trained: Trained) -> Variant:
    """Return the way of fusing that a network was trained with."""
    fusion = replace(trained.fusion, **trained.model.settings.settings())
    return Variant(fusion.resolved(trained.schedule), trained.schedule, own=True)


def unfused(trained: Trained) -> Variant:
    """Return the network with all of its tokens."""
    schedule = (0,) * len(trained.schedule)
    return own(trained) if trained.strategy == NONE else Variant(Fusion().resolved(schedule), schedule, own=False)


def label_variants(compared: Sequence[Variant]) -> list[str]:
    """Name each variant by its strategy and by what tells it from the others, but for its budget."""
    return labels([one.fusion for one in compared], ignore=["budget"])


def variants(trained: Trained, asked: Asked) -> list[Variant]:
    """Return what was asked for, in its order and each once: every combination of the settings.

    A network with attention that was trained without fusion attends in proportion unless asked otherwise, as ToMe does
    off the shelf. The network's own strategy without a budget is its own schedule, whatever it came from. Raises
    ConfigError, with the option at fault, where something does not fit the network.
    """
    if not asked:
        return []
    strategies = asked.get("strategy", [trained.strategy])
    if trained.strategy == NONE and "strategy" not in asked:
        raise ConfigError("the network was trained without fusion: name the strategies to fuse by, by --fusion")
    usual = _usual(trained)
    values = {name: asked.get(name, [getattr(usual, name)]) for name in (*SETTINGS, "budget")}
    found = []
    with named({name: f"--{option}" for name, option in FUSION.items()}):
        for strategy in strategies:
            for chosen in itertools.product(*values.values()) if strategy != NONE else ():
                changes = dict(zip(values, chosen, strict=True))
                if changes["mode"] == "prune":
                    # A token holds one patch or nothing, without a size: weighting and attention have no effect.
                    changes |= {name: getattr(trained.model.settings, name) for name in ("weighting", "proportional")}
                found.append(_variant(trained, replace(usual, strategy=strategy, **changes), asked))
            found += [unfused(trained)] if strategy == NONE else []
    return list(dict.fromkeys(found))


def _variant(trained: Trained, fusion: Fusion, asked: Asked) -> Variant:
    """Return one way of fusing, in the layers of the training where its strategy is that of the training."""
    model, mine, strategy = trained.model, own(trained), fusion.strategy
    model.check_fusion(fusion)
    if strategy == trained.strategy and "budget" not in asked:
        fusion = replace(mine.fusion, **fusion.settings())
        counts = fusion.fitted(trained.schedule, model.num_tokens, model.protected, model.grid_size)
    else:
        if strategy == ADAPTIVE or (strategy == CUSTOM and strategy != trained.strategy):
            raise ConfigError(
                f"--fusion {strategy} is no fixed schedule: it comes with the training. This network was trained with "
                f"{trained.strategy}; name another strategy, or leave out --budget where it was trained so"
            )
        fusion = replace(fusion, layers=trained.fusion.layers if strategy == trained.strategy else None)
        counts = model.schedule_of(fusion)
    one = Variant(fusion.resolved(counts), counts, own=True)
    return one if one == mine else replace(one, own=False)


def _usual(trained: Trained) -> Fusion:
    """Return what holds where nothing else is asked for."""
    fusion = replace(trained.fusion, layers=None, adapt_at=None, adapt_images=None, **trained.model.settings.settings())
    if trained.strategy == NONE:
        fusion = replace(fusion, proportional=trained.model.has_attention)
    if isinstance(fusion.budget, tuple):  # counts are good for one strategy alone, their sum for all
        fusion = replace(fusion, budget=sum(trained.schedule) if any(trained.schedule) else Fusion().budget)
    return fusion
