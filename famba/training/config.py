"""The configuration of a run as dataclasses, checked as a whole before anything starts.

Defaults stand in configs/ alone: a dataclass here has none, so a key that is missing is an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from famba.errors import ConfigError, near_miss

_STRICT = ConfigDict(extra="forbid", strict=True)

Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Channels = Annotated[list[float], Field(min_length=3, max_length=3)]


@dataclass(frozen=True, config=_STRICT)
class ModelConfig:
    """Which network; None leaves a value as the registered model has it."""

    name: str
    num_classes: Count | None
    patch_size: Count | None
    depth: Count | None
    embed_dim: Count | None
    d_state: Count | None
    drop_path: Share
    cls_position: Literal["head", "middle", "none"]


@dataclass(frozen=True, config=_STRICT)
class FusionConfig:
    """How many tokens fuse where, as in `famba.fusion.schedule`, and how, as in `famba.models.Vim`."""

    strategy: str
    budget: int | float | str | list[int]
    layers: int | list[int] | None
    order: Literal["sequence", "tome"]
    weighting: Literal["mean", "size"]
    place: Literal["before_mixer", "after_scan"]


@dataclass(frozen=True, config=_STRICT)
class DataConfig:
    """Which images, as in `famba.data.load_splits`; sizes in pixels, mean and std of RGB in [0, 1]."""

    name: str
    root: str | None
    image_size: Count | None
    num_classes: Count | None
    mean: Channels
    std: Annotated[list[Positive], Field(min_length=3, max_length=3)]
    subset: Count | None
    val_fraction: Share
    workers: Annotated[int, Field(ge=0)]


@dataclass(frozen=True, config=_STRICT)
class RecipeConfig:
    """Optimizer, schedule, augmentation and regularisation; lr holds for lr_batch images per step."""

    optimizer: str
    betas: Annotated[list[Share], Field(min_length=2, max_length=2)]
    eps: Positive
    lr: Positive
    lr_batch: Count
    weight_decay: NotNegative
    clip_grad: Positive | None
    warmup_epochs: NotNegative
    warmup_lr: NotNegative
    min_lr: NotNegative
    lr_steps: Literal["epoch", "update"]
    mixup: NotNegative
    cutmix: NotNegative
    mixup_switch: Probability
    label_smoothing: Share
    ema_decay: Share | None
    augmentation: Literal["batch", "timm"]
    crop_padding: Annotated[int, Field(ge=0)]
    hflip: Probability
    auto_augment: str | None
    color_jitter: NotNegative
    random_erasing: Probability
    erasing_mode: Literal["const", "rand", "pixel"]
    interpolation: Literal["bilinear", "bicubic"]
    eval_crop: Annotated[float, Field(gt=0, le=1)]
    repeats: Count


@dataclass(frozen=True, config=_STRICT)
class TrainerConfig:
    """How long, on what, in which precision; batch_size is that of a step over all processes."""

    epochs: Count
    max_steps: Count | None
    batch_size: Count
    accumulation: Count
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    device: str
    compile: bool
    cuda_graphs: bool
    grad_checkpointing: bool
    log_every: Count
    eval_every: Count
    save_every_min: Positive


@dataclass(frozen=True, config=_STRICT)
class OpsConfig:
    """Which backend computes, as in `famba.ops.use_backend`."""

    backend: str


@dataclass(frozen=True, config=_STRICT)
class LoggerConfig:
    """Where metrics go besides the run folder."""

    name: Literal["none", "wandb", "tensorboard"]
    project: str
    entity: str | None
    group: str | None
    mode: Literal["disabled", "offline", "online"]


@dataclass(frozen=True, config=_STRICT)
class RunConfig:
    """Everything that a run is told."""

    model: ModelConfig
    fusion: FusionConfig
    data: DataConfig
    recipe: RecipeConfig
    trainer: TrainerConfig
    logger: LoggerConfig
    ops: OpsConfig
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    run_dir: str
    resume: str
    init_from: str | None


_ADAPTER = TypeAdapter(RunConfig)


def parse(values: Mapping[str, Any]) -> RunConfig:
    """Turn nested plain values, as YAML holds them, into a RunConfig.

    Raises ConfigError with every key that is unknown, missing or of a wrong value.
    """
    try:
        # By way of JSON, in which strict validation builds dataclasses from objects.
        return _ADAPTER.validate_json(json.dumps(values))
    except ValidationError as error:
        lines = sorted({_explain(problem) for problem in error.errors()})
        raise ConfigError("\n".join(lines)) from None


def plain(config: RunConfig) -> dict[str, Any]:
    """Return the nested plain values of a RunConfig, as YAML and checkpoints hold them."""
    return asdict(config)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Map dotted keys to values: {"trainer": {"epochs": 1}} to {"trainer.epochs": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def keys(cls: type = RunConfig, prefix: str = "") -> list[str]:
    """Dotted keys of a configuration."""
    names = []
    for field in fields(cls):
        kind = get_type_hints(cls)[field.name]
        names += keys(kind, f"{prefix}{field.name}.") if is_dataclass(kind) else [f"{prefix}{field.name}"]  # type: ignore[arg-type]
    return names


def _explain(problem: Any) -> str:
    # Members of a union come with their type's name behind the key.
    key = ".".join(str(part) for part in problem["loc"])
    known = keys()
    if problem["type"] == "unexpected_keyword_argument":
        return f"unknown key {key!r}{near_miss(key, known)}"
    key = next((k for k in sorted(known, key=len, reverse=True) if key == k or key.startswith(f"{k}.")), key)
    if problem["type"] == "missing":
        return f"{key} is missing"
    return f"{key} is {problem['input']!r}: {problem['msg'][:1].lower()}{problem['msg'][1:]}"
