"""`Fusion`: one object that says how a network reduces its tokens.

The configuration's group `fusion`, the arguments of networks, the options of `famba evaluate` and the labels in tables
follow from its fields. A new field is added here and in `configs/fusion/_base.yaml`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from famba.errors import ConfigError, check_choice, near_miss
from famba.fusion.rules import BIPARTITE, MODES, ORDERS, RULES, Layout
from famba.fusion.schedules import ADAPTIVE, COUNTED, CUSTOM, NONE, PAPER, fusing_layers, schedule, strategy_names

WEIGHTINGS = ("mean", "size")
_ATTENTIONS = ("plain", "proportional")
# A graph is compiled for each schedule, and torch keeps eight.
_MOST_MEASURED = 6
_MOST_IMAGES = 10**5


class Setting(NamedTuple):
    """Describe a field of `Fusion` for command lines and labels: allowed values as text, its name there, and a help.

    names are empty where each backbone has its own, or for a number. read returns the field's value for a text, or
    raises ValueError.
    """

    names: Collection[str]
    option: str
    help: str
    read: Callable[[str], Any] = str


SETTINGS = {
    "rule": Setting(RULES, "rule", "which tokens are reduced"),
    "order": Setting(ORDERS, "order", "in which order tokens stand afterwards"),
    "weighting": Setting(WEIGHTINGS, "weighting", "how tokens are weighed"),
    "place": Setting((), "place", "where a layer reduces tokens, one of the network's places"),
    "mode": Setting(MODES, "mode", "whether tokens fuse or are pruned"),
    "guard": Setting((), "guard", "for rule neighbours: tokens beside the class token that are left alone", int),
    "proportional": Setting(
        _ATTENTIONS,
        "attention",
        "how a transformer attends, plain or in proportion to sizes",
        lambda text: text == _ATTENTIONS[1],
    ),
}
"""Fields of `Fusion` that say how tokens are reduced, whatever the schedule, in the order of labels."""


@dataclass(frozen=True)
class Fusion:
    """Say how many tokens a network reduces, in which layers, and how. Each field checks itself.

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
        guard: how many tokens on each side of a special token are left alone; for the rules that can.
        proportional: whether tokens are attended to in proportion to their sizes; for backbones with attention.
        adapt_at: for "adaptive", when training measures the schedule, as shares of all steps.
        adapt_images: for "adaptive", on how many training images.

    Raises:
        ConfigError: with the name of the field at fault.
    """

    # For the configuration: no other keys, and no value of another type.
    __pydantic_config__ = {"extra": "forbid", "strict": True, "allow_inf_nan": False}  # noqa: RUF012 - read by pydantic

    strategy: str = NONE
    budget: int | float | str | tuple[int, ...] = 6 / 7
    layers: int | tuple[int, ...] | None = None
    rule: str = BIPARTITE
    order: str = "sequence"
    weighting: str = "mean"
    place: str = "before_mixer"
    mode: str = "fuse"
    guard: int = 0
    proportional: bool = False
    adapt_at: tuple[float, ...] | None = None
    adapt_images: int | None = None

    def __post_init__(self) -> None:
        check_choice("fusion strategy", self.strategy, strategy_names(), "strategy")
        for name in ("rule", "order", "weighting", "mode"):
            check_choice(f"fusion {name}", getattr(self, name), SETTINGS[name].names, name)
        if isinstance(self.budget, str) and self.budget != PAPER:
            raise ConfigError(f"budget is {self.budget!r}; allowed as text: {PAPER!r}", "budget")
        shares, images = self.adapt_at, self.adapt_images
        if shares is not None and not (1 <= len(shares) <= _MOST_MEASURED and all(0 <= share < 1 for share in shares)):
            allowed = f"1 to {_MOST_MEASURED} shares of the run, each at least 0 and less than 1"
            raise ConfigError(f"adapt_at is {list(shares)}; allowed: {allowed}", "adapt_at")
        if images is not None and not 1 <= images <= _MOST_IMAGES:
            raise ConfigError(f"adapt_images is {images}; allowed: 1 to {_MOST_IMAGES:,}", "adapt_images")

    def check_rule(self) -> None:
        """Raise ConfigError, with the name of the field at fault, where the rule cannot do what other fields ask for.

        `Backbone.check_fusion` calls it, after it has checked that the rule works with the network at all.
        """
        rule = RULES[self.rule]
        for name, value, known in (("order", self.order, rule.orders), ("mode", self.mode, rule.modes)):
            if value not in known:
                raise ConfigError(f"{name} is {value!r}; rule {self.rule!r} knows {', '.join(known)} alone", name)
        if self.guard and (self.guard < 0 or not rule.guards):
            able = ", ".join(name for name, one in RULES.items() if one.guards)
            raise ConfigError(
                f"guard is {self.guard} with rule {self.rule!r}; allowed: 0, or more with {able}", "guard"
            )
        if self.strategy == ADAPTIVE and self.rule != BIPARTITE:
            told = f"measures the pairs that rule {BIPARTITE!r} makes, and the rule is {self.rule!r}"
            told = f"strategy {ADAPTIVE!r} {told}; choose another strategy, or rule={BIPARTITE}"
            raise ConfigError(told, "strategy")

    @property
    def counts_patches(self) -> bool:
        """True where the weights of tokens are the patches that they hold."""
        return self.mode == "fuse" and self.weighting == "size"

    @property
    def keeps_sizes(self) -> bool:
        """True where it matters how many patches a token holds."""
        return self.counts_patches or (self.mode == "fuse" and self.proportional)

    @property
    def is_matched(self) -> bool:
        """True where the schedule removes as many tokens as those of the other strategies with this budget."""
        return self.budget != PAPER and not isinstance(self.budget, tuple)

    def schedule(
        self, depth: int, tokens: int, protected: int = 1, grid: tuple[int, int] | None = None
    ) -> tuple[int, ...]:
        """Return the tokens to remove in each layer, as `famba.fusion.schedule` works them out, or raise as it does.

        grid has the rows and columns of patches. For a rule that cannot spend every schedule it is the nearest that the
        rule can spend, with the same total; ConfigError is raised for counts in a list that it cannot.
        """
        wanted = schedule(self.strategy, depth, tokens, self.budget, self.layers, protected)
        counts = self.fitted(wanted, tokens, protected, grid)
        if isinstance(self.budget, tuple) and counts != wanted:
            told = f"cannot remove {list(wanted)} tokens layer by layer; the nearest that it can is {list(counts)}"
            raise ConfigError(f"rule {self.rule!r} {told}", "budget")
        return counts

    def fitted(
        self, counts: tuple[int, ...], tokens: int, protected: int = 1, grid: tuple[int, int] | None = None
    ) -> tuple[int, ...]:
        """Return the schedule that the rule can spend nearest to `counts`, of the same total.

        tokens, protected and grid are as in `schedule`. Raises ConfigError where there is none.
        """
        plan = RULES[self.rule].plan
        if plan is None or not any(counts):
            return counts
        return plan(counts, Layout(tokens - protected, protected, grid, self.guard))

    def changed(self, **changes: Any) -> Fusion:
        """Return a copy with other values in some fields; None leaves a field as it is.

        Raises ConfigError for an unknown field, or a value that does not fit.
        """
        known = [one.name for one in fields(self)]
        for name in changes:
            if name not in known:
                raise ConfigError(f"fusion has no {name!r}{near_miss(name, known)}; allowed: {', '.join(known)}", name)
        return replace(self, **{name: value for name, value in changes.items() if value is not None})

    def resolved(self, counts: Sequence[int]) -> Fusion:
        """Return a form to compare with others, for a network whose layers remove `counts` tokens.

        The budget is in tokens. Even counts of "custom" become a budget and a list of layers; other counts become the
        budget.
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
        """Return the values of the fields in `SETTINGS`."""
        return {name: getattr(self, name) for name in SETTINGS}

    def texts(self) -> dict[str, str]:
        """Return the fields but the strategy as labels show them, by their names there; "" where a field is None."""
        shown = {**vars(self), "proportional": _ATTENTIONS[self.proportional]}
        del shown["strategy"]
        texts = {}
        for name, value in shown.items():
            listed = value if isinstance(value, tuple) else () if value is None else (value,)
            texts[SETTINGS[name].option if name in SETTINGS else name] = " ".join(map(str, listed))
        return texts


_OF_A_STRATEGY = ("layers", "adapt_at", "adapt_images")


def labels(fusions: Sequence[Fusion], usual: Mapping[str, str] | None = None, ignore: Iterable[str] = ()) -> list[str]:
    """Name each of several by its strategy and by the fields in which those that fuse differ.

    usual has names and texts, as in `Fusion.texts`, and ignore names that are left out.
    """
    fusing = [one for one in fusions if one.strategy != NONE]
    ignored = frozenset(ignore)

    def is_told(one: Fusion, name: str, text: str) -> bool:
        of_a_strategy = name in _OF_A_STRATEGY
        if not text or name in ignored or (usual is not None and not of_a_strategy and text == usual.get(name)):
            return False
        return len({other.texts()[name] for other in fusing if not of_a_strategy or other.strategy == one.strategy}) > 1

    return [
        ", ".join([one.strategy, *(f"{n} {t}" for n, t in one.texts().items() if one in fusing and is_told(one, n, t))])
        for one in fusions
    ]
