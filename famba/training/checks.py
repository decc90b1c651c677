"""Checks of a configuration that look at more than one value, or at the machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from famba import data, ops
from famba.errors import BackendError, CheckpointError, ConfigError, FambaError, near_miss
from famba.fusion.schedules import ADAPTIVE
from famba.models import FusedNetwork
from famba.models.networks import vim_names, vit_names
from famba.models.tome import AFTER_ATTENTION
from famba.models.vim import PLACES
from famba.ops.registry import AUTO, ENVIRONMENT_VARIABLE, resolve
from famba.training.config import RunConfig, keys
from famba.training.graph import obstacle

_GIB = 2**30


@contextmanager
def naming(section: str, **others: str) -> Iterator[None]:
    """Let an error about an argument name the key that it was set by: the section's key of that name.

    others: argument to key, or to option, where the names differ.
    """
    try:
        yield
    except FambaError as error:
        argument, message = error.argument or "", str(error)
        key = others.get(argument, f"{section}.{argument}")
        if key in message or not (argument in others or key in keys()):
            raise
        start = f"{argument} "
        named = f"{key} {message[len(start) :]}" if message.startswith(start) else f"{key}: {message}"
        raise type(error)(named, argument) from error


def check_cuda_graphs(config: RunConfig, device: torch.device, processes: int, backend: str) -> None:
    """Raise ConfigError where the steps have to be CUDA graphs, and cannot be."""
    if config.trainer.cuda_graphs is True:
        reason = obstacle(config, device, processes, backend)
        if reason is not None:
            raise ConfigError(f"trainer.cuda_graphs=true cannot be: {reason}; leave it at auto")


def check_model(config: RunConfig) -> None:
    """Raise ConfigError for a name under which timm knows nothing that fuses, and for keys of the other kind."""
    model = config.model
    check_model_name(model.name)
    if model.name in vim_names():
        if config.fusion.proportional:
            raise ConfigError(
                f"fusion.proportional=true is about attention, and {model.name} has none; leave it out, "
                "or choose a transformer such as model=vit_tiny"
            )
        if config.fusion.place == AFTER_ATTENTION:
            raise ConfigError(
                f"fusion.place={AFTER_ATTENTION} is of transformers, and {model.name} is a Vim; "
                f"allowed: {', '.join(PLACES)}"
            )
        return
    if config.fusion.proportional and config.fusion.mode == "prune":
        raise ConfigError(
            "fusion.proportional=true weighs tokens by what they hold, and with fusion.mode=prune each holds one "
            "patch; leave one of them out"
        )
    for key, given, usual in (("d_state", model.d_state, None), ("cls_position", model.cls_position, "head")):
        if given != usual:
            raise ConfigError(f"model.{key}={given} is of Vims, and {model.name} is a transformer; leave it out")
    if config.fusion.place != AFTER_ATTENTION:
        raise ConfigError(
            f"fusion.place={config.fusion.place} is of Vims, and {model.name} is a transformer; "
            f"give fusion.place={AFTER_ATTENTION}, or begin with one: model=vit_tiny model.name={model.name}"
        )


def check_model_name(name: str) -> None:
    """Raise ConfigError for a name under which timm knows nothing that fuses."""
    vims, vits = vim_names(), vit_names()
    if name not in vims and name not in vits:
        raise ConfigError(
            f"unknown model.name {name!r}{near_miss(name, [*vims, *vits])}; allowed: {', '.join(vims)}, and timm's "
            "vision transformers: vit_micro_patch4_32 and what timm.list_models(module='vision_transformer') and "
            "timm.list_models(module='deit') name"
        )


def check_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return the backend that serves a device and precision where `backend` is configured.

    Raises BackendError where it is unknown, or does not serve them.
    """
    try:
        with nullcontext() if backend == AUTO else ops.use_backend(backend):
            return resolve(device.type, dtype)
    except BackendError as error:
        raise BackendError(f"{ENVIRONMENT_VARIABLE if backend == AUTO else 'ops.backend'}: {error}") from error


