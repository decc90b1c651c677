"""Define the configuration of a run, which is checked as a whole; defaults stand in configs/ alone."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from famba.data.augment import AugmentationOptions, Probability
from famba.errors import ConfigError, near_miss
from famba.fusion import Fusion
from famba.training.records import flatten as flatten
from famba.training.records import nested

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
_SHOWN = 100  # characters of a value that an error repeats
_CREDENTIALS = re.compile(r"(?<=://)[^/?#@\s]*(?=@)")


def without_credentials(text: str) -> str:
    """Replace user names, passwords and tokens in addresses by ***."""
    return _CREDENTIALS.sub("***", text)


def _check_text(text: str) -> str:
    if "\0" in text:
        raise ValueError("names and paths cannot contain a NUL character")
    if _CREDENTIALS.search(text):
        raise ValueError("a password or token in an address would be written to the run folder; leave it out")
    return text


# Upper bounds are far beyond what anybody trains with: they turn slips into errors instead of full memories.
Count = Annotated[int, Field(ge=1, le=10**9)]
Width = Annotated[int, Field(ge=1, le=16_384)]
NotNegative = Annotated[float, Field(ge=0, le=1e9)]
Positive = Annotated[float, Field(gt=0, le=1e9)]
Rate = Annotated[float, Field(ge=0, le=1000)]
Share = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_check_text)]


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """The network; None keeps the value of the registered model."""

    name: Text
    num_classes: Annotated[int, Field(ge=1, le=10**7)] | None
    patch_size: Width | None
    depth: Annotated[int, Field(ge=1, le=512)] | None
    embed_dim: Width | None
    d_state: Annotated[int, Field(ge=1, le=1024)] | None
    drop_path: Share
    cls_position: Literal["head", "middle", "none"]


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    """The images, as in `famba.data.load_splits`; sizes in pixels, mean and std of RGB in [0, 1]."""

    name: Text
    root: Text | None
    image_size: Width | None
    num_classes: Annotated[int, Field(ge=1, le=10**7)] | None
    mean: Annotated[list[Probability], Field(min_length=3, max_length=3)]
    std: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=3, max_length=3)]
    subset: Count | None
    val_fraction: Share
    workers: Literal["auto"] | Annotated[int, Field(ge=0, le=1024)]
    background: Text
    version: Literal[1, 2]
    device: Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, config=STRICT)
class RecipeConfig(AugmentationOptions):
    """Optimizer, learning-rate schedule, augmentation and regularisation; lr is for lr_batch images per step."""

    optimizer: Text
    betas: Annotated[list[Share], Field(min_length=2, max_length=2)]
    eps: Annotated[float, Field(gt=0, le=1)]
    lr: Annotated[float, Field(gt=0, le=1000)]
    lr_batch: Count
    weight_decay: NotNegative
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None
    clip_grad: Positive | None
    warmup_epochs: NotNegative
    warmup_lr: Rate
    min_lr: Rate
    lr_steps: Literal["epoch", "update"]
    mixup: Rate
    cutmix: Rate
    mixup_switch: Probability
    label_smoothing: Share
    ema_decay: Share | None
    augmentation: Literal["batch", "timm"]
    repeats: Annotated[int, Field(ge=1, le=1000)]


@dataclass(frozen=True, config=STRICT)
class TrainerConfig:
    """Length, device and precision of training; batch_size is that of a step over all processes."""

    epochs: Count
    max_steps: Count | None
    batch_size: Count
    accumulation: Count
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    device: Text
    compile: bool
    cuda_graphs: Literal["auto"] | bool
    grad_checkpointing: bool
    log_every: Count
    eval_every: Count
    eval_images: Count | None
    save_every_min: Positive


@dataclass(frozen=True, config=STRICT)
class OpsConfig:
    """The backend of the ops, as in `famba.ops.use_backend`."""

    backend: Text


@dataclass(frozen=True, config=STRICT)
class LoggerConfig:
    """A place for metrics besides the run folder."""

    name: Literal["none", "wandb", "tensorboard"]
    project: Text
    entity: Text | None
    group: Text | None
    mode: Literal["disabled", "offline", "online"]


@dataclass(frozen=True, config=STRICT)
class RunConfig:
    """The whole configuration of a run."""

    model: ModelConfig
    fusion: Fusion
    data: DataConfig
    recipe: RecipeConfig
    trainer: TrainerConfig
    logger: LoggerConfig
    ops: OpsConfig
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    run_dir: Text
    resume: Text
    init_from: Text | None


ADDED_KEYS: dict[str, Any] = {
    "fusion.adapt_at": None,
    "fusion.adapt_images": None,
    "fusion.mode": "fuse",
    "fusion.rule": "bipartite",
    "fusion.proportional": False,
    "fusion.guard": 0,
    "data.version": 1,
    "data.background": "white",
    "data.device": "cpu",
    "trainer.eval_images": None,
    "recipe.layer_decay": None,
}
"""Map each key that configurations have not always had to the value that reproduces what runs did before it."""

CHANGED_DEFAULTS: dict[str, tuple[Any, Any]] = {
    "recipe.augmentation": ("timm", "batch"),
    "recipe.crop_padding": (0, None),
}
"""Map each key whose value in recipe=paper changed since version 0.1 to the values then and now."""

_adapter = cache(TypeAdapter)


def parse(values: Mapping[str, Any]) -> RunConfig:
    """Turn nested plain values into a RunConfig. Raises ConfigError with every key at fault."""
    return checked(RunConfig, values)


def check_eval_images(count: int | None, validates: bool) -> None:
    """Raise ConfigError if only some test images are asked for, but a run evaluates validation images."""
    if count is not None and validates:
        told = "is for test images, but this run is selected by all its validation images; leave it out"
        raise ConfigError(f"trainer.eval_images={count} {told}")


def plain(config: RunConfig) -> dict[str, Any]:
    """Return the nested plain values of a RunConfig, as YAML and checkpoints hold them."""
    return _adapter(RunConfig).dump_python(config, mode="json")


def with_added_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return an earlier run's configuration with the keys that were added since, as the run went without them."""
    flat = flatten(values)
    groups = {key.split(".")[0] for key in flat if "." in key}
    added = {key: value for key, value in ADDED_KEYS.items() if key not in flat and key.split(".")[0] in groups}
    return nested({**flat, **added})


