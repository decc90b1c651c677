"""The ways of fusing that a command compares on one trained network: strategies, budgets, and how tokens fuse."""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from famba.errors import ConfigError, near_miss
from famba.fusion import schedule, tokens_per_layer
from famba.fusion.matching import MODES, ORDERS
from famba.fusion.schedules import ADAPTIVE, PAPER, STRATEGIES, Budget, strategy_names
from famba.models import FusedNetwork, Vim
from famba.models.fused import check_choice
from famba.models.vim import PLACES, WEIGHTINGS
from famba.training.checks import naming
from famba.training.trained import Trained

USUAL_BUDGET = 6 / 7
"""Share of the patches, as `configs/fusion` has it: for weights that come without a configuration."""
_OPTIONS = {"strategy": "--fusion", "budget": "--budget", "counts": "--budget", "layers": "--layers"}
_PLAIN, _PROPORTIONAL = ATTENTIONS = ("plain", "proportional")
_WAYS = ("order", "weighting", "place", "mode", "attention")
_PRUNE = "prune"
_NONE, _COUNTED, _LISTED = "none", ("lower", "upper"), "custom"


@dataclass(frozen=True)
class Variant:
    """One way of fusing: tokens to remove in each layer; order, weighting, place and mode as in `famba.models.Vim`.

    attention: one of ATTENTIONS, as in `famba.models.apply_tome`; plain where there is none. among: which layers share
    the budget, in words, where the strategy leaves that open, else "". own: whether it is the one that the network was
    trained with.
    """

    strategy: str
    among: str
    schedule: tuple[int, ...]
    order: str
    weighting: str
    place: str
    mode: str
    attention: str
    own: bool

    @property
    def removed(self) -> int:
        """Tokens removed by all layers together."""
        return sum(self.schedule)

    @property
    def family(self) -> Variant:
        """What it shares with those that differ from it in their budget alone."""
        return replace(self, schedule=(), own=False)

    def tokens_per_layer(self, model: FusedNetwork) -> tuple[int, ...]:
        """Tokens left after each layer, a class token included."""
        return tokens_per_layer(self.schedule, model.num_tokens)

    def put_into(self, model: FusedNetwork) -> None:
        """Let a network fuse this way."""
        proportional = self.attention == _PROPORTIONAL
        model.set_fusion(self.schedule, self.order, self.weighting, self.place, self.mode, proportional)


@dataclass(frozen=True)
class Choice:
    """What was asked for, each None where it was not; layers are for those strategies that take some."""

    strategies: Sequence[str] | None = None
    budgets: Sequence[Budget] | None = None
    layers: Sequence[int] | None = None
    order: Sequence[str] | None = None
    weighting: Sequence[str] | None = None
    place: Sequence[str] | None = None
    mode: Sequence[str] | None = None
    attention: Sequence[str] | None = None

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
        ways: dict[str, list[str]] = {}
        for name in _WAYS:
            if (text := getattr(options, name)) is not None:
                ways[name] = _items(text, f"--{name}")
        allowed_ways = {"order": ORDERS, "weighting": WEIGHTINGS, "mode": MODES, "attention": ATTENTIONS}
        for name, allowed in allowed_ways.items():
            for value in ways.get(name, []):
                check_choice(f"--{name}", value, allowed)
        return cls(strategies, budgets, layers, **ways)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was asked for."""
        return self == Choice()


def own(trained: Trained) -> Variant:
    """The way of fusing that a network was trained with."""
    way = trained.model.way
    layers = None if trained.config is None else trained.config.fusion.layers
    among = _among(trained.model, trained.strategy, layers, trained.schedule)
    attention = _PROPORTIONAL if way.proportional else _PLAIN
    ways = (way.order, way.weighting, way.place, way.mode, attention)
    return Variant(trained.strategy, among, trained.schedule, *ways, own=True)


def unfused(trained: Trained) -> Variant:
    """The network with all of its tokens."""
    mine = own(trained)
    if mine.strategy == _NONE:
        return mine
    return replace(mine, strategy=_NONE, among="", schedule=(0,) * len(mine.schedule), own=False)


def variants(trained: Trained, choice: Choice) -> list[Variant]:
    """Work out what was asked for, in its order and each once; nothing asked for is nothing.

    Of order, weighting, place, mode and attention every combination; where tokens are pruned, weighting and attention
    are of no matter and not told apart. A transformer that was trained without fusion attends in proportion unless
    asked otherwise, as ToMe has it off the shelf. The network's own strategy without a budget is its own schedule,
    whatever it came from.

    Raises:
        ConfigError: with the option at fault, where something does not fit the network.
    """
    if choice.is_empty:
        return []
    if trained.strategy == _NONE and choice.strategies is None:
        raise ConfigError("the network was trained without fusion: name the strategies to fuse by, by --fusion")
    mine = own(trained)
    _check_layers(trained, choice)
    is_vim = isinstance(trained.model, Vim)
    for value in choice.place or ():
        check_choice("--place", value, PLACES if is_vim else (mine.place,))
    if is_vim and choice.attention is not None:
        raise ConfigError("--attention is for transformers, and a Vim has no attention; leave it out")
    usual = mine if is_vim or mine.strategy != _NONE else replace(mine, attention=_PROPORTIONAL)
    ways = list(itertools.product(*(getattr(choice, name) or [getattr(usual, name)] for name in _WAYS)))
    found = []
    for strategy in choice.strategies or [trained.strategy]:
        if strategy == _NONE:
            found.append(unfused(trained))
            continue
        for values, (among, counts) in itertools.product(ways, _spreads(trained, choice, strategy)):
            way = dict(zip(_WAYS, values, strict=True))
            if way["mode"] == _PRUNE:
                # What holds a patch or nothing has no size to weigh by.
                way |= {"weighting": usual.weighting, "attention": mine.attention}
            one = Variant(strategy, among, counts, **way, own=True)
            found.append(one if one == mine else replace(one, own=False))
    return list(dict.fromkeys(found))


def labels(compared: Sequence[Variant]) -> list[str]:
    """Name each variant by its strategy, and by what of the rest others that are compared have not.

    That is its layers, among those of its strategy, and its order and the like, among all that fuse.
    """
    fusing = [one for one in compared if one.strategy != _NONE]
    return [", ".join([one.strategy, *(_told(one, fusing) if one in fusing else [])]) for one in compared]


def add_fusion_options(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the options that `Choice.of` reads; `default` says what holds without them."""
    names = ", ".join(name for name in strategy_names() if name != ADAPTIVE)
    group = parser.add_argument_group("fusion", f"{default}; fusion needs no training to be applied")
    group.add_argument(
        "--fusion",
        metavar="NAME[,NAME...]",
        help=f"strategies: {names}; adaptive where the network was trained so (default: that of the training, if "
        "it had one)",
    )
    group.add_argument(
        "--budget",
        metavar="B[,B...]",
        help="each of them with these budgets: tokens to remove, or a share of the patches between 0 and 1, as "
        "fusion.budget (default: the run's own)",
    )
    group.add_argument(
        "--layers",
        metavar="N[,N...]",
        help="how many layers fuse in lower and upper (default: as the run, else three quarters); which ones, counted "
        "from 0, in custom",
    )
    for name, allowed in (("order", ORDERS), ("weighting", WEIGHTINGS), ("mode", MODES), ("place", PLACES)):
        listed = f"{'of a Vim: ' if name == 'place' else ''}each with {', '.join(allowed)}"
        group.add_argument(f"--{name}", metavar="NAME[,NAME...]", help=f"{listed} (default: as trained)")
    group.add_argument(
        "--attention",
        metavar="NAME[,NAME...]",
        help="of a transformer: each with plain, or proportional to the sizes of tokens (default: proportional where "
        "it was trained without fusion, else as trained)",
    )


