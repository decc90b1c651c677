"""The command line's overrides, composed and checked before Hydra starts a job."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import famba
from famba.errors import ConfigError, near_miss
from famba.training.config import RunConfig, keys, parse
from famba.training.distributed import world_size
from famba.training.setup import Setup, prepare
from famba.training.sweeps.launchers import check_launcher, check_run, elsewhere, processes
from famba.training.sweeps.names import register_resolvers, sweep_name

_SHOWN = 200  # characters of an override that an error repeats
_QUESTIONS = ("help", "hydra_help", "version", "cfg", "info", "shell_completion")
_LAUNCHER = "hydra/launcher"
# They would start what was not checked, the last one from a pickle, which can run any code.
_UNCHECKED = ("config-name", "config-path", "experimental-rerun")


@dataclass(frozen=True)
class Command:
    """A command line, taken apart. config_dir is the user's own folder of configuration files, None without one."""

    overrides: tuple[str, ...]
    multirun: bool = False
    config_dir: Path | None = None

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> Command:
        """Take a command line apart. Raises ConfigError for a --config-dir that is no folder, and for _UNCHECKED."""
        parsed = get_args_parser().parse_args(list(arguments))
        for option in _UNCHECKED:
            if getattr(parsed, option.replace("-", "_"), None) is not None:
                raise ConfigError(f"--{option} is not taken; add your own files by --config-dir")
        folder = None if parsed.config_dir is None else Path(parsed.config_dir).absolute()
        if folder is not None and not folder.is_dir():
            raise ConfigError(f"--config-dir {parsed.config_dir} is no folder")
        return cls(tuple(parsed.overrides), parsed.multirun, folder)


@dataclass
class Asked:
    """A configuration of a sweep, whatever its seed, what it comes to, and how many runs of it there are."""

    config: RunConfig
    setup: Setup
    runs: int = 0


def config_dir() -> Path:
    """Folder of the YAML files: inside the installed package, or beside it in a checkout."""
    package = Path(famba.__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def is_question(arguments: Sequence[str]) -> bool:
    """Whether a command line asks for help or for the configuration rather than for a run."""
    parsed = get_args_parser().parse_args(list(arguments))
    return any(getattr(parsed, name, None) for name in _QUESTIONS)


def check_command(arguments: Sequence[str]) -> list[Asked]:
    """Check every run that a command line asks for, and return those of a sweep; no folder is made.

    Raises FambaError for the first that cannot work, with what is allowed.
    """
    command = Command.parse(arguments)
    if command.multirun and world_size() > 1:
        raise ConfigError("-m does not go with torchrun; sweep without it, or start one run at a time")
    checked: list[Asked] = []
    for job in _jobs(command):
        values = _compose(job, command.config_dir)
        config, launcher = run_config(values), values.hydra.get("launcher")
        if not command.multirun:
            prepare(config)
            continue
        if not checked:
            check_launcher(launcher)
        check_run(config, launcher)
        # Whatever the seed, and whichever second its folder is named by, a run is made of the same parts.
        run_dir = checked[0].config.run_dir if checked else config.run_dir
        config = replace(elsewhere(config, launcher), seed=0, run_dir=run_dir)
        known = next((asked for asked in checked if asked.config == config), None)
        if known is None:
            known = Asked(config, prepare(config, processes=processes(launcher)))
            checked.append(known)
        known.runs += 1
    return checked


def name_by_sweep(arguments: Sequence[str]) -> str:
    """Return the override that names a sweep's folder by what its runs share, and theirs by what they differ in.

    A name that the command line gives stays.
    """
    command = Command.parse(arguments)
    overrides = _parse(command.overrides)
    given = {item.key_or_group for item in overrides}
    swept = {item.key_or_group for item in overrides if item.is_sweep_override()}
    swept |= _swept_by_config(command).keys() if command.multirun else set()
    fixed = [item for item in overrides if item.key_or_group not in swept and not _is_hydra(item)]
    names = {}
    if "hydra.sweep.subdir" not in given:
        excluded = ",".join(sorted({item.key_or_group for item in fixed}))
        names["subdir"] = f"${{run_name:${{hydra.overrides.task}},[{excluded}],${{hydra.sweep.dir}}}}"
    if command.multirun and not given & {"run_dir", "hydra.sweep.dir"}:
        experiment = next((str(item.value()) for item in fixed if item.key_or_group == "experiment"), None)
        names["dir"] = f"runs/{sweep_name(experiment, (str(item.input_line) for item in fixed), swept)}"
    return f"hydra.sweep={{{','.join(f'{key}:{quoted(value)}' for key, value in names.items())}}}"


def compose(arguments: Sequence[str]) -> RunConfig:
    """Compose one run's configuration from a command line. Raises ConfigError, with a near miss where there is one."""
    command = Command.parse(arguments)
    return run_config(_compose(command.overrides, command.config_dir))


def compose_all(overrides: Sequence[str], own: Path | None = None) -> list[RunConfig]:
    """Compose every configuration that overrides ask for, those with several values by commas in all combinations."""
    command = Command(tuple(overrides), multirun=True, config_dir=own)
    return [run_config(_compose(job, own)) for job in _jobs(command)]


def run_config(values: DictConfig) -> RunConfig:
    """Return the part of a composed configuration that is famba's."""
    with _explained():
        plain = {str(key): _resolved(values, key) for key in values if key != "hydra"}
    return parse(plain)


def groups(own: Path | None = None) -> dict[str, list[str]]:
    """Config groups and their choices, with those in the folder `own`."""
    found: dict[str, set[str]] = {}
    for folder in [config_dir()] if own is None else [config_dir(), own]:
        for file in folder.rglob("*.yaml"):
            if file.parent != folder and not file.stem.startswith("_"):
                found.setdefault(file.parent.relative_to(folder).as_posix(), set()).add(file.stem)
    return {group: sorted(found[group]) for group in sorted(found)}


def quoted(value: str) -> str:
    """Write a value so that Hydra takes it as it stands."""
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value)
    return f"'{escaped}'"