def check_data(config: RunConfig) -> None:
    """Raise ConfigError for what no data under this name can give."""
    wanted = config.data
    with naming("data"):
        data.check_request(
            wanted.name,
            wanted.root,
            subset=wanted.subset,
            val_fraction=wanted.val_fraction,
            num_classes=wanted.num_classes,
            background=wanted.background,
            version=wanted.version,
        )
    known = data.training_images_of(wanted.name)
    images = wanted.subset or known
    if images is None:
        return
    left = images - data.held_out(images, wanted.val_fraction)
    if config.trainer.batch_size > left:
        raise ConfigError(
            f"trainer.batch_size={config.trainer.batch_size} does not fit into the {left} training images that "
            f"{wanted.name}, data.subset and data.val_fraction leave; choose {left} or fewer"
        )


def check_memory(outline: FusedNetwork, device: torch.device) -> None:
    """Raise ConfigError where the weights and their gradients alone are more than all the memory of the device."""
    parameters = sum(weight.numel() for weight in outline.parameters())
    needed, there = 8 * parameters, _memory(device)
    if needed > there:
        raise ConfigError(
            f"a model of {parameters:,} parameters needs {needed / _GIB:,.0f} GiB for its weights and gradients, "
            f"{device} has {there / _GIB:,.0f} GiB; choose less of model.depth, model.embed_dim, model.d_state, "
            "model.num_classes or data.image_size, or a larger model.patch_size"
        )


def _memory(device: torch.device) -> int:
    """All the memory of a device, in bytes; that of the machine where torch does not tell the device's own."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_batch(config: RunConfig, processes: int) -> None:
    """Raise ConfigError where a step cannot be dealt out to `processes` and micro-batches."""
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


def check_schedules(config: RunConfig) -> None:
    """Raise ConfigError where the learning rate never leaves its warm-up."""
    trainer = config.trainer
    if config.recipe.warmup_epochs >= trainer.epochs:
        raise ConfigError(
            f"recipe.warmup_epochs={config.recipe.warmup_epochs} leaves nothing of "
            f"trainer.epochs={trainer.epochs}; choose fewer"
        )


def check_adapting(config: RunConfig) -> None:
    """Raise ConfigError where a schedule is to be measured, but not when or on what, or the other way round."""
    fusion = config.fusion
    for key, value in (("adapt_at", fusion.adapt_at), ("adapt_images", fusion.adapt_images)):
        if (value is not None) != (fusion.strategy == ADAPTIVE):
            allowed = (
                "a value, or fusion=adaptive for the usual one"
                if value is None
                else f"null, or fusion={ADAPTIVE}, which measures"
            )
            raise ConfigError(f"fusion.{key} is {value} with strategy {fusion.strategy!r}; allowed: {allowed}")


def check_files(config: RunConfig) -> None:
    """Raise FambaError where a file that is named is missing, or the run folder cannot be written."""
    with naming("data"):
        data.check_folder(config.data.name, config.data.root, config.data.version)
    if config.resume not in ("auto", "never") and not _asked(Path.is_file, "resume", config.resume):
        raise CheckpointError(
            f"resume={config.resume} is no file{near_miss(config.resume, ('auto', 'never'))}; "
            "allowed: auto, never, or a checkpoint of a run"
        )
    folder = Path(config.run_dir).absolute()
    while not _asked(Path.exists, "run_dir", str(folder)):
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"run_dir={config.run_dir} cannot be written: {folder} is not a writable folder")


def _asked(question: Callable[[Path], bool], key: str, path: str) -> bool:
    """Ask the file system about a path. Raises ConfigError for one that it cannot even look up, such as a long name."""
    try:
        return question(Path(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}={path} cannot be looked up ({error}); give another path") from error
