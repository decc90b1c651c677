"""`famba plan`: what strategies cost, counted before anything runs."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tabulate import tabulate
from torch._subclasses.fake_tensor import FakeTensorMode

from famba.analysis.benchmark.steps import TimedStep
from famba.analysis.benchmark.timing import Race
from famba.analysis.figures import drawing, save
from famba.analysis.palette import looks
from famba.errors import ConfigError, FambaError, check_choice
from famba.files import write_whole
from famba.fusion import Fusion, labels
from famba.fusion.schedules import ADAPTIVE, NONE
from famba.ops.registry import AUTO, backends, counting_as, resolve
from famba.training.compose import compose_all
from famba.training.config import RunConfig, flatten, plain
from famba.training.devices import choose_device, choose_precision
from famba.training.measure import Cost, LayerCost, cost
from famba.training.setup import Setup, build_model, check_backend, check_batch, check_cuda_graphs, prepare

# Weights, gradients and AdamW's two moments, in float32.
_BYTES_PER_PARAMETER = 16
_MIB = 2**20
_DEVICES = ("cuda", "mps")
_PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Planned:
    """One configuration, where it would run, and what it costs.

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
        """Images whose tensors are kept at once in one process."""
        return self.config.trainer.batch_size // self.config.trainer.accumulation

    @property
    def memory(self) -> int:
        """Bytes of weights, gradients, optimizer, and what a step keeps for the backward, cast weights among it."""
        cast = 0 if self.setup.autocast is None else self.setup.autocast.itemsize
        return (_BYTES_PER_PARAMETER + cast) * self.parameters + self.batch * self.cost.saved_bytes


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
    """Name each by its fusion, and by what else differs among those that are planned."""
    flat = [flatten(plain(config)) for config in configs]
    differ = [key for key in flat[0] if not key.startswith("fusion.") and len({json.dumps(f[key]) for f in flat}) > 1]
    model = ["model.name"] if "model.name" in differ else []
    others = [key for key in differ if key != "model.name"]
    return [
        " ".join([*(values[key] for key in model), label, *(f"{key.split('.')[-1]}={values[key]}" for key in others)])
        for values, label in zip(flat, labels([one.fusion for one in configs]), strict=True)
    ]


def _planned(name: str, config: RunConfig, asked: str | None) -> Planned:
    """Count for a device, a precision and a backend, none of which need be on this machine.

    A choice that "auto" leaves open is made as on this machine, and for a GPU that is not here as on most: bfloat16, by
    the Triton kernels.
    """
    option, backend = ("ops.backend", config.ops.backend) if asked is None else ("--backend", asked)
    check_choice(option, backend, [*backends(), AUTO])
    obstacle = _obstacle(config, backend, option)
    device, is_here = _device(config.trainer.device)
    autocast = _autocast(config.trainer.precision, device, is_here)
    if backend == AUTO and not is_here and device.type == "cuda" and find_spec("triton"):
        backend = "triton"
    if backend == AUTO:
        backend = resolve(device.type, autocast or torch.float32)
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


def tables(plans: Sequence[Planned]) -> str:
    """Return tokens, multiply-adds and bytes layer by layer, and the totals, as text."""
    totals = [_row(one, values) for one, values in zip(plans, _values(plans), strict=True)]
    sides = ["left", *["right"] * (len(totals[0]) - 1)]
    parts = [
        _by_layer(plans, "Tokens after each layer's fusion", lambda layer: layer.leaving),
        _by_layer(plans, "Multiply-adds per image, millions", lambda layer: layer.macs / 1e6),
        _by_layer(plans, "Kept for the backward per image, kB", lambda layer: layer.saved_bytes / 1e3),
        "In total",
        tabulate(totals, headers="keys", disable_numparse=True, colalign=sides),
        "",
        *_notes(plans),
    ]
    return "\n".join(parts)


def write(plans: Sequence[Planned], folder: Path) -> None:
    """Write plan.csv, plan.json, tokens.svg and tokens.png."""
    rows, text = _values(plans), io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(folder / "plan.csv", lambda file: Path(file).write_text(text.getvalue()))
    layers = [[asdict(layer) for layer in one.cost.layers] for one in plans]
    content = json.dumps([row | {"layers": of} for row, of in zip(rows, layers, strict=True)], indent=2) + "\n"
    write_whole(folder / "plan.json", lambda file: Path(file).write_text(content))
    curves = {one.name: [one.setup.tokens, *(layer.leaving for layer in one.cost.layers)] for one in plans}
    with drawing():
        save(tokens_plot({one.name: (one.config.fusion.strategy, curves[one.name]) for one in plans}), folder, "tokens")


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
        look: dict[str, Any] = {"linestyle": style.line, "color": style.color, "marker": style.marker}
        look |= {"markersize": 4.5, "markerfacecolor": style.face}
        axes.plot(range(len(tokens)), tokens, label=" = ".join(names), **look)
    axes.set(xlabel="layers done", ylabel="tokens")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(visible=True)
    figure.legend(loc="outside right upper", handlelength=3.5)
    return figure


