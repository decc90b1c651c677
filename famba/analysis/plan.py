"""Count what strategies cost before anything runs: `famba plan`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch._subclasses.fake_tensor import FakeTensorMode

from famba.analysis.benchmark.steps import TimedStep
from famba.analysis.benchmark.timing import Race
from famba.analysis.figures import drawing, looks, rendered
from famba.analysis.options import at_least_one, prepare_folder, write_files
from famba.errors import ConfigError, FambaError, check_choice
from famba.fusion import Fusion, labels
from famba.fusion.schedules import ADAPTIVE, NONE
from famba.ops.registry import AUTO, backends, counting_as, resolve
from famba.training.compose import compose_all
from famba.training.config import RunConfig, flatten, plain
from famba.training.devices import choose_device, choose_precision
from famba.training.measure import Cost, cost
from famba.training.setup import Setup, build_model, check_backend, check_batch, check_cuda_graphs, prepare

# Weights, gradients and AdamW's two moments, in float32.
_BYTES_PER_PARAMETER = 16
_DEVICES = ("cuda", "mps")
_PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# Columns of the totals: of plan.json, its unit, and how a cell is written.
_TOTALS = {
    "fusion": ("name", 1, "{}"),
    "removed": ("tokens_removed", 1, "{}"),
    "left": ("left", 1, "{}"),
    "token-layers": ("token_layers_of_none", 1, "{:.3f}"),
    "G multiply-adds": ("macs_per_image", 1e9, "{:.3f}"),
    "step time, relative to none": ("step_time_of_none_predicted", 1, "{:.3f}"),
    "kept, MB": ("saved_bytes_per_image", 1e6, "{:.2f}"),
    "kept, relative to none": ("saved_bytes_of_none", 1, "{:.3f}"),
    "memory, MiB": ("memory_bytes_predicted", 2**20, "{:,.0f}"),
    "memory, relative to none": ("memory_of_none_predicted", 1, "{:.3f}"),
    "step, ms, measured": ("step_ms_measured", 1, "{:.1f}"),
    "step time, relative to none, measured": ("step_time_of_none_measured", 1, "{:.3f}"),
}
# Parts of a layer's cost that the tables by layer show, their unit and how they are written.
_BY_LAYER = {
    "Tokens after each layer's fusion": ("leaving", 1, ".0f"),
    "Multiply-adds per image, millions": ("macs", 1e6, ".2f"),
    "Kept for the backward per image, kB": ("saved_bytes", 1e3, ".2f"),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `famba plan`."""
    parser.description = (
        "Count what strategies cost, layer by layer and in total, before anything runs: tokens, multiply-adds, bytes "
        "kept for the backward, and the share of an unfused model's step that is left."
    )
    parser.epilog = (
        "examples: famba plan model=vim_s fusion=all,interleaved,lower,upper fusion.budget=150; "
        "famba plan model=vim_s fusion=upper trainer.device=cuda trainer.precision=bf16"
    )
    add = parser.add_argument
    add("overrides", nargs="*", metavar="KEY=VALUE", help="as train.py takes them, several values by commas; "
        "trainer.device and trainer.precision may be those of another machine")  # fmt: skip
    add("-m", "--multirun", action="store_true", help="as for train.py; here several values need no -m")
    add("--config-dir", type=Path, metavar="FOLDER", help="a folder of your own configuration files, as for train.py")
    add("--backend", metavar="NAME", help="whose bytes to count (default: ops.backend, or the one that would serve)")
    add("--measure", action="store_true", help="time training steps here, beside what is predicted")
    add("--batch", type=int, default=32, metavar="N", help="images in a measured step (default: 32)")
    add("--rounds", type=int, default=5, metavar="N", help="measured steps each, in turn (default: 5)")
    add("--out", metavar="FOLDER", help="write plan.csv, plan.json and tokens.svg and .png there")


