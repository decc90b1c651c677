"""Time the training step that `train.py` does, on random images."""

from __future__ import annotations

import itertools
from dataclasses import replace
from tempfile import gettempdir
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from famba import data
from famba.analysis.benchmark.report import Row
from famba.analysis.benchmark.timing import Race
from famba.analysis.options import chosen_backend
from famba.fusion import tokens_per_layer
from famba.ops.registry import resolve
from famba.training.checkpoint import TrainedOn
from famba.training.compose import compose
from famba.training.config import RunConfig
from famba.training.distributed import Process
from famba.training.graph import GraphStep, obstacle
from famba.training.measure import saved_bytes_per_image
from famba.training.setup import Setup, prepare
from famba.training.step import Step
from famba.training.trainer import new_state

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
        return replace(compose([*asked, f"trainer.device={device}", *self.more]), run_dir=gettempdir())


class TimedStep:
    """Training steps of a run without its loop; a CUDA graph where the run's would be one."""

    def __init__(self, config: RunConfig, setup: Setup | None = None) -> None:
        self.config, self.setup = config, setup or prepare(config)
        device = self.setup.device
        self.batch = _random_batch(config, self.setup)
        with chosen_backend(config.ops.backend):
            fused = obstacle(config, device, 1, resolve(device.type, self.setup.dtype)) is None
        classes = config.data.num_classes or data.num_classes_of(config.data.name) or _CLASSES
        state = new_state(config, self.setup, TrainedOn(classes, None, {}), device, fresh=False, fused=fused)
        self.model = state.model.train()
        forward: nn.Module = self.model
        if config.trainer.compile:
            forward = cast(nn.Module, torch.compile(self.model, fullgraph=True, dynamic=False))
        self.step = (GraphStep if fused else Step)(config, state, forward, Process(0, 1, device), self.setup.autocast)

    def enter(self, race: Race, name: str) -> None:
        """Let the training step enter a race, where it is a graph with one that is none beside it."""
        if not isinstance(self.step, GraphStep):
            race.enter(name, [self.train], graph=self.train)
            return
        self.train()  # which captures
        eager = TimedStep(replace(self.config, trainer=replace(self.config.trainer, cuda_graphs=False)), self.setup)
        race.enter(name, [eager.train], graph=self.step.replay)

    def train(self) -> None:
        """Do a training step."""
        with chosen_backend(self.config.ops.backend):
            self.step.gradients(itertools.repeat(self.batch))
            self.step.update()


def enter(race: Race, one: Contestant, rows: list[Row]) -> None:
    """Let a contestant's step enter a race, and add its row, which `finish` completes."""
    step = TimedStep(one.config(race.device))
    step.enter(race, one.name)
    model = step.model
    left = sum(tokens_per_layer(model.fusion, model.num_tokens)) / (model.depth * model.num_tokens)
    row: Row = {"contestant": one.name, "precision": one.precision, "tokens": model.num_tokens, "batch": one.batch}
    saved = saved_bytes_per_image(model, step.setup.image_size, step.setup.autocast)
    rows.append({**row, "token_layers": left, **race.entries(one.name), "saved_bytes_per_image": saved})


def finish(race: Race, rows: list[Row]) -> None:
    """Complete the rows of all that have entered by what was measured."""
    for row in rows:
        row |= race.entries(row["contestant"])
        row["images_per_s"] = 1000 * row["batch"] / row["ms"]
    none = next((row["ms"] for row in rows if row["contestant"] == "none"), None)
    for row in rows:
        row["of_none"] = none and row["ms"] / none


def _random_batch(config: RunConfig, setup: Setup) -> tuple[Tensor, Tensor]:
    """Return images (b, 3, s, s) and labels (b,) of a step's size on the device."""
    size, generator = config.trainer.batch_size, torch.Generator().manual_seed(0)
    images = torch.randn(size, 3, setup.image_size, setup.image_size, generator=generator)
    return images.to(setup.device), torch.randint(2, (size,), generator=generator).to(setup.device)
