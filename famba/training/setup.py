"""Check a configuration before any data is read and any folder made."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass
from glob import escape, glob
from typing import Any

import torch

from famba import data, ops
from famba.data.loader import TrainBatches
from famba.errors import BackendError, ConfigError, named, near_miss
from famba.fusion.schedules import ADAPTIVE
from famba.ops.registry import AUTO, ENVIRONMENT_VARIABLE, resolve
from famba.training.build import augmentation, build_model, check_model, model_arguments, model_classes, requested_data
from famba.training.config import RunConfig, check_eval_images
from famba.training.devices import choose_device, choose_precision
from famba.training.distributed import world_size
from famba.training.graph import obstacle
from famba.training.optimizer import check_optimizer
from famba.training.weights import check_initial

_MANY = 10**9  # images, where only reading the data can count them


@dataclass(frozen=True)
class Setup:
    """Hold what a configuration means on this machine.

    image_size: pixels. schedule: tokens that each layer removes, at first where it adapts. tokens: length of the
    unfused sequence. autocast: dtype of matrix products, None for float32. model_arguments: of `create_network`.
    """

    image_size: int
    schedule: tuple[int, ...]
    tokens: int
    device: torch.device
    autocast: torch.dtype | None
    model_arguments: dict[str, Any]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of matrix products."""
        return self.autocast or torch.float32


def prepare(config: RunConfig, processes: int | None = None) -> Setup:
    """Check a configuration and return its Setup; processes: their number on another machine, None for this one."""
    processes_of_a_step = processes or world_size()
    check_model(config)
    device = choose_device(config.trainer.device)
    autocast = choose_precision(config.trainer.precision, device)
    check_optimizer(config, device)
    dtype, asked = autocast or torch.float32, config.ops.backend
    try:
        with nullcontext() if asked == AUTO else ops.use_backend(asked):
            backend = resolve(device.type, dtype)
    except BackendError as error:
        raise BackendError(f"{ENVIRONMENT_VARIABLE if asked == AUTO else 'ops.backend'}: {error}") from error
    check_cuda_graphs(config, device, processes_of_a_step, backend)
    if config.data.device == "cuda" != device.type:
        raise ConfigError(f"data.device=cuda, but the training runs on {device.type}; leave data.device at auto")
    _check_data(config, processes_of_a_step)
    warmup, epochs, fusion = config.recipe.warmup_epochs, config.trainer.epochs, config.fusion
    if warmup >= epochs:
        raise ConfigError(f"recipe.warmup_epochs={warmup} leaves nothing of trainer.epochs={epochs}; choose fewer")
    for key, value in (("adapt_at", fusion.adapt_at), ("adapt_images", fusion.adapt_images)):
        if (value is not None) != (fusion.strategy == ADAPTIVE):
            raise ConfigError(f"fusion.{key} has a value with fusion={ADAPTIVE} alone, and must have one there")
    augmentation(config)
    known = config.data.num_classes or data.NUM_CLASSES.get(config.data.name)
    arguments = model_arguments(config, config.model.num_classes if known is None else model_classes(config, known))
    with named({"img_size": "data.image_size", "cls_position": "model.cls_position"}), torch.device("meta"):
        outline = build_model(config.model.name, arguments)
    with named("fusion.{}"):
        schedule = outline.schedule_of(config.fusion)
    size = outline.image_size
    if size[0] != size[1]:
        raise ConfigError(f"{config.model.name} takes {size[0]} x {size[1]} images; loaders make square ones")
    check_initial(config, outline)
    if processes is None:
        check_files(config)
    arguments |= {"fusion": schedule}
    return Setup(size[0], schedule, outline.num_tokens, device, autocast, arguments)


def check_cuda_graphs(config: RunConfig, device: torch.device, processes: int, backend: str) -> None:
    """Raise ConfigError if the steps have to be CUDA graphs, and cannot be."""
    reason = obstacle(config, device, processes, backend)
    if config.trainer.cuda_graphs is True and reason is not None:
        raise ConfigError(f"trainer.cuda_graphs=true cannot be: {reason}; leave it at auto")


def _check_data(config: RunConfig, processes: int) -> None:
    """Raise ConfigError for what no data under this name can give, and for steps that it does not fill."""
    wanted, trainer, recipe = config.data, config.trainer, config.recipe
    with named("data.{}"):
        data.check_request(wanted.name, wanted.root, **requested_data(config))
    check_eval_images(trainer.eval_images, wanted.val_fraction > 0)
    images = wanted.subset or data.TRAINING_IMAGES.get(wanted.name, _MANY)
    deal = (trainer.batch_size, trainer.accumulation, 0, processes, recipe.repeats)
    with named({"batch_size": "trainer.batch_size", "repeats": "recipe.repeats"}):
        batches = TrainBatches(images - data.held_out(images, wanted.val_fraction), config.seed, *deal)
    if (recipe.mixup > 0 or recipe.cutmix > 0) and batches.micro_batch % 2:
        told = f"mixup and cutmix pair the images of a micro-batch, but {batches.micro_batch} is odd"
        raise ConfigError(f"{told}; choose an even trainer.batch_size, or recipe.mixup=0 recipe.cutmix=0")


def check_files(config: RunConfig) -> None:
    """Raise FambaError if the data, or the checkpoint to continue from, is missing."""
    with named("data.{}"):
        data.check_folder(config.data.name, config.data.root, config.data.version)
    begun = bool(glob(f"{escape(config.run_dir)}/checkpoints/step_*.pt"))  # then it goes on from its own
    if config.resume not in ("auto", "never") and not begun and not os.path.isfile(config.resume):
        close = near_miss(config.resume, ("auto", "never"))
        raise ConfigError(f"resume={config.resume} is no file{close}; allowed: auto, never, or a checkpoint of a run")
