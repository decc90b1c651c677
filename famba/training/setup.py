"""From a configuration to the parts of a run, with every check that needs no data."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

from famba import data
from famba.errors import ConfigError, named
from famba.models import Backbone, create_network
from famba.models.backbone import backbone_of
from famba.training import checks
from famba.training.config import RunConfig
from famba.training.devices import choose_device, choose_precision, make_current
from famba.training.distributed import world_size
from famba.training.initial import check_initial
from famba.training.optimizer import check_optimizer_name, try_optimizer


@dataclass(frozen=True)
class Setup:
    """What a configuration comes to on this machine.

    image_size: pixels. schedule: tokens that each layer removes, at first where it adapts. tokens: length of the
    unfused sequence.
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


def prepare(config: RunConfig, processes: int | None = None) -> Setup:
    """Check a configuration as a whole and work out what it comes to, for `processes` on other machines, None for here.

    Raises FambaError for whatever cannot work, before any data is read and any folder made.
    """
    checks.check_model(config)
    device = choose_device(config.trainer.device)
    make_current(device)
    autocast = choose_precision(config.trainer.precision, device)
    backend = checks.check_backend(config.ops.backend, device, autocast or torch.float32)
    checks.check_cuda_graphs(config, device, processes or world_size(), backend)
    checks.check_data(config)
    checks.check_batch(config, processes or world_size())
    checks.check_schedules(config)
    checks.check_adapting(config)
    check_optimizer_name(config.recipe.optimizer)
    augmentation(config)
    outline, arguments = _outline(config)
    with named("fusion.{}"):
        counts = config.fusion.schedule(outline.depth, outline.num_tokens, outline.protected)
    size = outline.image_size
    if size[0] != size[1]:
        raise ConfigError(f"{config.model.name} takes {size[0]} x {size[1]} images; loaders make square ones")
    check_initial(config, outline)
    if processes is None:
        checks.check_memory(outline, device)
        checks.check_files(config)
        try_optimizer(config, device)
    matched = config.fusion.is_matched
    return Setup(size[0], counts, outline.num_tokens, matched, device, autocast, {**arguments, "fusion": counts})


def build_model(name: str, arguments: dict[str, Any]) -> Backbone:
    """Create the network with fresh weights. Raises ConfigError for what does not fit it."""
    try:
        return create_network(name, **arguments)
    except (AssertionError, TypeError) as error:
        # timm's transformers check what they are given so, if at all.
        raise ConfigError(f"{name} cannot be built with these model keys: {error}; leave them out") from error


def augmentation(config: RunConfig) -> data.Augmentation:
    """Return what the recipe does to training images."""
    recipe = config.recipe
    keys = {field.name: field.name for field in fields(data.Augmentation)} | {"kind": "augmentation"}
    with named({name: f"recipe.{key}" for name, key in keys.items()}):
        return data.Augmentation(**{argument: getattr(recipe, key) for argument, key in keys.items()})


def reading(config: RunConfig) -> data.Reading:
    """Return how folders and images are read."""
    with named("data.{}"):
        return data.Reading(config.data.version, config.data.background)


def model_classes(config: RunConfig, found: int) -> int:
    """Classes of the model, given those found in the data. Raises ConfigError where the data has more."""
    classes = config.model.num_classes or found
    if found > classes:
        raise ConfigError(
            f"the data has {found} classes, but model.num_classes is {classes}; leave it out, "
            f"or set it to {found} or more"
        )
    return classes


def _outline(config: RunConfig) -> tuple[Backbone, dict[str, Any]]:
    """Return the network without memory, and the arguments that make it."""
    known = config.data.num_classes or data.num_classes_of(config.data.name)
    classes = config.model.num_classes if known is None else model_classes(config, known)
    arguments = model_arguments(config, classes)
    with named({"img_size": "data.image_size", "cls_position": "model.cls_position"}), torch.device("meta"):
        return build_model(config.model.name, arguments), arguments


def model_arguments(config: RunConfig, classes: int | None) -> dict[str, Any]:
    """Return what `create_network` takes, but for the schedule; classes None leaves those of the registered model."""
    model = config.model
    own = {"d_state": model.d_state, "cls_position": model.cls_position}
    arguments: dict[str, Any] = {
        "img_size": config.data.image_size,
        "num_classes": classes,
        "patch_size": model.patch_size,
        "depth": model.depth,
        "embed_dim": model.embed_dim,
        "drop_path_rate": model.drop_path,
        **{key: value for key, value in own.items() if key in backbone_of(model.name).keys},
        **{f"fusion_{name}": value for name, value in config.fusion.settings().items()},
    }
    return {name: value for name, value in arguments.items() if value is not None}
