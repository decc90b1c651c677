"""The ways of fusing that a command compares on one trained network: strategies, budgets, and how tokens fuse."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass

from famba.errors import ConfigError, near_miss
from famba.fusion import schedule, tokens_per_layer
from famba.fusion.matching import ORDERS
from famba.fusion.schedules import ADAPTIVE, PAPER, Budget, strategy_names
from famba.models.vim import PLACES, WEIGHTINGS, Vim, VimBlock, check_choice
from famba.training.naming import naming
from famba.training.trained import Trained

USUAL_BUDGET = 6 / 7
"""Share of the patches, as `configs/fusion` has it: for weights that come without a configuration."""
_OPTIONS = {"strategy": "--fusion", "budget": "--budget", "counts": "--budget", "layers": "--layers"}
_WAYS = ("order", "weighting", "place")
_COUNTED, _LISTED = ("lower", "upper"), "custom"


@dataclass(frozen=True)
class Variant:
    """One way of fusing: tokens to remove in each layer, and order, weighting and place as `famba.models.Vim` has them.

    own: whether it is the one that the network was trained with.
    """

    strategy: str
    schedule: tuple[int, ...]
    order: str
    weighting: str
    place: str
    own: bool

    @property
    def removed(self) -> int:
        """Tokens removed by all layers together."""
        return sum(self.schedule)

    def tokens_per_layer(self, model: Vim) -> tuple[int, ...]:
        """Tokens left after each layer, a class token included."""
        return tokens_per_layer(self.schedule, model.num_tokens)

    def put_into(self, model: Vim) -> None:
        """Let a network fuse this way."""
        model.set_fusion(self.schedule, self.order, self.weighting, self.place)


@dataclass(frozen=True)
class Choice:
    """What was asked for, each None where it was not: names, budgets, layers for those strategies that take some."""

    strategies: Sequence[str] | None = None
    budgets: Sequence[Budget] | None = None
    layers: Sequence[int] | None = None
    order: str | None = None
    weighting: str | None = None
    place: str | None = None

    @classmethod
    def of(cls, options: argparse.Namespace) -> Choice:
        """Read the options that `add_fusion_options` adds. Raises ConfigError for what cannot be read."""
        budgets = None if options.budget is None else [_budget(text) for text in _items(options.budget, "--budget")]
        layers = None if options.layers is None else [_layer(text) for text in _items(options.layers, "--layers")]
        strategies = None if options.fusion is None else _items(options.fusion, "--fusion")
        for name in strategies or ():
            if name not in strategy_names():
                raise ConfigError(
                    f"--fusion: unknown strategy {name!r}{near_miss(name, strategy_names())}; "
                    f"allowed: {', '.join(strategy_names())}"
                )
        for name, value, allowed in (
            ("--order", options.order, ORDERS),
            ("--weighting", options.weighting, WEIGHTINGS),
            ("--place", options.place, PLACES),
        ):
            if value is not None:
                check_choice(name, value, allowed)
        return cls(strategies, budgets, layers, options.order, options.weighting, options.place)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was asked for."""
        return self == Choice()


def own(trained: Trained) -> Variant:
    """The way of fusing that a network was trained with."""
    first = trained.model.layers[0]
    assert isinstance(first, VimBlock)
    fusion = first.fusion
    weighting = "size" if fusion.by_size else "mean"
    return Variant(trained.strategy, trained.schedule, fusion.order, weighting, fusion.place, own=True)


def variants(trained: Trained, choice: Choice) -> list[Variant]:
    """Work out what was asked for, in its order and each once; nothing asked for is nothing.

    The network's own strategy without a budget is its own schedule, whatever it came from.

    Raises:
        ConfigError: with the option at fault, where something does not fit the network.
    """
    if choice.is_empty:
        return []
    mine = own(trained)
    _check_layers(trained, choice)
    found = []
    for strategy in choice.strategies or [trained.strategy]:
        for counts in _schedules(trained, choice, strategy):
            way = (choice.order or mine.order, choice.weighting or mine.weighting, choice.place or mine.place)
            as_trained = (counts, *way) == (mine.schedule, mine.order, mine.weighting, mine.place)
            found.append(Variant(strategy, counts, *way, own=as_trained and strategy == trained.strategy))
    return list(dict.fromkeys(found))


def labels(compared: Sequence[Variant]) -> list[str]:
    """Name each variant: its strategy, and what of order, weighting and place others that are compared have not."""
    return [
        ", ".join([one.strategy, *filter(None, (_differing(one, compared, field) for field in _WAYS))])
        for one in compared
    ]


