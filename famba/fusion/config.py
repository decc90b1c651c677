"""`Fusion`: how a network reduces its tokens, as one object.

The configuration's group `fusion`, the arguments of networks, the options of `famba evaluate` and the labels in tables
follow from the fields of this class. A setting is added here and in `configs/fusion/_base.yaml`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from famba.errors import ConfigError, check_choice, near_miss
from famba.fusion.rules import BIPARTITE, MODES, ORDERS, RULES
from famba.fusion.schedules import ADAPTIVE, COUNTED, CUSTOM, NONE, PAPER, fusing_layers, schedule, strategy_names

WEIGHTINGS = ("mean", "size")
_ATTENTIONS = ("plain", "proportional")
# A graph is compiled for each schedule, and torch keeps eight.
_MOST_MEASURED = 6
_MOST_IMAGES = 10**5


@dataclass(frozen=True)
class Setting:
    """How a field of `Fusion` is chosen from a few values.

    names: what the values are called; looked up when it is asked, since rules are registered at any time. Empty where
    each backbone has its own. option: of a command line, without dashes. help: what the option chooses between.
    """

    names: Collection[str]
    option: str
    help: str
    is_flag: bool = False

    def value(self, name: str) -> str | bool:
        """Return the value that is called so."""
        return name == _ATTENTIONS[1] if self.is_flag else name

    def name(self, value: str | bool) -> str:
        """Return what a value is called."""
        return _ATTENTIONS[bool(value)] if self.is_flag else str(value)


def _setting(default: str | bool, names: Collection[str], option: str, text: str) -> Any:
    setting = Setting(names, option, text, isinstance(default, bool))
    return field(default=default, metadata={"setting": setting})


@dataclass(frozen=True)
class Fusion:
    """How many tokens a network reduces where, and how; it checks itself.

    Attributes:
        strategy: which layers fuse, as in `famba.fusion.schedule`.
        budget: tokens to remove, as in `famba.fusion.schedule`.
        layers: how many or which layers fuse, for the strategies that take it.
        rule: which tokens are reduced, a name in `RULES`.
        order: "sequence" or "tome", as in `famba.fusion.match`.
        weighting: "mean" (equal weights, as in the paper) or "size" (by the patches that a token holds); without effect
            where tokens are pruned.
        place: where a layer reduces tokens; each backbone has its own places.
        mode: "fuse", or "prune": the tokens that would fuse into another are dropped, as a baseline.
        proportional: whether tokens are attended to in proportion to their sizes; for backbones with attention.
        adapt_at: for "adaptive" when training measures where tokens are similar, as shares of all steps.
        adapt_images: for "adaptive" on how many training images.

    Raises:
        ConfigError: with the name of the field at fault.
    """

    # For the configuration: no other keys, and no value of another type.
    __pydantic_config__ = {"extra": "forbid", "strict": True, "allow_inf_nan": False}  # noqa: RUF012 - read by pydantic

    strategy: str = NONE
    budget: int | float | str | tuple[int, ...] = 6 / 7
    layers: int | tuple[int, ...] | None = None
    rule: str = _setting(BIPARTITE, RULES, "rule", "which tokens are reduced")
    order: str = _setting("sequence", ORDERS, "order", "in which order tokens stand afterwards")
    weighting: str = _setting("mean", WEIGHTINGS, "weighting", "how tokens are weighed")
    place: str = _setting("before_mixer", (), "place", "where a layer reduces tokens, one of the network's places")
    mode: str = _setting("fuse", MODES, "mode", "whether tokens fuse or are pruned")
    proportional: bool = _setting(
        False, _ATTENTIONS, "attention", "how a transformer attends, plain or in proportion to the sizes of tokens"
    )
    adapt_at: tuple[float, ...] | None = None
    adapt_images: int | None = None

    def __post_init__(self) -> None:
        check_choice("fusion strategy", self.strategy, strategy_names(), "strategy")
        for name, setting in SETTINGS.items():
            if setting.names and not setting.is_flag:
                check_choice(f"fusion {name}", getattr(self, name), setting.names, name)
        if isinstance(self.budget, str) and self.budget != PAPER:
            raise ConfigError(f"budget is {self.budget!r}; allowed as text: {PAPER!r}", "budget")
        rule = RULES[self.rule]
        for name, value, known in (("order", self.order, rule.orders), ("mode", self.mode, rule.modes)):
            if value not in known:
                raise ConfigError(f"{name} is {value!r}; rule {self.rule!r} knows {', '.join(known)} alone", name)
        if self.strategy == ADAPTIVE and self.rule != BIPARTITE:
            raise ConfigError(
                f"strategy {ADAPTIVE!r} measures the pairs that rule {BIPARTITE!r} makes, and the rule is "
                f"{self.rule!r}; choose another strategy, or rule={BIPARTITE}",
                "strategy",
            )
        shares, images = self.adapt_at, self.adapt_images
        if shares is not None and not (1 <= len(shares) <= _MOST_MEASURED and all(0 <= share < 1 for share in shares)):
            raise ConfigError(
                f"adapt_at is {list(shares)}; allowed: 1 to {_MOST_MEASURED} shares of the run, each at least 0 and "
                "less than 1",
                "adapt_at",
            )
        if images is not None and not 1 <= images <= _MOST_IMAGES:
            raise ConfigError(f"adapt_images is {images}; allowed: 1 to {_MOST_IMAGES:,}", "adapt_images")

    @property
    def needs(self) -> frozenset[str]:
        """What the rule has to know of tokens that not every backbone can tell it."""
        return RULES[self.rule].needs

    @property
    def counts_patches(self) -> bool:
        """Whether the weights of tokens are the patches that they hold."""
        return self.mode == "fuse" and self.weighting == "size"

    @property
    def keeps_sizes(self) -> bool:
        """Whether it matters how many patches a token holds."""
        return self.mode == "fuse" and (self.weighting == "size" or self.proportional)

    @property
    def removed(self) -> int:
        """Tokens that are removed in all; only of a `resolved` one."""
        return sum(self.budget) if isinstance(self.budget, tuple) else int(self.budget)

    @property
    def is_matched(self) -> bool:
        """Whether the schedule removes as many tokens as those of the other strategies with this budget."""
        return self.budget != PAPER and not isinstance(self.budget, tuple)

    def schedule(self, depth: int, tokens: int, protected: int = 1) -> tuple[int, ...]:
        """Work out what each layer removes, as `famba.fusion.schedule` does. Raises ConfigError where it cannot be."""
        return schedule(self.strategy, depth, tokens, self.budget, self.layers, protected)

    def changed(self, **changes: Any) -> Fusion:
        """Return it with other values in some fields; None leaves a field as it is.

        Raises ConfigError for an unknown field, or a value that does not fit.
        """
        known = [one.name for one in fields(self)]
        for name in changes:
            if name not in known:
                raise ConfigError(f"fusion has no {name!r}{near_miss(name, known)}; allowed: {', '.join(known)}", name)
        return replace(self, **{name: value for name, value in changes.items() if value is not None})

    def resolved(self, counts: Sequence[int]) -> Fusion:
        """Return it as it turned out in a network whose layers remove `counts` tokens, so that it can be compared.

        The budget is in tokens and the layers are named in full. Counts that a list of layers does not give stand as
        the budget. Without fusion no other setting counts.
        """
        total = sum(counts)
        if self.strategy == NONE:
            return Fusion(budget=0)
        if self.strategy != CUSTOM:
            fusing = fusing_layers(self.strategy, len(counts), self.layers)
            return replace(self, budget=total, layers=len(fusing) if self.strategy in COUNTED else None)
        given = self.layers if isinstance(self.layers, tuple) else [i for i, count in enumerate(counts) if count]
        layers = tuple(sorted(given))
        shares = [(i + 1) * total // len(layers) - i * total // len(layers) for i in range(len(layers))]
        even = layers and [counts[i] for i in layers] == shares
        return replace(self, budget=total if even else tuple(counts), layers=layers if even else None)

    def settings(self) -> dict[str, Any]:
        """Return how tokens are reduced, whatever the schedule: the values of the fields in `SETTINGS`."""
        return {name: getattr(self, name) for name in SETTINGS}

    def texts(self) -> dict[str, str]:
        """Return each field but the strategy as a label tells it, by its name there; "" where it is left open."""
        found = {}
        for one in fields(self):
            value = getattr(self, one.name)
            setting = SETTINGS.get(one.name)
            if setting is not None:
                found[setting.option] = setting.name(value)
            elif one.name != "strategy":
                found[one.name] = (
                    "" if value is None else " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
                )
        return found


SETTINGS: dict[str, Setting] = {one.name: one.metadata["setting"] for one in fields(Fusion) if one.metadata}
"""Fields of `Fusion` that say how tokens are reduced, in the order in which labels name them."""

_OF_A_STRATEGY = ("layers", "adapt_at", "adapt_images")


def labels(fusions: Sequence[Fusion], usual: Mapping[str, str] | None = None, ignore: Iterable[str] = ()) -> list[str]:
    """Name each of several by its strategy, and by what tells it from the others that fuse.

    Args:
        fusions: those that are compared.
        usual: names and texts, as `Fusion.texts` has them, that need not be told; without, all that differs is told.
        ignore: names that are told elsewhere.
    """
    fusing = [one for one in fusions if one.strategy != NONE]
    return [_label(one, fusing, usual, frozenset(ignore)) for one in fusions]


def _label(one: Fusion, fusing: Sequence[Fusion], usual: Mapping[str, str] | None, ignore: frozenset[str]) -> str:
    if one.strategy == NONE:
        return NONE
    siblings = [other for other in fusing if other.strategy == one.strategy]
    told = [one.strategy]
    for name, text in one.texts().items():
        compared = siblings if name in _OF_A_STRATEGY else fusing
        differs = len({other.texts()[name] for other in compared}) > 1
        is_unusual = usual is None or name in _OF_A_STRATEGY or text != usual.get(name)
        if name not in ignore and text and differs and is_unusual:
            told.append(f"{name} {text}")
    return ", ".join(told)