@cache
def keys(cls: type = RunConfig, prefix: str = "") -> tuple[str, ...]:
    """Return the dotted keys of a configuration."""
    names: list[str] = []
    hints = get_type_hints(cls)
    for name in (field.name for field in fields(cls)):
        names += keys(hints[name], f"{prefix}{name}.") if is_dataclass(hints[name]) else [f"{prefix}{name}"]
    return tuple(names)


def checked(kind: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
    """Build a dataclass, whose fields have `prefix` before their names, from plain values; raises as `parse`."""
    try:
        return _adapter(kind).validate_json(json.dumps(values))  # strict validation builds them from JSON alone
    except ValidationError as error:
        found: dict[str, dict[str, None]] = {}  # of each key the reasons, from the members of a union
        for problem in error.errors():
            start, reason = _explain(problem, keys(kind, prefix), prefix)
            found.setdefault(start, {})[reason] = None
    lines = [start + " or ".join(reasons).replace(" or input should be ", " or ") for start, reasons in found.items()]
    raise ConfigError("\n".join(sorted(lines)))


def _explain(problem: Any, known: Sequence[str], prefix: str) -> tuple[str, str]:
    """Return the start of a line for one of pydantic's errors, the same for all of a key, and its reason."""
    key, fault = prefix + ".".join(map(str, problem["loc"])), problem.get("ctx", {}).get("error")
    # Behind the key stands the member of a union, or the place in a list.
    named = next((k for k in sorted(known, key=len, reverse=True) if f"{key}.".startswith(f"{k}.")), key)
    if isinstance(fault, ConfigError):  # `Fusion` checks itself
        begins_with_it = str(fault).startswith(f"{fault.argument} ")
        return f"{key}." if begins_with_it else f"{key}.{fault.argument}: ", str(fault)
    if problem["type"] == "unexpected_keyword_argument":
        return f"unknown key {key!r}{near_miss(key, known)}", ""
    if problem["type"] == "missing":
        return f"{named} is missing", ""
    reason = problem["msg"].removeprefix("Value error, ").replace("tuple", "list")
    return f"{named} is {without_credentials(repr(problem['input']))[:_SHOWN]}: ", reason[:1].lower() + reason[1:]