def add_fusion_options(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the options that `Choice.of` reads; `default` says what holds without them."""
    names = ", ".join(name for name in strategy_names() if name != ADAPTIVE)
    group = parser.add_argument_group("fusion", f"{default}; fusion needs no training to be applied")
    group.add_argument("--fusion", metavar="NAME[,NAME...]", help=f"strategies: {names}; or that of the training")
    group.add_argument(
        "--budget",
        metavar="B[,B...]",
        help="tokens to remove, or a share of the patches between 0 and 1, as fusion.budget (default: the run's own)",
    )
    group.add_argument(
        "--layers", metavar="N[,N...]", help="how many layers fuse in lower and upper; which, counted from 0, in custom"
    )
    group.add_argument("--order", metavar="NAME", help=f"{' or '.join(ORDERS)} (default: as trained)")
    group.add_argument("--weighting", metavar="NAME", help=f"{' or '.join(WEIGHTINGS)} (default: as trained)")
    group.add_argument("--place", metavar="NAME", help=f"{' or '.join(PLACES)} (default: as trained)")


def _differing(one: Variant, compared: Sequence[Variant], field: str) -> str:
    """What a variant has in a field where others that are compared have another."""
    value: str = getattr(one, field)
    differs = any(getattr(other, field) != value for other in compared)
    return value.replace("_", " ") if differs else ""


def _schedules(trained: Trained, choice: Choice, strategy: str) -> list[tuple[int, ...]]:
    is_own = strategy == trained.strategy
    if is_own and choice.budgets is None and choice.layers is None:
        return [trained.schedule]
    if strategy == ADAPTIVE:
        raise ConfigError(
            "--fusion adaptive is no fixed schedule: training measures it. "
            + ("Its own is evaluated without --budget and --layers" if is_own else "Name another strategy")
        )
    if is_own and strategy == "none" and choice.strategies is None:
        raise ConfigError("the network was trained without fusion: name a strategy for the budget, by --fusion")
    model = trained.model
    depth, tokens, protected = len(model.layers), model.num_tokens, model.num_tokens - model.num_patches
    layers = _layers_for(strategy, trained, choice)
    with naming(_OPTIONS):
        budgets = [_usual_budget(trained)] if choice.budgets is None else choice.budgets
        return [schedule(strategy, depth, tokens, budget, layers, protected) for budget in budgets]


def _layers_for(strategy: str, trained: Trained, choice: Choice) -> int | Sequence[int] | None:
    if strategy == _LISTED:
        return choice.layers
    if strategy in _COUNTED:
        if choice.layers is not None:
            return choice.layers[0]
        config = trained.config
        return config.fusion.layers if config is not None and config.fusion.strategy == strategy else None
    return None


def _check_layers(trained: Trained, choice: Choice) -> None:
    if choice.layers is None:
        return
    named = choice.strategies or [trained.strategy]
    if not {*_COUNTED, _LISTED} & set(named):
        raise ConfigError(f"--layers: {', '.join(named)} take none; lower and upper take how many, custom which")
    if len(choice.layers) > 1 and _LISTED not in named:
        raise ConfigError(f"--layers names {len(choice.layers)} layers; lower and upper take one number, how many fuse")
    if len(choice.layers) > 1 and set(_COUNTED) & set(named):
        raise ConfigError("--layers cannot list layers for custom and count them for lower and upper at once")


def _usual_budget(trained: Trained) -> Budget:
    """The run's own budget; a list of counts is good for one strategy alone, its sum for all."""
    budget: Budget = USUAL_BUDGET if trained.config is None else trained.config.fusion.budget
    if isinstance(budget, list) or (trained.config is None and any(trained.schedule)):
        return sum(trained.schedule)
    return budget


def _items(text: str, option: str) -> list[str]:
    items = [item.strip() for item in text.split(",")]
    if not all(items):
        raise ConfigError(f"{option} is {text!r}; allowed: one value, or several with commas between them")
    return items


def _budget(text: str) -> Budget:
    if text == PAPER or re.fullmatch(r"\d{1,9}", text):
        return text if text == PAPER else int(text)
    try:
        return float(text)
    except ValueError:
        raise ConfigError(
            f"--budget holds {text!r}; allowed: tokens in total, a share of the patches (between 0 and 1), or paper"
        ) from None


def _layer(text: str) -> int:
    if not re.fullmatch(r"\d{1,4}", text):
        raise ConfigError(f"--layers holds {text!r}; allowed: whole numbers")
    return int(text)
