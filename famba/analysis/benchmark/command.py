"""Time ops, training steps, and what docs/performance.md says of a GPU: `famba benchmark`.

A step is that of `train.py` on random images.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from famba import data
from famba.analysis import options as shared
from famba.analysis.benchmark import ops, timing
from famba.analysis.benchmark.timing import Race, Report, Row, keep_freed_memory
from famba.data.augment import Normalize, training_transform
from famba.errors import ConfigError, FambaError, TrainingError
from famba.fusion import tokens_per_layer
from famba.ops import backends, use_backend
from famba.ops.registry import AUTO, resolve
from famba.training.build import augmentation
from famba.training.checkpoint import TrainedOn
from famba.training.compose import compose
from famba.training.config import RunConfig
from famba.training.devices import has_bf16, out_of_memory
from famba.training.distributed import Process
from famba.training.graph import GraphStep, obstacle
from famba.training.measure import provenance, saved_bytes_per_image
from famba.training.setup import Setup, prepare
from famba.training.step import Step
from famba.training.trainer import new_state


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what can be timed, and its options."""
    parser.description = "Time contestants in turn, after a warm-up. A table on stdout, progress on stderr."
    kinds = parser.add_subparsers(title="what to time", required=True, metavar="WHAT")
    shown: dict[str, Any] = {"metavar": "N", "help": "default: %(default)s"}

    def kind(name: str, text: str, measure: Callable[..., None], rounds: int) -> argparse.ArgumentParser:
        added = kinds.add_parser(name, help=text, description=f"Time {text}.")
        added.add_argument("--rounds", type=shared.count, default=rounds, **shown)
        added.add_argument("--device", default="auto", help="auto (default), cpu, cuda or mps")
        added.add_argument("--json", type=Path, metavar="FILE", help="write everything measured to FILE as well")
        added.set_defaults(measure=measure, what=name, precision=None)
        return added

    of_ops = kind("ops", "each op by every backend", _measure_ops, 9)
    of_ops.add_argument("--op", nargs="+", choices=ops.OPS, default=list(ops.OPS), help="default: all")
    of_ops.add_argument("--batch", nargs="+", type=shared.count, default=[8, 32], **shown)
    of_ops.add_argument("--length", nargs="+", type=shared.count, default=[65, 197, 785], **shown)
    of_model = kind("model", "a training step of Vim by strategy, and of a DeiT", _measure_models, 5)
    of_model.add_argument("--model", nargs="+", choices=DEITS, default=list(DEITS), help="default: both")
    of_model.add_argument("--batch", type=shared.count, default=32, **shown)
    for one in (of_ops, of_model):
        one.add_argument("--precision", nargs="+", choices=ops.DTYPES, help="default: fp32 and bf16")
    of_gpu = kind("gpu", "a CUDA device: tables of training steps and ops", measure_gpu, 5)
    of_gpu.add_argument("--minutes", type=shared.count, default=8, metavar="N", help="stop in time (default: 8)")


def run(options: argparse.Namespace) -> int:
    """Measure, and print what was measured, also after an error or Ctrl-C, since measuring takes long."""
    options.device = device = shared.device(options.device)
    if options.what == "gpu":
        check(device)
    options.precision = options.precision or (["fp32", "bf16"] if has_bf16(device) else ["fp32"])
    if "fp16" in options.precision and device.type != "cuda":
        raise ConfigError(f"fp16 is timed on CUDA devices alone, this is a {device.type} device; use fp32 or bf16")
    try:
        if options.json is not None:
            # Found out now: after the measuring it would be lost.
            options.json.open("a").close()
    except OSError as error:
        raise ConfigError(f"--json {options.json} cannot be written ({error.strerror}); name another file") from error
    settings = {name: value for name, value in vars(options).items() if isinstance(value, int | list | str)}
    report = Report(options.what, provenance(device, 0, 1), settings, notes=[timing.NOTE] * (device.type == "cuda"))
    keep_freed_memory()
    try:
        options.measure(options, report)
        report.complete = True
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise TrainingError(f"out of memory ({error!r}); use a smaller --batch or --length") from error
    finally:
        if any(report.tables.values()):
            print(report.text())
            report.write(options.json)
    return 0


def _measure_ops(options: argparse.Namespace, report: Report) -> None:
    if min(options.length) < 3 and {"match_tokens", "fuse_tokens"} & set(options.op):
        raise ConfigError(f"--length is {min(options.length)}; match_tokens and fuse_tokens need 3 tokens")
    report.notes.append(ops.NOTE)
    for op, precision, batch, length in product(options.op, options.precision, options.batch, options.length):
        ops.measure(ops.Case(op, batch, length, precision=precision), options.device, options.rounds, report)


