"""Time the training step that `train.py` does, on random images: by itself, and in the loop of a run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from famba import data
from famba.analysis.benchmark import floors
from famba.analysis.benchmark.ops import DTYPES
from famba.analysis.benchmark.report import Row
from famba.analysis.benchmark.timing import Race
from famba.analysis.options import chosen_backend
from famba.fusion import tokens_per_layer
from famba.models import Vim
from famba.ops.registry import resolve
from famba.training.build import Loaders
from famba.training.checkpoint import TrainedOn
from famba.training.compose import compose
from famba.training.config import RunConfig
from famba.training.distributed import Process
from famba.training.graph import GraphStep, obstacle
from famba.training.interrupts import StopRequest
from famba.training.measure import saved_bytes_per_image
from famba.training.run_folder import RunFolder
from famba.training.setup import Setup, prepare
from famba.training.step import Step
from famba.training.trainer import Training, new_state

NOTE = "a step is that of `train.py recipe=light` on random images that lie on the device"
# Each Vim's counterpart, by their timm names.
DEITS = {"vim_tiny_patch16_224": "deit_tiny_patch16_224", "vim_small_patch16_224": "deit_small_patch16_224"}
_CLASSES, _EPOCH_STEPS = 100, 20
_Batch = tuple[Tensor, Tensor]


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
        return replace(compose([*asked, f"trainer.device={device}", *self.more]), run_dir=gettempdir())


class TimedStep:
    """Training steps and inferences of a run without its loop; a CUDA graph where the run's would be one."""

    def __init__(self, config: RunConfig, setup: Setup | None = None) -> None:
        self.config, self.setup = config, setup or prepare(config)
        device = self.setup.device
        self.batch = _random_batch(config, self.setup)
        with chosen_backend(config.ops.backend):
            fused = obstacle(config, device, 1, resolve(device.type, self.setup.dtype)) is None
        classes = config.data.num_classes or data.num_classes_of(config.data.name) or _CLASSES
        state = new_state(config, self.setup, TrainedOn(classes, None, {}), device, fresh=False, fused=fused)
        self.model = state.model
        forward: nn.Module = self.model
        if config.trainer.compile:
            forward = cast(nn.Module, torch.compile(self.model, fullgraph=True, dynamic=False))
        self.step = (GraphStep if fused else Step)(config, state, forward, Process(0, 1, device), self.setup.autocast)
        self._infer = Step.infer(self.step, self.model)

    def enter(self, race: Race, name: str) -> None:
        """Let the training step enter a race, where it is a graph with one that is none beside it."""
        self.model.train()
        if not isinstance(self.step, GraphStep):
            race.enter(name, [self.train], graph=self.train)
            return
        self.train()  # which captures
        eager = TimedStep(replace(self.config, trainer=replace(self.config.trainer, cuda_graphs=False)), self.setup)
        race.enter(name, [eager.train], graph=self.step.replay)

    def train(self) -> None:
        """Do a training step; the model has to be in training mode."""
        with chosen_backend(self.config.ops.backend):
            self.step.gradients(itertools.repeat(self.batch))
            self.step.update()

    @torch.no_grad()
    def infer(self) -> None:
        """Do an inference; the model has to be in evaluation mode."""
        with chosen_backend(self.config.ops.backend):
            self._infer(self.batch[0])


def measure(
    race: Race,
    contestants: Iterable[Contestant],
    rounds: int,
    rows: list[Row],
    entered: Callable[[Contestant, Row], None] = lambda one, row: None,
    attempt: Callable[[str, Callable[[], None]], None] = lambda name, enter: enter(),
) -> dict[str, TimedStep]:
    """Time training steps in turn, in so many rounds, add a row for each contestant, and return the steps.

    `entered` is called with each and its row after its first sample; `attempt` lets one enter, or leaves it out.
    """
    steps: dict[str, TimedStep] = {}

    def enter(one: Contestant) -> None:
        step = steps[one.name] = TimedStep(one.config(race.device))
        model, floor = step.model, None
        step.enter(race, one.name)
        left = sum(tokens_per_layer(model.fusion, model.num_tokens)) / (model.depth * model.num_tokens)
        row: Row = {"contestant": one.name, "precision": one.precision, "tokens": model.num_tokens, "batch": one.batch}
        if one.model not in DEITS.values():
            passes, _ = floors.step(cast(Vim, model), one.batch, DTYPES[one.precision].itemsize)
            floor = floors.floor_here(passes, race.device, one.precision)
        row |= {"token_layers": left, **race.entries(one.name), "images_per_s": None, "floor_ms": floor}
        row["saved_bytes_per_image"] = saved_bytes_per_image(model, one.image_size, step.setup.autocast)
        rows.append(row)
        entered(one, row)

    try:
        for one in contestants:
            attempt(f"{race.title}: {one.name}", partial(enter, one))
        race.run(rounds)
    finally:
        for row in rows:
            row |= race.entries(row["contestant"])
            row["images_per_s"] = 1000 * row["batch"] / row["ms"]
            row["floor_share"] = row["floor_ms"] and row["floor_ms"] / row["ms"]
    return steps


def loop_ms(config: RunConfig) -> float:
    """Return the milliseconds of a step in the loop of `train.py`: of the second epoch of 20 steps."""
    with TemporaryDirectory() as folder, StopRequest() as stop, chosen_backend(config.ops.backend):
        config = replace(config, run_dir=folder, trainer=replace(config.trainer, eval_every=2))
        setup = prepare(config)
        run = Training(config, setup, RunFolder(Path(folder), writes=True), Process(0, 1, setup.device), stop)
        batch = _random_batch(config, setup)
        # The same batch for ever, which lies on the device: nothing is read, and nothing copied.
        train: Any = SimpleNamespace(epoch=lambda epoch, first: (batch for _ in itertools.count()))
        run.loaders = Loaders(train, "test", [batch], [batch])
        run.steps_per_epoch, run.total_steps = _EPOCH_STEPS, 2 * _EPOCH_STEPS
        run.run()
        totals = run.state.totals
        return 1000 * (totals.epoch_data_s + totals.epoch_step_s) / totals.epoch_steps


def _random_batch(config: RunConfig, setup: Setup) -> _Batch:
    """Return images (b, 3, s, s) and labels (b,) of a step's size on the device."""
    size, generator = config.trainer.batch_size, torch.Generator().manual_seed(0)
    images = torch.randn(size, 3, setup.image_size, setup.image_size, generator=generator)
    return images.to(setup.device), torch.randint(2, (size,), generator=generator).to(setup.device)
