"""Build the parts of a run that need data or memory: loaders, network, optimizer."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import Tensor

from famba import data
from famba.data.draws import Stream
from famba.errors import named
from famba.training.config import RunConfig
from famba.training.distributed import Process
from famba.training.initial import start_from
from famba.training.optimizer import create_optimizer
from famba.training.seeds import seed_generators
from famba.training.setup import Setup, augmentation, build_model, model_classes
from famba.training.state import Totals, TrainingState
from famba.training.trained_on import TrainedOn

_log = logging.getLogger(__name__)

Evaluated = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Loaders:
    """Holds the batches of this process. Every epoch is evaluated on selection: "validation", or the "test" set itself.

    Only a validation set selects a checkpoint.
    """

    train: data.TrainBatches
    selection_name: str
    selection: Evaluated
    test: Evaluated


def load_splits(config: RunConfig) -> data.Splits:
    """Open the data that the configuration names, and log how much there is."""
    wanted = config.data
    with named("data.{}"):
        splits = data.load_splits(
            wanted.name,
            wanted.root,
            subset=wanted.subset,
            val_fraction=wanted.val_fraction,
            num_classes=wanted.num_classes,
            background=wanted.background,
            version=wanted.version,
        )
    parts = {"training": splits.train, "validation": splits.validation, "test": splits.test}
    _log.info("images: %s", "; ".join(f"{name} {_size(part)}" for name, part in parts.items() if part is not None))
    return splits


def _size(part: data.Source | data.StreamSource) -> str:
    if isinstance(part, data.StreamSource):
        return f"{len(part):,} in a stream, {part.num_classes:,} classes"
    there = len(np.unique(data.labels_of(part)))
    of_all = "" if there == part.num_classes else f" of {part.num_classes:,}"
    return f"{len(part):,} in {there:,}{of_all} class{'' if there == 1 else 'es'}"


def load_images(config: RunConfig, setup: Setup, source: data.Source) -> Tensor:
    """Return all images of a source as evaluation sees them, (n, 3, s, s)."""
    shared = _transform(config, setup)
    batches = data.eval_batches(source, batch_size=len(source), rank=0, world_size=1, workers=0, **shared)
    return torch.cat([images for images, _ in batches])


def _transform(config: RunConfig, setup: Setup) -> dict[str, Any]:
    return {
        "augmentation": augmentation(config),
        "image_size": setup.image_size,
        "mean": tuple(config.data.mean),
        "std": tuple(config.data.std),
    }


def make_loaders(config: RunConfig, setup: Setup, splits: data.Splits, process: Process) -> Loaders:
    """Build the loaders of one process."""
    shared: dict[str, Any] = {
        **_transform(config, setup),
        "rank": process.rank,
        "world_size": process.world_size,
        "workers": config.data.workers,
        "pin_memory": process.device.type == "cuda",
    }
    trainer = config.trainer
    with named({"batch_size": "trainer.batch_size", "repeats": "recipe.repeats"}):
        train = data.train_batches(
            splits.train,
            seed=config.seed,
            batch_size=trainer.batch_size,
            accumulation=trainer.accumulation,
            repeats=config.recipe.repeats if process.world_size > 1 else 1,
            **shared,
        )
    size = trainer.batch_size // (process.world_size * trainer.accumulation)
    test = data.eval_batches(splits.test, batch_size=size, **shared)
    if splits.validation is None:
        return Loaders(train, "test", test, test)
    return Loaders(train, "validation", data.eval_batches(splits.validation, batch_size=size, **shared), test)


def new_state(
    config: RunConfig,
    setup: Setup,
    trained_on: TrainedOn,
    device: torch.device,
    fresh: bool = True,
    fused: bool = False,
) -> TrainingState:
    """Build network and optimizer as they are before the first step; the same for every strategy at one seed.

    Where not `fresh`, a checkpoint follows, and init_from is not read. `fused` is the form of the optimizer, see
    `create_optimizer`.
    """
    seed_generators(Stream.WEIGHTS, config.seed)
    classes = model_classes(config, trained_on.num_classes)
    model = build_model(config.model.name, {**setup.model_arguments, "num_classes": classes})
    totals = Totals()
    if fresh and config.init_from is not None:
        totals.started_from = start_from(model, config.init_from, trained_on.classes)
    model.set_grad_checkpointing(config.trainer.grad_checkpointing)
    model.to(device)
    decay = config.recipe.ema_decay
    return TrainingState(
        model=model,
        optimizer=create_optimizer(model, config, fused),
        scaler=torch.amp.GradScaler(device.type, enabled=setup.autocast == torch.float16),
        ema=None if decay is None else ModelEmaV3(model, decay=decay),
        totals=totals,
    )