def run(options: argparse.Namespace) -> int:
    """Print the plan, and write its files where a folder is given."""
    at_least_one(options, "batch", "rounds")
    plans = plan(options.overrides, options.backend, options.config_dir)
    folder = None if options.out is None else prepare_folder(options.out)
    if options.measure:
        plans = measure(plans, options.batch, options.rounds)
    print(tables(plans))
    if folder is not None:
        write_files(folder, files(plans))
        print(f"\nplan.csv, plan.json, tokens.svg and tokens.png are in {folder}")
    return 0


@dataclass(frozen=True)
class Planned:
    """Hold one configuration, where it would run, and what it costs.

    backend: what computes the ops. obstacle: why it cannot run here, None where it can. step_ms: measured, None where
    that was not asked for.
    """

    name: str
    config: RunConfig
    setup: Setup
    backend: str
    obstacle: str | None
    parameters: int
    cost: Cost
    step_ms: float | None = None

    @property
    def batch(self) -> int:
        """Count the images whose tensors are kept at once in one process."""
        return self.config.trainer.batch_size // self.config.trainer.accumulation

    @property
    def memory(self) -> int:
        """Sum up the bytes of weights, gradients, optimizer, and what a step keeps for the backward."""
        cast = 0 if self.setup.autocast is None else self.setup.autocast.itemsize
        return (_BYTES_PER_PARAMETER + cast) * self.parameters + self.batch * self.cost.saved_bytes

    @property
    def tokens(self) -> list[int]:
        """List the tokens before the first layer, and those left after each."""
        return [self.setup.tokens, *(layer.leaving for layer in self.cost.layers)]


def plan(overrides: Sequence[str], backend: str | None = None, config_dir: Path | None = None) -> list[Planned]:
    """Count every configuration that overrides ask for, and for each model the one without fusion before them.

    Raises FambaError for what cannot work on any machine, as train.py does.
    """
    asked: list[RunConfig] = []
    for config in compose_all(overrides, config_dir):
        config = replace(config, seed=0, run_dir="planned")
        wanted = [] if config.fusion.strategy == NONE else [config]
        asked += [one for one in (_unfused(config), *wanted) if one not in asked]
    return [_planned(name, config, backend) for name, config in zip(_names(asked), asked, strict=True)]


def _unfused(config: RunConfig) -> RunConfig:
    """Return it without fusion, and with every setting that then has no effect at one value."""
    return replace(config, fusion=Fusion(budget=1, place=config.fusion.place))


def _names(configs: Sequence[RunConfig]) -> list[str]:
    """Name each by its model and fusion, and by what else differs among those that are planned."""
    flat = [flatten(plain(config)) for config in configs]
    differ = [key for key in flat[0] if not key.startswith("fusion.") and len({json.dumps(f[key]) for f in flat}) > 1]
    names = []
    for values, label in zip(flat, labels([one.fusion for one in configs]), strict=True):
        parts = [f"{key.split('.')[-1]}={values[key]}" for key in differ if key != "model.name"]
        names.append(" ".join([*([values["model.name"]] if "model.name" in differ else []), label, *parts]))
    return names


def _planned(name: str, config: RunConfig, asked: str | None) -> Planned:
    """Count for a device, a precision and a backend, none of which need be on this machine.

    A choice that "auto" leaves open is made as on this machine, and for a GPU that is not here as on most: bfloat16, by
    the CUDA kernels.
    """
    option, backend = ("ops.backend", config.ops.backend) if asked is None else ("--backend", asked)
    check_choice(option, backend, [*backends(), AUTO])
    obstacle = _obstacle(config, backend, option)
    device, is_here = _device(config.trainer.device)
    autocast = _autocast(config.trainer.precision, device, is_here)
    if backend == AUTO:
        is_cuda = not is_here and device.type == "cuda" and find_spec("triton")
        backend = "cuda" if is_cuda else resolve(device.type, autocast or torch.float32)
    check_cuda_graphs(config, device, 1, backend)
    # Checked as a run is, but for what depends on this machine.
    trainer = replace(config.trainer, device="cpu", precision="fp32", cuda_graphs="auto")
    setup = prepare(replace(config, trainer=trainer, ops=replace(config.ops, backend=AUTO)), processes=1)
    setup = replace(setup, device=device, autocast=autocast)
    with torch.device("meta"):
        model = build_model(config.model.name, setup.model_arguments)
    parameters = sum(weight.numel() for weight in model.parameters())
    with FakeTensorMode(allow_non_fake_inputs=True), counting_as(backend):
        counted = cost(model.to_empty(device=device.type if device.type == "cuda" else "cpu"), autocast)
    return Planned(name, config, setup, backend, obstacle, parameters, counted)


