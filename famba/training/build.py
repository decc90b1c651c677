"""Build the network and the data of a configuration."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from functools import partial
from math import inf
from typing import Any

import torch
from torch import Tensor

from famba import data
from famba.errors import ConfigError, named
from famba.models import Backbone, create_network
from famba.models.backbone import backbone_of
from famba.training.config import RunConfig, check_eval_images
from famba.training.devices import loading_workers
from famba.training.distributed import Process

Batches = Iterable[tuple[Tensor, Tensor]]
"""Images (b, 3, h, w) and labels (b,)."""
_log = logging.getLogger(__name__)
_SHARE_OF_MEMORY = 0.25  # of a GPU's free memory, that images may take


def check_model(config: RunConfig) -> None:
    """Raise ConfigError for an unknown network, and for what networks of its kind cannot do."""
    model, fusion = config.model, config.fusion
    with named("model.{}"):
        kind = backbone_of(model.name)
    with named("fusion.{}"):
        kind.check_fusion(fusion)
    if fusion.proportional and fusion.mode == "prune":
        raise ConfigError("fusion.proportional=true has no effect with fusion.mode=prune; leave one of them out")
    for key, given, usual in (("d_state", model.d_state, None), ("cls_position", model.cls_position, "head")):
        if given != usual and key not in kind.keys:
            raise ConfigError(f"model.{key}={given} cannot be chosen for {model.name}, {kind.kind}; leave it out")


def build_model(name: str, arguments: dict[str, Any]) -> Backbone:
    """Create the network with fresh weights. Raises ConfigError for what does not fit it."""
    try:
        return create_network(name, **arguments)
    except (AssertionError, TypeError) as error:  # of timm's transformers
        raise ConfigError(f"{name} cannot be built with these model keys: {error}; leave them out") from error


def model_arguments(config: RunConfig, classes: int | None) -> dict[str, Any]:
    """Return the arguments of `create_network`, without the schedule; classes: None for the model's own."""
    model = config.model
    keys = ("patch_size", "depth", "embed_dim", *sorted(backbone_of(model.name).keys))
    arguments: dict[str, Any] = {key: getattr(model, key) for key in keys}
    arguments |= {"img_size": config.data.image_size, "num_classes": classes, "drop_path_rate": model.drop_path}
    arguments |= {f"fusion_{name}": value for name, value in config.fusion.settings().items()}
    return {name: value for name, value in arguments.items() if value is not None}


def model_classes(config: RunConfig, found: int) -> int:
    """Return the classes of the model, given those found in the data. Raises ConfigError if the data has more."""
    classes = config.model.num_classes or found
    if found > classes:
        raise ConfigError(f"the data has {found} classes, but model.num_classes is {classes}; leave it out")
    return classes


def augmentation(config: RunConfig) -> data.Augmentation:
    """Return the augmentation of the recipe."""
    keys = {field.name: field.name for field in fields(data.Augmentation)} | {"kind": "augmentation"}
    with named({name: f"recipe.{key}" for name, key in keys.items()}):
        return data.Augmentation(**{name: getattr(config.recipe, key) for name, key in keys.items()})


def requested_data(config: RunConfig) -> dict[str, Any]:
    """Return the arguments that name a part of a data set."""
    keys = ("subset", "val_fraction", "num_classes", "background", "version")
    return {key: getattr(config.data, key) for key in keys}


def load_splits(config: RunConfig) -> data.Splits:
    """Open the data that the configuration names."""
    with named("data.{}"):
        return data.load_splits(config.data.name, config.data.root, **requested_data(config))


@dataclass(frozen=True)
class Loaders:
    """Hold the batches of this process.

    selection: evaluated at the end, named "validation" or "test"; in_training: what earlier evaluations take of it.
    """

    train: data.TrainBatches
    selection_name: str
    selection: Batches
    in_training: Batches
    test: Batches


def make_loaders(config: RunConfig, image_size: int, splits: data.Splits, process: Process) -> Loaders:
    """Build the loaders of one process; image_size in pixels."""
    trainer, device, count, place = config.trainer, process.device, config.trainer.eval_images, config.data.device
    check_eval_images(count, splits.validation is not None)
    finish_on = torch.device("cpu") if place == "cpu" or device.type != "cuda" else device
    if finish_on.type == "cuda":
        free = inf if place == "cuda" else torch.cuda.mem_get_info(device)[0]
        splits = resident(splits, device, config.recipe.augmentation, free)
    own = process.rank, process.world_size, loading_workers(config.data.workers), device, finish_on
    shared: Any = {"augmentation": augmentation(config), "loading": _loading(config, image_size, *own)}
    with named({"batch_size": "trainer.batch_size", "repeats": "recipe.repeats"}):
        train = data.train_batches(
            splits.train,
            seed=config.seed,
            batch_size=trainer.batch_size,
            accumulation=trainer.accumulation,
            repeats=config.recipe.repeats,
            **shared,
        )
    shared["batch_size"] = train.micro_batch
    evaluated: Callable[[data.Source], Batches] = partial(data.eval_batches, **shared)
    test = evaluated(splits.test)
    if splits.validation is not None:
        validation = evaluated(splits.validation)
        return Loaders(train, "validation", validation, validation, test)
    if count is None or count >= len(splits.test):
        return Loaders(train, "test", test, test, test)
    return Loaders(train, "test", test, evaluated(data.sample(splits.test, count, config.data.version)), test)


def resident(splits: data.Splits, device: torch.device, augmentation: str, free_bytes: float) -> data.Splits:
    """Put images that are held in memory on a GPU if they take at most a quarter of its free bytes."""
    parts: dict[str, Any] = {name: part for name, part in vars(splits).items() if isinstance(part, data.ArraySource)}
    if augmentation != "batch":
        parts.pop("train", None)  # timm's transforms take them on the host
    size = sum(part.images.nbytes for part in parts.values())
    if not parts or size > _SHARE_OF_MEMORY * free_bytes:
        return splits
    _log.info("%s images lie on %s: %d MB", " and ".join(parts), device, size // 10**6)
    for name, part in parts.items():
        parts[name] = replace(part, images=part.images.to(device), labels=part.labels.to(device))
    return replace(splits, **parts)


def load_images(config: RunConfig, image_size: int, source: data.Source) -> Tensor:
    """Return all images of a source as evaluation sees them, (n, 3, s, s)."""
    batches = data.eval_batches(source, augmentation(config), _loading(config, image_size), batch_size=len(source))
    return torch.cat([images for images, _ in batches])


def _loading(config: RunConfig, image_size: int, *process: Any) -> data.Loading:
    return data.Loading(image_size, tuple(config.data.mean), tuple(config.data.std), *process)  # type: ignore[arg-type]
