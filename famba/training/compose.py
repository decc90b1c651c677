"""The command line's overrides, composed and checked before Hydra starts a job."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import famba
from famba.errors import ConfigError, near_miss
from famba.training.config import RunConfig, keys, parse
from famba.training.distributed import world_size
from famba.training.setup import prepare

_QUESTIONS = ("help", "hydra_help", "version", "cfg", "info", "shell_completion")


def config_dir() -> Path:
    """Folder of the YAML files: inside the installed package, or beside it in a checkout."""
    package = Path(famba.__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def is_question(arguments: Sequence[str]) -> bool:
    """Whether a command line asks for help or for the configuration rather than for a run."""
    parsed = get_args_parser().parse_args(list(arguments))
    return any(getattr(parsed, name, None) for name in _QUESTIONS)


def check_command(arguments: Sequence[str]) -> None:
    """Check every run that a command line asks for; no folder is made.

    Raises FambaError for the first that cannot work, with what is allowed.
    """
    parsed = get_args_parser().parse_args(list(arguments))
    if parsed.multirun and world_size() > 1:
        raise ConfigError("-m does not go with torchrun; sweep without it, or start one run at a time")
    for job in _jobs(parsed.overrides, parsed.multirun):
        config = compose(job)
        prepare(config)


def name_by_sweep(arguments: Sequence[str]) -> str:
    """Return the override that names a sweep's run folders by the keys that differ between its runs."""
    overrides = _parse(get_args_parser().parse_args(list(arguments)).overrides)
    swept = {item.key_or_group for item in overrides if item.is_sweep_override()}
    same = {item.key_or_group for item in overrides if not item.key_or_group.startswith("hydra")} - swept
    return f"hydra.job.config.override_dirname.exclude_keys=[{','.join(sorted(same))}]"


def compose(overrides: Sequence[str]) -> RunConfig:
    """Compose one run's configuration from Hydra overrides. Raises ConfigError, with a near miss where there is one."""
    overrides = [item for item in overrides if not item.startswith("-")]
    parsed = _parse(overrides)
    _check_groups(parsed)
    _check_keys(parsed)
    try:
        with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
            values = hydra.compose("config", overrides=list(overrides))
        plain = OmegaConf.to_container(values, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(str(error)) from error
    return parse(plain)  # type: ignore[arg-type]


def groups() -> dict[str, list[str]]:
    """Config groups and their choices."""
    return {
        folder.name: sorted(f.stem for f in folder.glob("*.yaml") if not f.stem.startswith("_"))
        for folder in sorted(config_dir().iterdir())
        if folder.is_dir() and any(folder.glob("*.yaml"))
    }


def _jobs(overrides: Sequence[str], multirun: bool) -> list[list[str]]:
    parsed = _parse(overrides)
    sweeps = [item.input_line for item in parsed if item.is_sweep_override()]
    if not multirun:
        if sweeps:
            raise ConfigError(f"{sweeps[0]!r} names several values; add -m for a run with each of them")
        return [list(overrides)]
    try:
        return BasicSweeper.split_arguments(parsed, None)[0]
    except HydraException as error:
        raise ConfigError(str(error)) from error


def _parse(overrides: Sequence[str]) -> list[Override]:
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise ConfigError(
            f"{str(error).splitlines()[0]}; overrides look like fusion=upper or trainer.epochs=10"
        ) from error


def _check_groups(overrides: Sequence[Override]) -> None:
    known = groups()
    for item in overrides:
        choices = known.get(item.key_or_group)
        if choices is None or item.is_delete():
            continue
        value = item.value()
        if value is not None and value not in choices:
            raise ConfigError(
                f"unknown {item.key_or_group} {value!r}{near_miss(str(value), choices)}; allowed: {', '.join(choices)}"
            )


def _check_keys(overrides: Sequence[Override]) -> None:
    known = keys()
    sections = {key.rsplit(".", 1)[0] for key in known if "." in key}
    for item in overrides:
        key = item.key_or_group
        if (
            key in groups()
            or key in known
            or key in sections
            or key.split("/")[0] == "hydra"
            or key.startswith("hydra.")
        ):
            continue
        names = [*known, *groups()]
        raise ConfigError(f"unknown key {key!r}{near_miss(key, names)}; `python train.py --help` lists all")