def _device(name: str) -> tuple[torch.device, bool]:
    """Return the device, and whether it is on this machine."""
    try:
        return choose_device(name), True
    except ConfigError:
        kind = name.partition(":")[0]
        if kind not in _DEVICES:
            raise
        return torch.device(kind), False


def _autocast(precision: str, device: torch.device, is_here: bool) -> torch.dtype | None:
    if precision == "auto":
        on_gpu = torch.bfloat16 if device.type == "cuda" else None
        return choose_precision(precision, device) if is_here else on_gpu
    if precision == "fp16":
        choose_precision(precision, device)  # which some kinds of device have on no machine
    return _PRECISIONS[precision]


def _obstacle(config: RunConfig, backend: str, option: str) -> str | None:
    """Return why a run could not start here, None where it can."""
    try:
        device = choose_device(config.trainer.device)
        check_backend(backend, device, choose_precision(config.trainer.precision, device) or torch.float32)
    except FambaError as error:
        return str(error).replace("ops.backend", option)
    return None


def measure(plans: Sequence[Planned], batch: int, rounds: int) -> list[Planned]:
    """Time training steps of each on this machine, one after the other in turn, by the median.

    Raises ConfigError where one of them cannot run here, or cannot pair so many images.
    """
    for one in plans:
        if one.obstacle is not None:
            raise ConfigError(f"--measure times steps here, where {one.name} cannot run: {one.obstacle}")
    race = Race("step", plans[0].setup.device)
    for one in plans:
        trainer, ops = replace(one.config.trainer, batch_size=batch, accumulation=1), one.config.ops
        config = replace(one.config, trainer=trainer, ops=replace(ops, backend=one.backend))
        try:
            check_batch(config, 1)
        except ConfigError as error:
            raise ConfigError(str(error).replace("trainer.batch_size", "--batch")) from error
        TimedStep(config, one.setup).enter(race, one.name)
    race.run(rounds)
    return [replace(one, step_ms=race.entries(one.name)["ms"]) for one in plans]


def rows(plans: Sequence[Planned]) -> pd.DataFrame:
    """Return each configuration in numbers, with units in the names of the columns."""
    found = []
    for one in plans:
        base = next(other for other in plans if other.config == _unfused(one.config))
        step = None if one.step_ms is None or base.step_ms is None else one.step_ms / base.step_ms
        row = {
            "model": one.config.model.name,
            "name": one.name,
            "strategy": one.config.fusion.strategy,
            "tokens": one.setup.tokens,
            "tokens_removed": sum(one.setup.schedule),
            "tokens_left": one.tokens[-1],
            "token_layers_of_none": one.cost.token_layers / base.cost.token_layers,
            "parameters": one.parameters,
            "macs_per_image": one.cost.macs,
            "step_time_of_none_predicted": one.cost.macs / base.cost.macs,
            "step_ms_measured": one.step_ms,
            "step_time_of_none_measured": step,
            "saved_bytes_per_image": one.cost.saved_bytes,
            "saved_bytes_of_none": one.cost.saved_bytes / base.cost.saved_bytes,
            "memory_bytes_predicted": one.memory,
            "memory_of_none_predicted": one.memory / base.memory,
            "schedule": " ".join(map(str, one.setup.schedule)),
        }
        found.append(row)
    return pd.DataFrame(found)