def _told(one: Variant, compared: Sequence[Variant]) -> list[str]:
    """What a variant has where others that are compared have something else."""
    siblings = [other for other in compared if other.strategy == one.strategy]
    fields = [("among", siblings), *((way, compared) for way in _WAYS)]
    found = [
        str(getattr(one, field)) for field, others in fields if len({getattr(other, field) for other in others}) > 1
    ]
    named = [f"{value} attention" if value in ATTENTIONS else value for value in found]
    return [value.replace("_", " ") for value in named if value]


def _spreads(trained: Trained, choice: Choice, strategy: str) -> list[tuple[str, tuple[int, ...]]]:
    """For each budget which layers share it, as `Variant` says it, and what each layer removes."""
    is_own = strategy == trained.strategy
    if is_own and choice.budgets is None and choice.layers is None:
        return [(own(trained).among, trained.schedule)]
    if strategy == ADAPTIVE:
        raise ConfigError(
            "--fusion adaptive is no fixed schedule: training measures it, with train.py fusion=adaptive. "
            + (
                "That of this network is evaluated without --budget and --layers"
                if is_own
                else f"This network was trained with {trained.strategy}; name another strategy"
            )
        )
    model = trained.model
    layers = _layers_for(strategy, trained, choice)
    budgets = [_usual_budget(trained)] if choice.budgets is None else choice.budgets
    with naming("fusion", **_OPTIONS):
        found = [
            schedule(strategy, model.depth, model.num_tokens, budget, layers, model.protected) for budget in budgets
        ]
    return [(_among(model, strategy, layers, counts), counts) for counts in found]


def _among(model: FusedNetwork, strategy: str, layers: int | Sequence[int] | None, counts: Sequence[int]) -> str:
    """Name the layers that share a budget, as `Variant` has it."""
    if strategy in _COUNTED:
        fusing = len(STRATEGIES[strategy](len(counts), layers))
        return "1 layer" if fusing == 1 else f"{fusing} layers"
    if strategy != _LISTED:
        return ""
    listed = sorted(layers) if isinstance(layers, Sequence) else [i for i, count in enumerate(counts) if count]
    even = listed and schedule(_LISTED, len(counts), model.num_tokens, sum(counts), listed, model.protected)
    if even != tuple(counts):
        return "counts of its own"
    return f"in layer{'' if len(listed) == 1 else 's'} {' '.join(map(str, listed))}"


def _layers_for(strategy: str, trained: Trained, choice: Choice) -> int | Sequence[int] | None:
    config = trained.config
    configured = config.fusion.layers if config is not None and config.fusion.strategy == strategy else None
    if strategy == _LISTED:
        if choice.layers is None and configured is None:
            raise ConfigError(
                "--fusion custom needs --layers: which layers fuse, counted from 0 at the input, such as --layers 2,5 "
                f"(this network has layers 0 to {len(trained.schedule) - 1})"
            )
        return choice.layers or configured
    if strategy in _COUNTED:
        return configured if choice.layers is None else choice.layers[0]
    return None


def _check_layers(trained: Trained, choice: Choice) -> None:
    if choice.layers is None:
        return
    named = choice.strategies or [trained.strategy]
    if not {*_COUNTED, _LISTED} & set(named):
        raise ConfigError(f"--layers: {', '.join(named)} take none; lower and upper take how many, custom which")
    if len(choice.layers) > 1 and _LISTED not in named:
        raise ConfigError(f"--layers names {len(choice.layers)} layers; lower and upper take one number, how many fuse")
    if _LISTED in named and set(_COUNTED) & set(named):
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
        raise ConfigError(f"--layers holds {text!r}; allowed: whole numbers from 0, such as 3, or 2,5,8 for custom")
    return int(text)
