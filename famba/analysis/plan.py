"""Count what strategies cost, layer by layer and in total, before anything runs: `famba plan`.

That is tokens, multiply-adds, bytes kept for the backward, and the share of an unfused model's step that is left.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch

from famba.analysis.options import prepare_folder, write_files
from famba.errors import ConfigError, check_choice
from famba.fusion import Fusion, labels, tokens_per_layer
from famba.fusion.schedules import ADAPTIVE, NONE
from famba.models import Backbone
from famba.ops.registry import AUTO, backends, resolve
from famba.training.build import check_model
from famba.training.compose import Command
from famba.training.config import RunConfig, flatten, plain
from famba.training.devices import choose_device, choose_precision
from famba.training.measure import FEW, MANY, count, without_data
from famba.training.setup import Setup, check_cuda_graphs, prepare

# Weights, gradients and AdamW's two moments, in float32.
_BYTES_PER_PARAMETER = 16
# Parts of a layer's cost that the tables by layer show, their unit and how they are written.
_BY_LAYER = {
    "Tokens after each layer's fusion": ("leaving", 1, "{:.0f}"),
    "Multiply-adds per image, millions": ("macs", 1e6, "{:.2f}"),
    "Kept for the backward per image, kB": ("saved_bytes", 1e3, "{:.2f}"),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `famba plan`."""
    parser.description = __doc__
    parser.epilog = "example: famba plan model=vim_s fusion=all,lower,upper trainer.device=cuda trainer.precision=bf16"
    add = parser.add_argument
    add("overrides", nargs="*", metavar="KEY=VALUE", help="as train.py takes them, several values by commas; "
        "trainer.device and trainer.precision may be those of another machine")  # fmt: skip
    add("-m", "--multirun", action="store_true", help="as for train.py; here several values need no -m")
    add("--config-dir", type=Path, metavar="FOLDER", help="a folder of your own configuration files, as for train.py")
    add("--out", metavar="FOLDER", help="write plan.csv and plan.json there")


def run(options: argparse.Namespace) -> int:
    """Print the plan, and write its files where a folder is given."""
    plans = plan(options.overrides, options.config_dir)
    folder = None if options.out is None else prepare_folder(options.out)
    print(tables(plans))
    if folder is not None:
        layers = [[layer._asdict() for layer in one.cost.layers] for one in plans]
        nested = rows(plans).assign(layers=layers).to_dict("records")
        table = rows(plans).to_csv(index=False, lineterminator="\n")
        write_files(folder, {"plan.csv": table, "plan.json": json.dumps(nested, indent=2) + "\n"})
        print(f"\nplan.csv and plan.json are in {folder}")
    return 0


class LayerCost(NamedTuple):
    """Hold the costs of a layer per image; entering and leaving count the tokens around its fusion."""

    entering: int
    leaving: int
    macs: int
    saved_bytes: int


class Cost(NamedTuple):
    """Hold the costs of a model with its schedule, per image, embedding and head included.

    token_layers: tokens left after each layer's fusion, summed over the layers. macs: multiply-adds of a forward pass,
    which papers call FLOPs; norms, activations and sums do not count. saved_bytes: what autograd keeps of it for the
    backward, parameters not counted.
    """

    layers: tuple[LayerCost, ...]
    token_layers: int
    macs: int
    saved_bytes: int


