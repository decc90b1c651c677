"""The configuration of a run as dataclasses, checked as a whole before anything starts.

Defaults stand in configs/ alone: a dataclass here has none, so a key that is missing is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from famba.data.augment import AugmentationOptions, Probability
from famba.errors import ConfigError, near_miss
from famba.fusion import Fusion

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
_SHOWN = 100  # characters of a value that an error repeats


_CREDENTIALS = re.compile(r"(?<=://)[^/?#@\s]*(?=@)")


def without_credentials(text: str) -> str:
    """Return a text with *** for what stands before the @ in addresses."""
    return _CREDENTIALS.sub("***", text)


def _writable(text: str) -> str:
    """Refuse text that is no name and no path, or that nobody should find in a run folder."""
    if "\0" in text:
        raise ValueError("a NUL character is in no name and no path")
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
Text = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_writable)]


@dataclass(frozen=True, config=_STRICT)
class ModelConfig:
    """Which network; None leaves a value as the registered model has it."""

    name: Text
    num_classes: Annotated[int, Field(ge=1, le=10**7)] | None
    patch_size: Width | None
    depth: Annotated[int, Field(ge=1, le=512)] | None
    embed_dim: Width | None
    d_state: Annotated[int, Field(ge=1, le=1024)] | None
    drop_path: Share
    cls_position: Literal["head", "middle", "none"]


@dataclass(frozen=True, config=_STRICT)
class DataConfig:
    """Which images, as in `famba.data.load_splits`; sizes in pixels, mean and std of RGB in [0, 1]."""

    name: Text
    root: Text | None
    image_size: Width | None
    num_classes: Annotated[int, Field(ge=1, le=10**7)] | None
    mean: Annotated[list[Probability], Field(min_length=3, max_length=3)]
    std: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=3, max_length=3)]
    subset: Count | None
    val_fraction: Share
    workers: Annotated[int, Field(ge=0, le=1024)]
    background: Text
    version: Literal[1, 2]


@dataclass(frozen=True, config=_STRICT)
class RecipeConfig(AugmentationOptions):
    """Optimizer, schedule, augmentation and regularisation; lr holds for lr_batch images per step."""

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


@dataclass(frozen=True, config=_STRICT)
class TrainerConfig:
    """How long, on what, in which precision; batch_size is that of a step over all processes."""

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
    save_every_min: Positive


@dataclass(frozen=True, config=_STRICT)
class OpsConfig:
    """Which backend computes, as in `famba.ops.use_backend`."""

    backend: Text


@dataclass(frozen=True, config=_STRICT)
class LoggerConfig:
    """Where metrics go besides the run folder."""

    name: Literal["none", "wandb", "tensorboard"]
    project: Text
    entity: Text | None
    group: Text | None
    mode: Literal["disabled", "offline", "online"]


@dataclass(frozen=True, config=_STRICT)
class RunConfig:
    """Everything that a run is told."""

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
    "data.version": 1,
    "data.background": "white",
    "recipe.layer_decay": None,
}
"""Map each key that configurations have not always had to the value that reproduces what runs did before it."""

_ADAPTER = TypeAdapter(RunConfig)


def parse(values: Mapping[str, Any]) -> RunConfig:
    """Turn nested plain values, as YAML holds them, into a RunConfig.

    Raises ConfigError with every key that is unknown, missing or of a wrong value.
    """
    _refuse_broken_text(values)
    given = flatten(values)
    # `Fusion` has defaults of its own, for those who build networks without a configuration.
    if missing := [
        key for key in keys(Fusion, "fusion.") if key not in given and isinstance(values.get("fusion"), dict)
    ]:
        raise ConfigError("\n".join(f"{key} is missing" for key in missing))
    try:
        # By way of JSON, in which strict validation builds dataclasses from objects.
        return _ADAPTER.validate_json(json.dumps(values))
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(error.errors()))) from None


def plain(config: RunConfig) -> dict[str, Any]:
    """Return the nested plain values of a RunConfig, as YAML and checkpoints hold them."""
    return _ADAPTER.dump_python(config, mode="json")


def with_added_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return an earlier run's configuration with the keys that were added since, as the run went without them."""
    found: dict[str, Any] = dict(values)
    for key, value in ADDED_KEYS.items():
        group, name = key.split(".")
        if isinstance(found.get(group), Mapping):
            found[group] = {name: value, **found[group]}
    return found


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


def _refuse_broken_text(values: Mapping[str, Any]) -> None:
    """Raise ConfigError for text that is no Unicode, as file names and command lines may hold."""
    for key, value in flatten(values).items():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ConfigError(f"{key} is {_shown(value)}: it has to be valid UTF-8") from None


def _explain(problems: list[Any]) -> list[str]:
    """One line for each key at fault; what each member of a union would take is joined."""
    found: dict[str, list[str]] = {}
    for problem in problems:
        start, reason = _start(problem)
        found.setdefault(start, []).append(reason)
    return sorted(start + _either(reasons) for start, reasons in found.items())


def _either(reasons: list[str]) -> str:
    first, *others = dict.fromkeys(reasons)
    return " or ".join([first, *(other.removeprefix("input should be ") for other in others)])


def _start(problem: Any) -> tuple[str, str]:
    """Which key has which value, and what is wrong with it."""
    # Members of a union come with their type's name behind the key.
    key = ".".join(str(part) for part in problem["loc"])
    error = problem.get("ctx", {}).get("error")
    if isinstance(error, ConfigError):
        # The object that stands at this key checked itself.
        message = str(error).removeprefix(f"{error.argument} ")
        return f"{key}.{error.argument}", f"{' ' if message != str(error) else ': '}{message}"
    known = keys()
    if problem["type"] == "unexpected_keyword_argument":
        return f"unknown key {key!r}{near_miss(key, known)}", ""
    key = next((k for k in sorted(known, key=len, reverse=True) if key == k or key.startswith(f"{k}.")), key)
    if problem["type"] == "missing":
        return f"{key} is missing", ""
    reason = problem["msg"].removeprefix("Value error, ")
    return f"{key} is {_shown(problem['input'])}: ", f"{reason[:1].lower()}{reason[1:]}".replace("tuple", "list")


def _shown(value: object) -> str:
    text = without_credentials(repr(value))
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
