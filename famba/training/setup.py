"""Check a configuration before any data is read and any folder made."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from famba import data, ops
from famba.errors import BackendError, ConfigError, named, near_miss
from famba.fusion.schedules import ADAPTIVE
from famba.models import Backbone
from famba.ops.registry import AUTO, ENVIRONMENT_VARIABLE, resolve
from famba.training.build import augmentation, build_model, check_model, model_arguments, model_classes, requested_data
from famba.training.config import RunConfig, check_eval_images
from famba.training.devices import choose_device, choose_precision, make_current
from famba.training.distributed import world_size
from famba.training.graph import obstacle
from famba.training.optimizer import check_optimizer
from famba.training.weights import check_initial


@dataclass(frozen=True)
class Setup:
    """Hold what a configuration comes to on this machine.

    image_size: pixels. schedule: tokens that each layer removes, at first where it adapts. tokens: length of the
    unfused sequence. matched: whether the schedule removes the same total as the other strategies of its budget.
    autocast: dtype of matrix products, None for float32. model_arguments: of `create_network`.
    """

    image_size: int
    schedule: tuple[int, ...]
    tokens: int
    matched: bool
    device: torch.device
    autocast: torch.dtype | None
    model_arguments: dict[str, Any]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of matrix products."""
        return self.autocast or torch.float32


def prepare(config: RunConfig, processes: int | None = None) -> Setup:
    """Check a configuration and work out what it comes to, for `processes` on other machines, None for this one."""
    check_model(config)
    device = choose_device(config.trainer.device)
    make_current(device)
    autocast = choose_precision(config.trainer.precision, device)
    backend = check_backend(config.ops.backend, device, autocast or torch.float32)
    check_cuda_graphs(config, device, processes or world_size(), backend)
    if config.data.device == "cuda" != device.type:
        raise ConfigError(f"data.device=cuda, but the training runs on {device.type}; leave data.device at auto")
    _check_data(config)
    check_eval_images(config.trainer.eval_images, config.data.val_fraction > 0)
    check_batch(config, processes or world_size())
    _check_schedules(config)
    augmentation(config)
    outline, arguments = _outline(config)
    with named("fusion.{}"):
        schedule = outline.schedule_of(config.fusion)
    size = outline.image_size
    if size[0] != size[1]:
        raise ConfigError(f"{config.model.name} takes {size[0]} x {size[1]} images; loaders make square ones")
    check_initial(config, outline)
    check_optimizer(config, device)
    if processes is None:
        check_files(config)
    matched, arguments = config.fusion.is_matched, {**arguments, "fusion": schedule}
    return Setup(size[0], schedule, outline.num_tokens, matched, device, autocast, arguments)


def _outline(config: RunConfig) -> tuple[Backbone, dict[str, Any]]:
    """Return the network without memory, and the arguments that make it."""
    known = config.data.num_classes or data.NUM_CLASSES.get(config.data.name)
    classes = config.model.num_classes if known is None else model_classes(config, known)
    arguments = model_arguments(config, classes)
    with named({"img_size": "data.image_size", "cls_position": "model.cls_position"}), torch.device("meta"):
        return build_model(config.model.name, arguments), arguments


def check_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return the backend that serves a device and precision. Raises BackendError if `backend` does not."""
    try:
        with nullcontext() if backend == AUTO else ops.use_backend(backend):
            return resolve(device.type, dtype)
    except BackendError as error:
        raise BackendError(f"{ENVIRONMENT_VARIABLE if backend == AUTO else 'ops.backend'}: {error}") from error


def check_cuda_graphs(config: RunConfig, device: torch.device, processes: int, backend: str) -> None:
    """Raise ConfigError if the steps have to be CUDA graphs, and cannot be."""
    reason = obstacle(config, device, processes, backend)
    if config.trainer.cuda_graphs is True and reason is not None:
        raise ConfigError(f"trainer.cuda_graphs=true cannot be: {reason}; leave it at auto")


def _check_data(config: RunConfig) -> None:
    """Raise ConfigError for what no data under this name can give."""
    wanted = config.data
    with named("data.{}"):
        data.check_request(wanted.name, wanted.root, **requested_data(config))
    images = wanted.subset or data.TRAINING_IMAGES.get(wanted.name)
    left = None if images is None else images - data.held_out(images, wanted.val_fraction)
    if left is not None and config.trainer.batch_size > left:
        told = f"does not fit into the {left} training images that data.subset and data.val_fraction leave"
        raise ConfigError(f"trainer.batch_size={config.trainer.batch_size} {told}; choose {left} or fewer")


def check_batch(config: RunConfig, processes: int) -> None:
    """Raise ConfigError if a step cannot be dealt out to `processes` and micro-batches."""
    batch, accumulation = config.trainer.batch_size, config.trainer.accumulation
    parts = processes * accumulation
    if batch % parts:
        near = max(parts, round(batch / parts) * parts)
        told = f"is not divisible by {processes} processes x trainer.accumulation={accumulation}"
        raise ConfigError(f"trainer.batch_size={batch} {told}; {near} is")
    if (config.recipe.mixup > 0 or config.recipe.cutmix > 0) and batch // parts % 2:
        told = f"mixup and cutmix pair the images of a micro-batch, but {batch // parts} is odd"
        raise ConfigError(f"{told}; choose an even trainer.batch_size, or recipe.mixup=0 recipe.cutmix=0")


def _check_schedules(config: RunConfig) -> None:
    """Raise ConfigError where warm-up never ends, or keys of adaptive schedules do not fit the strategy."""
    warmup, epochs, fusion = config.recipe.warmup_epochs, config.trainer.epochs, config.fusion
    if warmup >= epochs:
        raise ConfigError(f"recipe.warmup_epochs={warmup} leaves nothing of trainer.epochs={epochs}; choose fewer")
    for key, value in (("adapt_at", fusion.adapt_at), ("adapt_images", fusion.adapt_images)):
        if (value is not None) != (fusion.strategy == ADAPTIVE):
            raise ConfigError(f"fusion.{key} has a value with fusion={ADAPTIVE} alone, and must have one there")


def check_files(config: RunConfig) -> None:
    """Raise FambaError if the data is missing or the run folder cannot be written."""
    with named("data.{}"):
        data.check_folder(config.data.name, config.data.root, config.data.version)
    if config.resume not in ("auto", "never") and not os.path.isfile(config.resume):
        close = near_miss(config.resume, ("auto", "never"))
        raise ConfigError(f"resume={config.resume} is no file{close}; allowed: auto, never, or a checkpoint of a run")
    folder = os.path.abspath(config.run_dir)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"run_dir={config.run_dir} cannot be written: {folder} is not a writable folder")