def _jobs(command: Command) -> list[list[str]]:
    """The overrides of each run that a command line asks for."""
    parsed = _parse(command.overrides)
    sweeps = [item.input_line for item in parsed if item.is_sweep_override()]
    if not command.multirun:
        if sweeps:
            raise ConfigError(f"{sweeps[0]!r} names several values; add -m for a run with each of them")
        _check_single(command, parsed)
        return [list(command.overrides)]
    if any(item.key_or_group == "run_dir" and item.is_sweep_override() for item in parsed):
        raise ConfigError("run_dir is the folder of all runs of a sweep, so it cannot be swept; give one")
    by_config = [f"{key}={value}" for key, value in _swept_by_config(command).items()]
    try:
        return BasicSweeper.split_arguments([*_parse(by_config), *parsed], None)[0]
    except HydraException as error:
        raise ConfigError(str(error)) from error


def _check_single(command: Command, parsed: Sequence[Override]) -> None:
    """Refuse what makes sense for sweeps alone."""
    launcher = [item.input_line for item in parsed if item.key_or_group.startswith((_LAUNCHER, "hydra.launcher."))]
    if launcher:
        raise ConfigError(f"{launcher[0]!r} is for sweeps; add -m, also for a sweep of one run")
    given = {item.key_or_group for item in parsed}
    swept = {key: values for key, values in _swept_by_config(command).items() if key not in given}
    if swept:
        example = " ".join(f"{key}={str(values).split(',')[0]}" for key, values in swept.items())
        raise ConfigError(
            f"the experiment has several values of {', '.join(swept)}; add -m for a run with each combination, "
            f"or give one value of each: {example}"
        )


def _swept_by_config(command: Command) -> dict[str, Any]:
    """What hydra.sweeper.params asks for, where an experiment or the command line sets them."""
    parsed = _parse(command.overrides)
    single = [str(item.input_line) for item in parsed if not item.is_sweep_override()]
    params = OmegaConf.select(_compose(single, command.config_dir).hydra.sweeper, "params")
    return {} if params is None else OmegaConf.to_container(params, resolve=True)  # type: ignore[return-value]


def _compose(overrides: Sequence[str], own: Path | None) -> DictConfig:
    """Compose the whole configuration, Hydra's own part too."""
    parsed = _parse(overrides)
    _check_groups(parsed, own)
    _check_keys(parsed, own)
    search = [] if own is None else [f"hydra.searchpath=[{quoted(f'file://{own}')}]"]
    register_resolvers()
    with _explained(), hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        return hydra.compose("config", overrides=[*search, *overrides], return_hydra_config=True)


def _resolved(values: DictConfig, key: Any) -> Any:
    value = values[key]
    return OmegaConf.to_container(value, resolve=True, throw_on_missing=True) if OmegaConf.is_config(value) else value


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(str(error)) from error


def _parse(overrides: Sequence[str]) -> list[Override]:
    return [_parse_one(item) for item in overrides]


def _parse_one(override: str) -> Override:
    try:
        return OverridesParser.create().parse_override(override)
    except (HydraException, ValueError, RecursionError) as error:
        # Python itself refuses numbers of thousands of digits, and lists in a thousand lists.
        given = override if len(override) <= _SHOWN else f"{override[:_SHOWN]}..."
        raise ConfigError(
            f"{given!r} cannot be read ({str(error).splitlines()[0]}); "
            "overrides look like fusion=upper or trainer.epochs=10, text with special characters like \"key='a,b'\""
        ) from error


def _is_hydra(item: Override) -> bool:
    return item.key_or_group.split("/")[0] == "hydra" or item.key_or_group.startswith("hydra.")


def _check_groups(overrides: Sequence[Override], own: Path | None) -> None:
    known = groups(own)
    for item in overrides:
        choices = known.get(item.key_or_group)
        if choices is None or item.is_delete():
            continue
        value = item.value()
        if value not in choices:
            raise ConfigError(
                f"unknown {item.key_or_group} {value!r}{near_miss(str(value), choices)}; allowed: {', '.join(choices)}"
            )


def _check_keys(overrides: Sequence[Override], own: Path | None) -> None:
    known, choices = keys(), groups(own)
    sections = {key.rsplit(".", 1)[0] for key in known if "." in key}
    for item in overrides:
        key = item.key_or_group
        if not (key in choices or key in known or key in sections or _is_hydra(item)):
            names = [*known, *choices]
            raise ConfigError(f"unknown key {key!r}{near_miss(key, names)}; `python train.py --help` lists all")
