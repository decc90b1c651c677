"""`famba plan`: what strategies cost, worked out before anything runs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from famba.analysis.benchmark.steps import Step, Subject
from famba.analysis.benchmark.timing import Race
from famba.errors import ConfigError
from famba.models import Vim
from famba.models.cost import Cost, cost
from famba.ops.registry import AUTO, backends, resolve
from famba.training.compose import compose_all
from famba.training.config import FusionConfig, RunConfig, flatten, plain
from famba.training.setup import Setup, build_model, prepare

NONE = "none"
# Weights, gradients and AdamW's two moments, in float32.
_BYTES_PER_PARAMETER = 16


@dataclass(frozen=True)
class Planned:
    """One configuration and what it costs. step_ms is measured, None where that was not asked for."""

    name: str
    config: RunConfig
    setup: Setup
    parameters: int
    cost: Cost
    backend: str
    step_ms: float | None = None

    @property
    def batch(self) -> int:
        """Images whose tensors are kept at once in one process."""
        return self.config.trainer.batch_size // self.config.trainer.accumulation

    @property
    def memory(self) -> int:
        """Bytes of weights, gradients, optimizer, and what a step keeps for the backward."""
        return _BYTES_PER_PARAMETER * self.parameters + self.batch * self.cost.saved_bytes


def add_plan(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the parser's subcommands, and return its own."""
    parser = commands.add_parser(
        "plan",
        help="show what strategies cost before a run",
        description="Work out what strategies cost, layer by layer and in total, before anything runs: tokens, "
        "multiply-adds, bytes kept for the backward, and the share of an unfused model's step that is left.",
        epilog="example: famba plan model=vim_s fusion=all,interleaved,lower,upper fusion.budget=150",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="as train.py takes them; several values by commas"
    )
    parser.add_argument("--backend", help="whose bytes to count (default: the one that serves here)")
    parser.add_argument("--measure", action="store_true", help="time training steps here, beside what is predicted")
    parser.add_argument("--batch", type=int, default=32, help="images in a measured step (default: 32)")
    parser.add_argument("--rounds", type=int, default=5, help="measured steps of each, in turn (default: 5)")
    parser.add_argument("--out", metavar="FOLDER", help="write plan.csv, plan.json and tokens.svg and .png there")
    return parser


def plan(overrides: Sequence[str], backend: str | None = None) -> list[Planned]:
    """Work out every configuration that overrides ask for, and for each model the one without fusion before them.

    Raises FambaError for what cannot work, as train.py does.
    """
    if backend not in (None, *backends()):
        raise ConfigError(f"unknown --backend {backend!r}; allowed: {', '.join(backends())}")
    asked: list[RunConfig] = []
    for config in compose_all(overrides):
        config = replace(config, seed=0, run_dir="planned")
        unfused = replace(config, fusion=_unfused(config.fusion))
        wanted = [unfused] if config.fusion.strategy == NONE else [unfused, config]
        asked += [one for one in wanted if one not in asked]
    names = _names(asked)
    return [_planned(name, config, backend) for name, config in zip(names, asked, strict=True)]


def measure(plans: Sequence[Planned], batch: int, rounds: int) -> list[Planned]:
    """Time training steps of each on this machine, one after the other in turn, by the median."""
    steps = {one.name: Step(_subject(one, batch)) for one in plans}
    for step in steps.values():
        step.model.train()
    race = Race("step", {name: step.train for name, step in steps.items()}, plans[0].setup.device)
    race.run(rounds)
    return [replace(one, step_ms=race.times[one.name].median_ms) for one in plans]


@dataclass(frozen=True)
class _Subject(Subject):
    """A planned model, for the clock."""

    arguments: dict[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """Build the model with random weights."""
        torch.manual_seed(0)
        return build_model(self.model, self.arguments).to(self.device)


def _subject(one: Planned, batch: int) -> _Subject:
    precision = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(one.setup.dtype, "fp32")
    return _Subject(
        one.config.model.name,
        one.config.fusion.strategy,
        batch,
        one.setup.image_size,
        precision,
        str(one.setup.device),
        one.backend,
        arguments=one.setup.model_arguments,
    )


def _unfused(fusion: FusionConfig) -> FusionConfig:
    """No fusion, with every setting that is then of no effect at one value."""
    return replace(
        fusion,
        strategy=NONE,
        budget=1,
        layers=None,
        order="sequence",
        weighting="mean",
        place="before_mixer",
        adapt_at=None,
        adapt_images=None,
    )


def _planned(name: str, config: RunConfig, backend: str | None) -> Planned:
    # For other machines: neither the data nor the memory of this one has to do.
    setup = prepare(config, processes=1)
    with torch.device("meta"):
        model = build_model(config.model.name, setup.model_arguments)
    assert isinstance(model, Vim)
    configured = None if config.ops.backend == AUTO else config.ops.backend
    chosen = backend or configured or resolve(setup.device.type, setup.dtype)
    parameters = sum(weight.numel() for weight in model.parameters())
    return Planned(name, config, setup, parameters, cost(model, chosen, setup.dtype), chosen)


def _names(configs: Sequence[RunConfig]) -> list[str]:
    """Each by its strategy, and by what else differs among those that are planned."""
    flat = [flatten(plain(config)) for config in configs]
    fused = [values for values in flat if values["fusion.strategy"] != NONE] or flat
    differ = {
        key
        for key in flat[0]
        for among in (fused if key.startswith("fusion.") else flat,)
        if len({json.dumps(values[key]) for values in among}) > 1
    }
    said = sorted(differ - {"model.name", "fusion.strategy", "fusion.adapt_at", "fusion.adapt_images"})
    names = []
    for values in flat:
        unfused = values["fusion.strategy"] == NONE
        others = [f"{key.split('.')[-1]}={values[key]}" for key in said if not (unfused and key.startswith("fusion."))]
        model = [values["model.name"]] if "model.name" in differ else []
        names.append(" ".join([*model, values["fusion.strategy"], *others]))
    return names