def _by_layer(plans: Sequence[Planned], title: str, value: Callable[[LayerCost], float]) -> str:
    depth = max(len(one.cost.layers) for one in plans)
    columns = [[value(layer) for layer in one.cost.layers] for one in plans]
    rows = [[index, *(column[index] if index < len(column) else None for column in columns)] for index in range(depth)]
    whole = all(isinstance(cell, int) for column in columns for cell in column)
    table = tabulate(rows, headers=["layer", *(one.name for one in plans)], floatfmt=".0f" if whole else ".2f")
    return f"{title}\n{table}\n"


def _values(plans: Sequence[Planned]) -> list[dict[str, Any]]:
    """Return each configuration in numbers, with units in their names."""
    found = []
    for one in plans:
        base = next(other for other in plans if other.config == _unfused(one.config))
        is_timed = one.step_ms is not None and base.step_ms is not None
        removed = sum(one.setup.schedule)
        found.append(
            {
                "model": one.config.model.name,
                "name": one.name,
                "strategy": one.config.fusion.strategy,
                "tokens": one.setup.tokens,
                "tokens_removed": removed,
                "tokens_left": one.setup.tokens - removed,
                "token_layers_of_none": one.cost.token_layers / base.cost.token_layers,
                "parameters": one.parameters,
                "macs_per_image": one.cost.macs,
                "step_time_of_none_predicted": one.cost.macs / base.cost.macs,
                "step_ms_measured": one.step_ms,
                "step_time_of_none_measured": one.step_ms / base.step_ms if is_timed else None,  # type: ignore[operator]
                "saved_bytes_per_image": one.cost.saved_bytes,
                "saved_bytes_of_none": one.cost.saved_bytes / base.cost.saved_bytes,
                "memory_bytes_predicted": one.memory,
                "memory_of_none_predicted": one.memory / base.memory,
                "schedule": " ".join(map(str, one.setup.schedule)),
            }
        )
    return found


def _row(one: Planned, values: Mapping[str, Any]) -> dict[str, str]:
    row = {
        "fusion": one.name,
        "removed": str(values["tokens_removed"]),
        "left": f"{values['tokens_left']} of {one.setup.tokens}",
        "token-layers": f"{values['token_layers_of_none']:.3f}",
        "G multiply-adds": f"{one.cost.macs / 1e9:.3f}",
        "step time, of none": f"{values['step_time_of_none_predicted']:.3f}",
        "kept, MB": f"{one.cost.saved_bytes / 1e6:.2f}",
        "kept, of none": f"{values['saved_bytes_of_none']:.3f}",
        "memory, MiB": f"{one.memory / _MIB:,.0f}",
        "memory, of none": f"{values['memory_of_none_predicted']:.3f}",
    }
    if one.step_ms is not None:
        row["step, ms, measured"] = f"{one.step_ms:.1f}"
        row["step time, of none, measured"] = f"{values['step_time_of_none_measured']:.3f}"
    return row


def _notes(plans: Sequence[Planned]) -> list[str]:
    computed = " and ".join(dict.fromkeys(f"{str(one.setup.dtype)[6:]} by {one.backend}" for one in plans))
    batches = " and ".join(dict.fromkeys(str(one.batch) for one in plans))
    notes = [
        "Layers are counted from 0 at the input, as fusion.layers takes them.",
        "Multiply-adds are those of one image's forward pass, what papers on vision backbones call FLOPs: matrix "
        "products, convolutions, attention, scans and similarities between tokens. A step does three times as many.",
        "Step time, of none, is predicted from them: nearly all of the work is linear in multiply-adds.",
        f"Kept is what autograd holds of one image for the backward, computed in {computed}; memory adds weights, cast "
        f"weights, gradients and AdamW's moments, for {batches} images.",
    ]
    obstacles = dict.fromkeys(one.obstacle for one in plans if one.obstacle)
    notes += [f"Planned for another machine; here it could not run: {reason}." for reason in obstacles]
    if any(one.config.fusion.strategy == ADAPTIVE for one in plans):
        notes.append("What adaptive removes where is measured in training; until then it is spread as that of all.")
    if not all(one.setup.matched for one in plans):
        notes.append("Counts per layer are as given: their totals are not matched between strategies.")
    return notes
