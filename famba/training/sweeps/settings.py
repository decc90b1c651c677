"""The settings of each launcher, checked as strictly as those of a run. Defaults stand in configs/hydra/launcher."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from famba.errors import ConfigError, near_miss
from famba.training.config import Count, Positive, Text

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
_KEY = "hydra.launcher"
_PLUGIN = "hydra_plugins.famba_launchers"
SEQUENTIAL, LOCAL, SLURM = (f"{_PLUGIN}.{name}" for name in ("SequentialLauncher", "LocalLauncher", "SlurmLauncher"))
NotNegative = Annotated[int, Field(ge=0, le=10**9)]


@dataclass(frozen=True, config=_STRICT)
class SequentialSettings:
    """Of hydra/launcher=sequential: none."""


@dataclass(frozen=True, config=_STRICT)
class LocalSettings:
    """Of hydra/launcher=local, as local.yaml explains them."""

    jobs: Count | None
    threads: Count | None
    gpus_per_run: NotNegative | None


@dataclass(frozen=True, config=_STRICT)
class SlurmSettings:
    """Of hydra/launcher=slurm, as slurm.yaml explains them."""

    name: Text
    partition: Text | None
    account: Text | None
    qos: Text | None
    constraint: Text | None
    gres: Text | None
    timeout_min: Count
    signal_delay_s: NotNegative
    nodes: Count
    tasks_per_node: Count
    gpus_per_node: NotNegative | None
    cpus_per_task: Count | None
    mem_gb: Positive | None
    array_parallelism: Count
    setup: list[Text] | None
    python: Text | None
    srun_args: list[Text] | None
    additional_parameters: dict[Text, str | bool | int | float | None] | None
    max_num_timeout: NotNegative
    poll_s: Positive


_OF = {SEQUENTIAL: SequentialSettings, LOCAL: LocalSettings, SLURM: SlurmSettings}


def check_settings(launcher: DictConfig | None) -> None:
    """Raise ConfigError for a launcher that is none of famba's, and for each setting that is unknown or wrong."""
    try:
        given: Any = OmegaConf.to_container(launcher, resolve=True) if OmegaConf.is_config(launcher) else None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{_KEY}: {str(error).splitlines()[0]}") from error
    target = given.pop("_target_", None) if isinstance(given, dict) else None
    if target not in _OF:
        raise ConfigError(
            f"hydra/launcher has {_KEY}._target_={target!r}, which knows nothing of run folders; allowed: sequential, "
            "local, slurm, and files of your own that begin with one of them (defaults: [slurm, _self_])"
        )
    try:
        # By way of JSON, as configurations of runs are.
        TypeAdapter(_OF[target]).validate_json(json.dumps(given))
    except ValidationError as error:
        known = [field.name for field in fields(_OF[target])]
        raise ConfigError("\n".join(_explain(error.errors(), target, known))) from None


def _explain(problems: list[Any], target: str, known: list[str]) -> list[str]:
    """One line for each key at fault; what each member of a union would take is joined."""
    found: dict[str, list[str]] = {}
    for problem in problems:
        key = str(problem["loc"][0])
        start, reason = f"{_KEY}.{key} is {_shown(problem)}: ", problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "unexpected_keyword_argument":
            more = "; other options of sbatch go into additional_parameters" if target == SLURM else ""
            start, reason = f"unknown key {_KEY}.{key}{near_miss(key, known)}{more}", ""
        elif problem["type"] == "missing":
            start, reason = f"{_KEY}.{key} is missing; begin the file with `defaults: [slurm, _self_]`", ""
        found.setdefault(start, []).append(f"{reason[:1].lower()}{reason[1:]}")
    return sorted(start + " or ".join(dict.fromkeys(reasons)) for start, reasons in found.items())


def _shown(problem: Mapping[str, Any]) -> str:
    text = repr(problem["input"])
    return text if len(text) <= 100 else f"{text[:100]}..."