def _measure_models(options: argparse.Namespace, report: Report) -> None:
    report.notes.append(NOTE)
    for name, precision in product(options.model, options.precision):
        contestants = [Contestant(s, name, s, options.batch, 224, precision) for s in STRATEGIES]
        contestants.append(Contestant(DEITS[name], DEITS[name], "none", options.batch, 224, precision))
        _measure_steps(f"{name}, {precision}", contestants, options, report, lambda _, call: call())


def _measure_steps(
    title: str,
    contestants: Sequence[Contestant],
    options: argparse.Namespace,
    report: Report,
    attempt: Callable[[str, Callable[[], object]], object],
) -> None:
    """Add a table of steps to the report; attempt: calls what lets the contestant of a name enter the race."""
    race = Race(f"{title}, {contestants[0].batch} images of {contestants[0].image_size} pixels", options.device)
    report.tables[race.title] = rows = list[Row]()
    try:
        for one in contestants:
            attempt(f"{race.title}: {one.name}", partial(enter, race, one, rows))
        race.run(options.rounds)
    finally:
        for row in rows:
            row |= race.entries(row["contestant"])
            row["images_per_s"] = 1000 * row["batch"] / row["ms"]
        none = next((row["ms"] for row in rows if row["contestant"] == "none"), None)
        for row in rows:
            row["of_none"] = none and row["ms"] / none


NOTE = "a step is that of `train.py recipe=light` on random images that lie on the device"
STRATEGIES = ("none", "all", "interleaved", "lower", "upper")
# Each Vim's counterpart, by their timm names.
DEITS = {"vim_tiny_patch16_224": "deit_tiny_patch16_224", "vim_small_patch16_224": "deit_small_patch16_224"}
_CLASSES = 100


class Contestant(NamedTuple):
    """Name a model of a table of steps by its timm name, at a batch and size; more: overrides of its configuration."""

    name: str
    model: str
    strategy: str
    batch: int
    image_size: int
    precision: str
    more: tuple[str, ...] = ()

    def config(self, device: torch.device) -> RunConfig:
        """Compose its run of `recipe=light`; raises ConfigError as `train.py` does."""
        group = "vit_tiny" if self.model in DEITS.values() else "vim_ti"
        asked = [f"model={group}", f"model.name={self.model}", f"fusion={self.strategy}", "data=digits", "recipe=light"]
        asked += [f"model.num_classes={_CLASSES}", f"data.image_size={self.image_size}", "recipe.warmup_epochs=0"]
        asked += [f"trainer.batch_size={self.batch}", f"trainer.precision={self.precision}", "trainer.epochs=2"]
        return compose([*asked, f"trainer.device={device}", *self.more])


class TimedStep:
    """Training steps of a run without its loop; a CUDA graph where the run's would be one."""

    def __init__(self, config: RunConfig, setup: Setup | None = None) -> None:
        self.config, self.setup = config, setup or prepare(config)
        device, size, generator = self.setup.device, self.setup.image_size, torch.Generator().manual_seed(0)
        images = torch.randn(config.trainer.batch_size, 3, size, size, generator=generator).to(device)
        self.batch = images, torch.randint(2, (len(images),), generator=generator).to(device)
        chosen = config.ops.backend
        self.computing = nullcontext if chosen == AUTO else partial(use_backend, chosen)
        with self.computing():
            fused = obstacle(config, device, 1, resolve(device.type, self.setup.dtype)) is None
        classes = config.data.num_classes or data.NUM_CLASSES.get(config.data.name) or _CLASSES
        state = new_state(config, self.setup, TrainedOn(classes, None, {}), device, fresh=False, fused=fused)
        self.model = state.model.train()
        forward: nn.Module = self.model
        if config.trainer.compile:
            forward = cast(nn.Module, torch.compile(self.model, fullgraph=True, dynamic=False))
        self.step = (GraphStep if fused else Step)(config, state, forward, Process(0, 1, device), self.setup.autocast)

    def train(self) -> None:
        """Do a training step."""
        with self.computing():
            self.step.gradients(itertools.repeat(self.batch))
            self.step.update()


def enter(race: Race, one: Contestant, rows: list[Row]) -> None:
    """Let a step enter a race, beside a graph one that is none, and add its row, of what is known by now."""
    step = TimedStep(one.config(race.device))
    if isinstance(step.step, GraphStep):
        step.train()  # which captures
        trainer = replace(step.config.trainer, cuda_graphs=False)
        eager = TimedStep(replace(step.config, trainer=trainer), step.setup)
        race.enter(one.name, [eager.train], graph=step.step.replay)
    else:
        race.enter(one.name, [step.train], graph=step.train)
    model = step.model
    left = sum(tokens_per_layer(model.fusion, model.num_tokens)) / (model.depth * model.num_tokens)
    row: Row = {"contestant": one.name, "precision": one.precision, "tokens": model.num_tokens, "batch": one.batch}
    saved = saved_bytes_per_image(model, step.setup.image_size, step.setup.autocast)
    rows.append({**row, "token_layers": left, **race.entries(one.name), "saved_bytes_per_image": saved})


