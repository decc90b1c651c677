"""From a configuration to the parts of a run, with every check that needs no data."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.optim import list_optimizers

from famba import data, ops
from famba.errors import CheckpointError, ConfigError, near_miss
from famba.fusion.schedules import PAPER, check_schedule, schedule, tokens_per_layer
from famba.models import Vim
from famba.ops.registry import AUTO, resolve
from famba.training.config import RunConfig
from famba.training.devices import choose_device, choose_precision, make_current
from famba.training.distributed import world_size


@dataclass(frozen=True)
class Setup:
    """What a configuration comes to on this machine.

    image_size: pixels. schedule: tokens that each layer removes. tokens: length of the unfused sequence.
    matched: whether the schedule removes the same total as the other strategies of its budget.
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
        """What matrix products are computed in."""
        return self.autocast or torch.float32

    @property
    def tokens_per_layer(self) -> tuple[int, ...]:
        """Tokens left after each layer's fusion."""
        return tokens_per_layer(self.schedule, self.tokens)


def prepare(config: RunConfig, processes: int | None = None) -> Setup:
    """Check a configuration as a whole and work out what it comes to, for `processes`, None for those there are.

    Raises FambaError for whatever cannot work, before any data is read and any folder made.
    """
    _check_model_name(config.model.name)
    device = choose_device(config.trainer.device)
    make_current(device)
    autocast = choose_precision(config.trainer.precision, device)
    _check_backend(config.ops.backend, device, autocast or torch.float32)
    _check_cuda_graphs(config, device)
    data.check_name(config.data.name)
    known = config.data.num_classes or data.num_classes_of(config.data.name)
    classes = config.model.num_classes if known is None else model_classes(config, known)
    arguments = _model_arguments(config, classes)
    with torch.device("meta"):
        outline = build_model(config.model.name, arguments)
    depth, tokens = len(outline.layers), outline.num_tokens
    fusion = config.fusion
    counts = schedule(fusion.strategy, depth, tokens, fusion.budget, fusion.layers, tokens - outline.num_patches)
    check_schedule(counts, depth, tokens, tokens - outline.num_patches)
    _check_batch(config, processes or world_size())
    _check_optimizer(config.recipe.optimizer)
    augmentation(config)
    _check_files(config)
    matched = fusion.budget != PAPER and not isinstance(fusion.budget, list)
    arguments["fusion"] = counts
    size = outline.patch_embed.img_size
    if size[0] != size[1]:
        raise ConfigError(f"{config.model.name} takes {size[0]} x {size[1]} images; loaders make square ones")
    return Setup(size[0], counts, tokens, matched, device, autocast, arguments)


def build_model(name: str, arguments: dict[str, Any]) -> Vim:
    """Create the network with fresh weights."""
    model = timm.create_model(name, **arguments)
    assert isinstance(model, Vim)
    return model


def augmentation(config: RunConfig) -> data.Augmentation:
    """Return what the recipe does to training images."""
    recipe = config.recipe
    return data.Augmentation(
        kind=recipe.augmentation,
        crop_padding=recipe.crop_padding,
        hflip=recipe.hflip,
        auto_augment=recipe.auto_augment,
        color_jitter=recipe.color_jitter,
        random_erasing=recipe.random_erasing,
        erasing_mode=recipe.erasing_mode,
        interpolation=recipe.interpolation,
        eval_crop=recipe.eval_crop,
    )


def model_classes(config: RunConfig, found: int) -> int:
    """Classes of the model, given those found in the data. Raises ConfigError where the data has more."""
    classes = config.model.num_classes or found
    if found > classes:
        raise ConfigError(
            f"the data has {found} classes, but model.num_classes is {classes}; leave it out, "
            f"or set it to {found} or more"
        )
    return classes


def _check_cuda_graphs(config: RunConfig, device: torch.device) -> None:
    if not config.trainer.cuda_graphs:
        return
    if not config.trainer.compile:
        raise ConfigError("trainer.cuda_graphs=true records what was compiled; add trainer.compile=true, or leave it")
    if device.type != "cuda":
        raise ConfigError(f"trainer.cuda_graphs=true needs a CUDA device, this run is on {device.type}; leave it out")
    if config.trainer.accumulation > 1:
        # The gradients of one micro-batch are memory of the graph that the next one overwrites.
        raise ConfigError(
            f"trainer.cuda_graphs=true with trainer.accumulation={config.trainer.accumulation}: graphs cannot add up "
            "gradients over micro-batches; leave one of them out"
        )


def _check_model_name(name: str) -> None:
    known = timm.list_models("vim_*")
    if name not in known:
        raise ConfigError(f"unknown model.name {name!r}{near_miss(name, known)}; allowed: {', '.join(known)}")


def _check_backend(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    if backend == AUTO:
        resolve(device.type, dtype)
        return
    with ops.use_backend(backend):
        resolve(device.type, dtype)


def _model_arguments(config: RunConfig, classes: int | None) -> dict[str, Any]:
    model, fusion = config.model, config.fusion
    arguments: dict[str, Any] = {
        "img_size": config.data.image_size,
        "num_classes": classes,
        "patch_size": model.patch_size,
        "depth": model.depth,
        "embed_dim": model.embed_dim,
        "d_state": model.d_state,
        "drop_path_rate": model.drop_path,
        "cls_position": model.cls_position,
        "fusion_order": fusion.order,
        "fusion_weighting": fusion.weighting,
        "fusion_place": fusion.place,
    }
    return {name: value for name, value in arguments.items() if value is not None}


def _check_optimizer(name: str) -> None:
    known = [str(optimizer) for optimizer in list_optimizers()]
    if name not in known:
        raise ConfigError(
            f"unknown recipe.optimizer {name!r}{near_miss(name, known)}; timm.optim.list_optimizers() has all"
        )


def _check_batch(config: RunConfig, processes: int) -> None:
    trainer = config.trainer
    parts = processes * trainer.accumulation
    if trainer.batch_size % parts:
        near = max(parts, round(trainer.batch_size / parts) * parts)
        raise ConfigError(
            f"trainer.batch_size={trainer.batch_size} is not divisible by {processes} processes x "
            f"trainer.accumulation={trainer.accumulation}; {near} is"
        )
    mixes = config.recipe.mixup > 0 or config.recipe.cutmix > 0
    if mixes and trainer.batch_size // parts % 2:
        raise ConfigError(
            f"mixup and cutmix pair the images of a micro-batch, but {trainer.batch_size // parts} is odd; "
            "choose an even trainer.batch_size, or recipe.mixup=0 recipe.cutmix=0"
        )
    if config.recipe.warmup_epochs >= trainer.epochs:
        raise ConfigError(
            f"recipe.warmup_epochs={config.recipe.warmup_epochs} leaves nothing of "
            f"trainer.epochs={trainer.epochs}; choose fewer"
        )


def _check_files(config: RunConfig) -> None:
    if config.resume not in ("auto", "never") and not Path(config.resume).is_file():
        raise CheckpointError(
            f"resume={config.resume} is no file{near_miss(config.resume, ('auto', 'never'))}; "
            "allowed: auto, never, or a checkpoint of a run"
        )
    begun = (Path(config.run_dir) / "checkpoints").is_dir()
    if config.init_from is not None and not begun and not Path(config.init_from).is_file():
        raise CheckpointError(f"init_from={config.init_from} is no file; give a .safetensors file or a checkpoint")
    folder = Path(config.run_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"run_dir={config.run_dir} cannot be written: {folder} is not a writable folder")
