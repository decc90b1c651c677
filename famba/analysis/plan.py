"""`famba plan`: what strategies cost, worked out before anything runs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from famba.analysis.benchmark.steps import TimedStep
from famba.analysis.benchmark.timing import Race
from famba.analysis.plan_target import Target, prepare_for, target
from famba.errors import ConfigError
from famba.models import Vim
from famba.models.cost import Cost, cost
from famba.models.networks import vim_names, vit_names
from famba.training.checks import check_batch
from famba.training.compose import compose_all
from famba.training.config import FusionConfig, RunConfig, flatten, plain
from famba.training.setup import Setup, build_model

NONE = "none"
# Weights, gradients and AdamW's two moments, in float32.
_BYTES_PER_PARAMETER = 16


@dataclass(frozen=True)
class Planned:
    """One configuration, where it would run, and what it costs. step_ms: measured, None where none was asked for."""

    name: str
    config: RunConfig
    setup: Setup
    parameters: int
    cost: Cost
    where: Target
    step_ms: float | None = None

    @property
    def batch(self) -> int:
        """Images whose tensors are kept at once in one process."""
        return self.config.trainer.batch_size // self.config.trainer.accumulation

    @property
    def memory(self) -> int:
        """Bytes of weights, gradients, optimizer, and what a step keeps for the backward, cast weights among it."""
        cast = 0 if self.setup.autocast is None else self.setup.autocast.itemsize
        return (_BYTES_PER_PARAMETER + cast) * self.parameters + self.batch * self.cost.saved_bytes


def add_plan(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the parser's subcommands, and return its own."""
    parser = commands.add_parser(
        "plan",
        help="show what strategies cost before a run",
        description="Work out what strategies cost, layer by layer and in total, before anything runs: tokens, "
        "multiply-adds, bytes kept for the backward, and the share of an unfused model's step that is left.",
        epilog="examples: famba plan model=vim_s fusion=all,interleaved,lower,upper fusion.budget=150; "
        "famba plan model=vim_s fusion=upper trainer.device=cuda trainer.precision=bf16",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="as train.py takes them, several values by commas; trainer.device and trainer.precision may be those of "
        "another machine",
    )
    parser.add_argument("-m", "--multirun", action="store_true", help="as for train.py; here several values need no -m")
    parser.add_argument(
        "--backend", metavar="NAME", help="whose bytes to count (default: ops.backend, or the one that would serve)"
    )
    parser.add_argument("--measure", action="store_true", help="time training steps here, beside what is predicted")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="images in a measured step (default: 32)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="measured steps each, in turn (default: 5)")
    parser.add_argument("--out", metavar="FOLDER", help="write plan.csv, plan.json and tokens.svg and .png there")
    return parser


def plan(overrides: Sequence[str], backend: str | None = None) -> list[Planned]:
    """Work out every configuration that overrides ask for, and for each model the one without fusion before them.

    Raises FambaError for what cannot work on any machine, as train.py does.
    """
    asked: list[RunConfig] = []
    for config in compose_all(overrides):
        if config.model.name in vit_names():
            raise ConfigError(
                f"model.name {config.model.name} is a transformer, and a plan knows the costs of Vims alone; allowed: "
                f"{', '.join(vim_names())}"
            )
        config = replace(config, seed=0, run_dir="planned")
        unfused = replace(config, fusion=_unfused(config.fusion))
        wanted = [unfused] if config.fusion.strategy == NONE else [unfused, config]
        asked += [one for one in wanted if one not in asked]
    names = _names(asked)
    return [_planned(name, config, backend) for name, config in zip(names, asked, strict=True)]


def measure(plans: Sequence[Planned], batch: int, rounds: int) -> list[Planned]:
    """Time training steps of each on this machine, one after the other in turn, by the median.

    Raises ConfigError where one of them cannot run here, or cannot pair so many images.
    """
    for one in plans:
        if one.where.obstacle is not None:
            raise ConfigError(f"--measure times steps here, where {one.name} cannot run: {one.where.obstacle}")
    race = Race("step", plans[0].setup.device)
    for one in plans:
        trainer, backend = replace(one.config.trainer, batch_size=batch, accumulation=1), one.where.backend
        config = replace(one.config, trainer=trainer, ops=replace(one.config.ops, backend=backend))
        try:
            check_batch(config, 1)
        except ConfigError as error:
            raise ConfigError(str(error).replace("trainer.batch_size", "--batch")) from error
        TimedStep(config, one.setup).enter(race, one.name)
    race.run(rounds)
    return [replace(one, step_ms=race.entries(one.name)["ms"]) for one in plans]


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
        mode="fuse",
        adapt_at=None,
        adapt_images=None,
    )


def _planned(name: str, config: RunConfig, backend: str | None) -> Planned:
    where = target(config, backend)
    setup = prepare_for(config, where)
    with torch.device("meta"):
        model = build_model(config.model.name, setup.model_arguments)
    assert isinstance(model, Vim)
    parameters = sum(weight.numel() for weight in model.parameters())
    return Planned(name, config, setup, parameters, cost(model, where.backend, setup.dtype), where)


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