def cost(model: Backbone, autocast: torch.dtype | None = None) -> Cost:
    """Count what each layer of a model costs in training, exactly, on any device, a fake one too."""
    shapes = ((batch, 3, *model.image_size) for batch in (FEW, MANY))
    few, many = (count(model, s, autocast, lambda x, mark: model.classify(model.run(x, mark=mark))) for s in shapes)
    more = MANY - FEW
    # Operations count multiplications and additions apart.
    marks = [((b[0] - a[0]) // more // 2, (b[1] - a[1]) // more) for a, b in zip(few, many, strict=True)]
    left = [model.num_tokens, *tokens_per_layer(model.fusion, model.num_tokens)]
    layers = [
        LayerCost(*tokens, after[0] - before[0], after[1] - before[1])
        for tokens, (before, after) in zip(pairwise(left), pairwise(marks[:-1]), strict=True)
    ]
    return Cost(tuple(layers), sum(left[1:]), *marks[-1])


@dataclass(frozen=True)
class Planned:
    """Hold one configuration, where it would run, and what it costs. backend: what computes the ops."""

    name: str
    config: RunConfig
    setup: Setup
    backend: str
    parameters: int
    cost: Cost

    @property
    def memory(self) -> int:
        """Sum up the bytes of weights, gradients, optimizer, and what a step keeps for the backward."""
        cast = 0 if self.setup.autocast is None else self.setup.autocast.itemsize
        images = self.config.trainer.batch_size // self.config.trainer.accumulation
        return (_BYTES_PER_PARAMETER + cast) * self.parameters + images * self.cost.saved_bytes


def plan(overrides: Sequence[str], config_dir: Path | None = None) -> list[Planned]:
    """Count all configurations that overrides ask for, behind each model's without fusion; raises as train.py does."""
    asked: list[RunConfig] = []
    command = Command(tuple(overrides), multirun=True, config_dir=config_dir)
    for job in command.jobs():
        config = replace(command.config_of(job), seed=0, run_dir="planned")
        check_model(config)  # before the one without fusion, which has its place and would be refused for that
        wanted = [] if config.fusion.strategy == NONE else [config]
        asked += [one for one in (_unfused(config), *wanted) if one not in asked]
    return [_planned(name, config) for name, config in zip(_names(asked), asked, strict=True)]


def _unfused(config: RunConfig) -> RunConfig:
    """Return it without fusion, and with every setting that then has no effect at one value."""
    return replace(config, fusion=Fusion(budget=1, place=config.fusion.place))


def _names(configs: Sequence[RunConfig]) -> list[str]:
    """Name each by its model and fusion, and by what else differs among those that are planned."""
    flat = [flatten(plain(config)) for config in configs]
    differ = [key for key in flat[0] if not key.startswith("fusion.") and len({json.dumps(f[key]) for f in flat}) > 1]
    told = [[f"{key.split('.')[-1]}={values[key]}" for key in differ if key != "model.name"] for values in flat]
    models = [f"{values['model.name']} " if "model.name" in differ else "" for values in flat]
    named = zip(models, labels([one.fusion for one in configs]), told, strict=True)
    return [model + " ".join([label, *parts]) for model, label, parts in named]


def _planned(name: str, config: RunConfig) -> Planned:
    """Count, also for a GPU that is not here: "auto" is bfloat16 by the CUDA kernels there."""
    backend, precision = config.ops.backend, config.trainer.precision
    check_choice("ops.backend", backend, [*backends(), AUTO])
    try:
        device, is_here = choose_device(config.trainer.device), True
    except ConfigError:
        kind, is_here = config.trainer.device.partition(":")[0], False
        if kind not in ("cuda", "mps"):
            raise
        device = torch.device(kind)
        if kind == "cuda" and torch.backends.cuda.is_built() and torch.__version__ < "2.7":
            raise ConfigError("torch 2.6 counts for a GPU only where one is; use a later torch") from None
    if precision == "auto" and not is_here:
        precision = "bf16" if device.type == "cuda" else "fp32"
    autocast = torch.bfloat16 if precision == "bf16" else choose_precision(precision, device)
    if backend == AUTO:
        is_cuda = not is_here and device.type == "cuda" and find_spec("triton")
        backend = "cuda" if is_cuda else resolve(device.type, autocast or torch.float32)
    check_cuda_graphs(config, device, 1, backend)
    # Checked as a run is, but for what depends on this machine.
    trainer = replace(config.trainer, device="cpu", precision="fp32", cuda_graphs="auto")
    setup = prepare(replace(config, trainer=trainer, ops=replace(config.ops, backend=AUTO)), processes=1)
    setup = replace(setup, device=device, autocast=autocast)
    with without_data(config.model.name, setup.model_arguments, device, backend) as model:
        model.set_grad_checkpointing(config.trainer.grad_checkpointing)
        parameters, counted = sum(weight.numel() for weight in model.parameters()), cost(model, autocast)
    return Planned(name, config, setup, backend, parameters, counted)


def rows(plans: Sequence[Planned]) -> pd.DataFrame:
    """Return each configuration in numbers, with units in the names of the columns."""
    bases = [next(other for other in plans if other.config == _unfused(one.config)) for one in plans]
    return pd.DataFrame([
        {
            "model": one.config.model.name,
            "name": one.name,
            "strategy": one.config.fusion.strategy,
            "tokens": one.setup.tokens,
            "tokens_removed": sum(one.setup.schedule),
            "tokens_left": one.cost.layers[-1].leaving,
            "token_layers_of_none": one.cost.token_layers / base.cost.token_layers,
            "parameters": one.parameters,
            "macs_per_image": one.cost.macs,
            "step_time_of_none_predicted": one.cost.macs / base.cost.macs,
            "saved_bytes_per_image": one.cost.saved_bytes,
            "saved_bytes_of_none": one.cost.saved_bytes / base.cost.saved_bytes,
            "memory_bytes_predicted": one.memory,
            "memory_of_none_predicted": one.memory / base.memory,
            "schedule": " ".join(map(str, one.setup.schedule)),
        }
        for one, base in zip(plans, bases, strict=True)
    ])  # fmt: skip


def tables(plans: Sequence[Planned]) -> str:
    """Return tokens, multiply-adds and bytes layer by layer, the totals, and what they mean, as text."""
    parts = []
    for title, (part, unit, form) in _BY_LAYER.items():
        columns = {one.name: pd.Series([getattr(layer, part) / unit for layer in one.cost.layers]) for one in plans}
        table = pd.DataFrame(columns).rename_axis("layer").map(form.format).replace("nan", "")
        parts += [title, table.to_markdown(tablefmt="simple", disable_numparse=True, stralign="right"), ""]
    counted = rows(plans).set_index("name").drop(columns=["model", "strategy", "schedule"])
    counted = counted.map(lambda cell: f"{cell:,.3f}" if isinstance(cell, float) else f"{cell:,}").T
    totals = counted.to_markdown(tablefmt="simple", disable_numparse=True, stralign="right")
    computed = " and ".join(dict.fromkeys(f"{str(one.setup.dtype)[6:]} by {one.backend}" for one in plans))
    notes = [
        "Multiply-adds are those of one image's forward pass, what papers on vision backbones call FLOPs. A step does "
        "three times as many, and its time is predicted from them: nearly all of the work is linear in multiply-adds.",
        f"Kept is what autograd holds of one image for the backward, computed in {computed}; memory adds weights, "
        "gradients and AdamW's moments, for the images of a micro-batch.",
    ]
    if any(one.config.fusion.strategy == ADAPTIVE for one in plans):
        notes.append("Training measures the schedule of adaptive; this plan counts its first one, that of all.")
    return "\n".join([*parts, "In total", totals, "", *notes])