PRECISION, (_TINY, _SMALL) = "bf16", DEITS


def blocks(device: torch.device) -> Iterator[tuple[str, list[Contestant]]]:
    """Yield title and contestants of each table of steps, in order of value; none for that of ops."""
    size, pair, deit = (128, 224, PRECISION), ("none", "upper"), DEITS[_TINY]
    yield "Vim-Ti", [Contestant(s, _TINY, s, *size) for s in STRATEGIES]
    dtype = ops.DTYPES[PRECISION]
    others = (name for name in backends() if name not in ("reference", resolve(device.type, dtype)))
    for name in (name for name in others if ops.obstacle(name, device, dtype) is None):
        yield f"Vim-Ti by {name}", [Contestant(s, _TINY, s, *size, (f"ops.backend={name}",)) for s in pair]
    compiled = Contestant("DeiT-Ti, torch.compile", deit, "none", *size, ("trainer.compile=true",))
    yield "timm's DeiT-Ti", [Contestant("DeiT-Ti", deit, "none", *size), compiled]
    yield "Ops", []
    four = ("model.patch_size=4",)
    yield "Vim-Ti, patches of 4", [Contestant(s, _TINY, s, 512, 32, PRECISION, four) for s in pair]
    yield "Vim-Ti, 785 tokens", [Contestant(s, _TINY, s, 32, 448, PRECISION) for s in pair]
    yield "Vim-S", [Contestant(s, _SMALL, s, *size) for s in pair]


def cases() -> list[ops.Case]:
    """Return the ops at the size of Vim-Ti."""
    outer = ("add_rms_norm", "match_tokens", "fuse_tokens")
    return [ops.Case(op, 128, 197, 192 if op in outer else 384, 16, PRECISION) for op in ops.OPS]


def check(device: torch.device) -> None:
    """Raise ConfigError where a device is no GPU, or steps on it would take minutes."""
    if device.type != "cuda":
        raise ConfigError(
            f"famba benchmark gpu measures a CUDA device, and was given {device} (torch {torch.__version__}); "
            "run it on a machine with an NVIDIA GPU and its driver"
        )
    if resolve(device.type, ops.DTYPES[PRECISION]) == "reference":
        raise ConfigError("only the reference serves this GPU, and its steps take minutes; famba doctor says why")


def measure_gpu(options: argparse.Namespace, report: Report) -> None:
    """Measure block by block while there is time; the report is written after each contestant."""
    end, longest = time.monotonic() + 60 * options.minutes, 0.0
    report.notes += [NOTE, ops.NOTE]

    def attempt(name: str, call: Callable[[], object]) -> None:
        """Do what there is time for, which is where the longest before would fit; go on after what fails."""
        nonlocal longest
        if (began := time.monotonic()) + longest > end:
            report.left_out[name] = f"no time was left of --minutes {options.minutes}"
            return
        try:
            call()
        except (FambaError, RuntimeError) as error:
            report.left_out[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        longest = max(longest, time.monotonic() - began)
        report.write(options.json)

    for title, contestants in blocks(options.device):
        if not contestants:
            attempt("augmentation", partial(_measure_augmentation, options.device, options.rounds, report))
            for case in cases():
                attempt(case.op, partial(ops.measure, case, options.device, options.rounds, report))
            continue
        _measure_steps(title, contestants, options, report, attempt)


def _measure_augmentation(device: torch.device, rounds: int, report: Report) -> None:
    """Add the time in which recipe=paper augments the images of a step, as many and as large as those of Vim-Ti."""
    config, images = compose(["recipe=paper"]), torch.randint(256, (128, 3, 32, 32), dtype=torch.uint8, device=device)
    normalize = Normalize(config.data.mean, config.data.std)
    whole = training_transform(augmentation(config), 224, normalize, 0).whole
    assert whole is not None, "it takes whole batches"
    race, call = Race("Augmentation, 128 images of 224 pixels", device), partial(whole, images, 0, 0)
    name = "recipe=paper, without a graph"  # since its shapes follow what is drawn
    race.enter(name, [call], graph=call)
    race.run(rounds)
    report.tables[race.title] = [{"contestant": name, **race.entries(name)}]