def tables(plans: Sequence[Planned]) -> str:
    """Return tokens, multiply-adds and bytes layer by layer, and the totals, as text."""
    parts = []
    for title, (part, unit, form) in _BY_LAYER.items():
        columns = {one.name: pd.Series([getattr(layer, part) / unit for layer in one.cost.layers]) for one in plans}
        table = pd.DataFrame(columns).rename_axis("layer").map(lambda cell, form=form: format(cell, form))
        text = table.replace("nan", "").to_markdown(tablefmt="simple", disable_numparse=True, stralign="right")
        parts.append(f"{title}\n{text}\n")
    values = rows(plans)
    values["left"] = values["tokens_left"].astype(str) + " of " + values["tokens"].astype(str)
    shown = {
        title: [form.format(cell if unit == 1 else cell / unit) for cell in values[name]]
        for title, (name, unit, form) in _TOTALS.items()
        if values[name].notna().all()
    }
    sides = ["left", *["right"] * (len(shown) - 1)]
    totals = pd.DataFrame(shown).to_markdown(index=False, tablefmt="simple", disable_numparse=True, colalign=sides)
    return "\n".join([*parts, "In total", totals, "", *_notes(plans)])


def _notes(plans: Sequence[Planned]) -> list[str]:
    computed = " and ".join(dict.fromkeys(f"{str(one.setup.dtype)[6:]} by {one.backend}" for one in plans))
    batches = " and ".join(dict.fromkeys(str(one.batch) for one in plans))
    notes = [
        "Layers are counted from 0 at the input, as fusion.layers takes them.",
        "Multiply-adds are those of one image's forward pass, what papers on vision backbones call FLOPs: matrix "
        "products, convolutions, attention, scans and similarities between tokens. A step does three times as many.",
        "Step time, relative to none, is predicted from them: nearly all of the work is linear in multiply-adds.",
        f"Kept is what autograd holds of one image for the backward, computed in {computed}; memory adds weights, "
        f"gradients and AdamW's moments, for {batches} images.",
    ]
    obstacles = dict.fromkeys(one.obstacle for one in plans if one.obstacle)
    notes += [f"Planned for another machine; here it could not run: {reason}." for reason in obstacles]
    if any(one.config.fusion.strategy == ADAPTIVE for one in plans):
        notes.append("What adaptive removes where is measured in training; until then it is spread as that of all.")
    if not all(one.setup.matched for one in plans):
        notes.append("Counts per layer are as given: their totals are not matched between strategies.")
    return notes


def files(plans: Sequence[Planned]) -> dict[str, str | bytes]:
    """Return plan.csv, plan.json, tokens.svg and tokens.png."""
    found = rows(plans)
    layers = [[asdict(layer) for layer in one.cost.layers] for one in plans]
    nested = found.astype(object).where(found.notna(), None).assign(layers=layers).to_dict("records")
    content = json.dumps(nested, indent=2) + "\n"
    with drawing():
        figure = tokens_plot({one.name: (one.config.fusion.strategy, one.tokens) for one in plans})
        pictures = {f"tokens.{kind}": rendered(figure, kind) for kind in ("svg", "png")}
    return {"plan.csv": found.to_csv(index=False, lineterminator="\n"), "plan.json": content, **pictures}


def tokens_plot(sequences: Mapping[str, tuple[str, Sequence[int]]]) -> Figure:
    """Draw tokens over layers: for each name its strategy, and the tokens before the first layer and after each.

    Curves that are equal are drawn as one, under all of their names.
    """
    figure = Figure(figsize=(8.0, 4.0), layout="constrained")
    axes = figure.add_subplot()
    equal: dict[tuple[int, ...], list[str]] = {}
    for name, (_, tokens) in sequences.items():
        equal.setdefault(tuple(tokens), []).append(name)
    styles = looks([sequences[names[0]][0] for names in equal.values()])
    for (tokens, names), style in zip(equal.items(), styles, strict=True):
        axes.plot(range(len(tokens)), tokens, **style.marked(4.5), linestyle=style.line, label=" = ".join(names))
    axes.set(xlabel="layers done", ylabel="tokens")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(visible=True)
    figure.legend(loc="outside right upper", handlelength=3.5)
    return figure
