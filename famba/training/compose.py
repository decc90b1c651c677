"""Command lines, composed into configurations by Hydra, and their help."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
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
from famba import plugins
from famba.errors import ConfigError, check_choice
from famba.training.config import RunConfig, keys, parse

LAUNCHER = "hydra/launcher"
_SHOWN = 200  # characters of an override that an error repeats
# Options of Hydra's that are taken; some of the others start unchecked runs, one of them from a pickle.
_OPTIONS = ("overrides", "help", "cfg", "resolve", "multirun", "config_dir", "run")
# Plugins are of a command line: files of a run name no code that reading it would run.
_NOT_OF_A_RUN = ("hydra", "plugins")
_PATHS = ("run_dir", "init_from", "resume", "data.root")
_OF_HYDRA = ("hydra.launcher", "hydra.sweeper.params")


@dataclass(frozen=True)
class Command:
    """Hold a command line.

    config_dir: the user's own folder of configuration files; question: --help or --cfg; notes: on what composing did.
    """

    overrides: tuple[str, ...]
    multirun: bool = False
    config_dir: Path | None = None
    question: str | None = None
    notes: list[str] = field(default_factory=list)

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> Command:
        """Parse a command line. Raises ConfigError for a --config-dir that is no folder, and for options not taken."""
        known, unknown = get_args_parser().parse_known_args(list(arguments))
        if unknown:
            raise ConfigError(_as_override(unknown[0], list(arguments)))
        parsed = vars(known)
        if given := [name for name, value in parsed.items() if value and name not in _OPTIONS]:
            option = given[0].replace("_", "-")
            raise ConfigError(f"--{option} is not taken; add your own files by --config-dir")
        folder = None if parsed["config_dir"] is None else Path(parsed["config_dir"]).absolute()
        if folder is not None and not folder.is_dir():
            raise ConfigError(f"--config-dir {parsed['config_dir']} is no folder")
        question = "help" if parsed["help"] else parsed["cfg"]
        return cls(tuple(map(_with_path, parsed["overrides"])), parsed["multirun"], folder, question)

    def config(self) -> RunConfig:
        """Compose the configuration of one run. Raises ConfigError for what cannot be, or needs -m."""
        parsed = parse_overrides(self.overrides)
        for item in parsed:
            if item.is_sweep_override():
                raise ConfigError(f"{item.input_line!r} names several values; add -m for a run with each of them")
            if re.match("hydra[/.]launcher", item.key_or_group):
                raise ConfigError(f"{item.input_line!r} is for sweeps; add -m, also for a sweep of one run")
        values, given = self.compose(self.overrides), {item.key_or_group for item in parsed}
        if swept := [key for key in swept_by_config(values) if key not in given]:
            raise ConfigError(f"the experiment has several values of {', '.join(swept)}; add -m, or give one of each")
        return run_config(values)

    def shared(self) -> DictConfig:
        """Compose what all runs of a sweep have in common, with Hydra's own part."""
        parsed = parse_overrides(self.overrides)
        return self.compose([str(item.input_line) for item in parsed if not item.is_sweep_override()])

    def jobs(self) -> list[list[str]]:
        """Return the overrides of each run of a sweep: all combinations of the keys with several values."""
        parsed = parse_overrides(self.overrides)
        for item in parsed:
            if item.is_sweep_override() and item.key_or_group.startswith(("run_dir", "hydra")):
                raise ConfigError(f"{item.input_line!r} is the same for all runs of a sweep; give one value")
        by_config = [f"{key}={value}" for key, value in swept_by_config(self.shared()).items()]
        with explained():
            return BasicSweeper.split_arguments([*parse_overrides(by_config), *parsed], None)[0]

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """Compose the whole configuration, with Hydra's own part."""
        _check_names(parse_overrides(overrides), self.config_dir)
        search = [] if self.config_dir is None else [f"hydra.searchpath=[{quoted(f'file://{self.config_dir}')}]"]
        with explained(), hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
            values = hydra.compose("config", overrides=[*search, *overrides], return_hydra_config=True)
        self._fit_warmup(values, overrides)
        given = values.plugins or []
        plugins.load([given] if isinstance(given, str) else map(str, given), self.config_dir)
        return values

    def _fit_warmup(self, values: DictConfig, overrides: Sequence[str]) -> None:
        """Shrink a recipe's warm-up for which trainer.epochs leaves no room, in proportion to the epochs."""
        given = {item.key_or_group for item in parse_overrides(overrides)}
        warmup, epochs = values.recipe.warmup_epochs, values.trainer.epochs
        numbers = isinstance(warmup, int | float) and isinstance(epochs, int)
        if not numbers or not 0 < epochs <= warmup or "trainer.epochs" not in given or "recipe.warmup_epochs" in given:
            return
        others = [item for item in overrides if not item.lstrip("+").startswith("trainer.epochs=")]
        usual = self.compose(others).trainer.epochs
        fitting = warmup * epochs / usual
        # A learning rate that changes at epochs would spend its first one at warmup_lr.
        values.recipe.warmup_epochs = float(int(fitting)) if values.recipe.lr_steps == "epoch" else round(fitting, 4)
        shrunk = f"with trainer.epochs={epochs} it is {values.recipe.warmup_epochs}"
        self.notes.append(f"recipe.warmup_epochs={warmup} is for {usual} epochs; {shrunk}")


def compose(arguments: Sequence[str]) -> RunConfig:
    """Compose one run's configuration from a command line. Raises ConfigError, with a near miss where there is one."""
    return Command.parse(arguments).config()


def run_config(values: DictConfig) -> RunConfig:
    """Return the part of a composed configuration that is famba's."""
    with explained():
        own = OmegaConf.masked_copy(values, [str(key) for key in values if key not in _NOT_OF_A_RUN])
        return parse(OmegaConf.to_container(own, resolve=True, throw_on_missing=True))  # type: ignore[arg-type]


def swept_by_config(values: DictConfig) -> dict[str, Any]:
    """Return the keys with several values in hydra.sweeper.params, which experiments set."""
    params = OmegaConf.select(values.hydra.sweeper, "params")
    return {} if params is None else OmegaConf.to_container(params, resolve=True)  # type: ignore[return-value]


def config_dir() -> Path:
    """Return the folder of the YAML files: inside the installed package, or beside it in a checkout."""
    package = Path(famba.__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def groups(own: Path | None = None) -> dict[str, list[str]]:
    """Return the config groups and their choices, with those in the folder `own`."""
    found: dict[str, set[str]] = {}
    for folder in [config_dir()] if own is None else [config_dir(), own]:
        for file in folder.rglob("*.yaml"):
            if file.parent != folder and not file.stem.startswith("_"):
                found.setdefault(file.parent.relative_to(folder).as_posix(), set()).add(file.stem)
    return {group: sorted(found[group]) for group in sorted(found)}


def quoted(value: str) -> str:
    """Quote a value so that Hydra takes it literally."""
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value)
    return f"'{escaped}'"


def _nearest(name: str, names: Sequence[str]) -> list[str]:
    """Return the names that end with this one behind a dot, else the one that looks most like it."""
    ends = {key.rsplit(".", 1)[-1]: key for key in reversed(names)}
    same = [key for key in names if name in (key, key.rsplit(".", 1)[-1])]
    return same or [ends.get(found, found) for found in get_close_matches(name, [*names, *ends], 1)]


def _as_override(option: str, arguments: list[str]) -> str:
    """Say which override stands for an option that programs of others take, such as --epochs 5."""
    name, _, value = option.lstrip("-").partition("=")
    value = value or next(iter(arguments[arguments.index(option) + 1 :]), "")
    given = "VALUE" if not value or value.startswith("-") else value
    close = [f"{key}={given}" for key in _nearest(name.replace("-", "_"), [*keys(), *groups()])[:3]]
    known = f"give {' or '.join(close)}" if close else "train.py --help lists all"
    return f"{option} is no option; settings are given as KEY=VALUE: {known}"


def _with_path(override: str) -> str:
    """Quote a path that holds "=", as the folders of a sweep's runs do."""
    key, _, path = override.partition("=")
    is_plain = "=" in path and not re.search("[,'\"$\\[{]", path)
    return f"{key}={quoted(path)}" if is_plain and key in _PATHS else override


def parse_overrides(overrides: Sequence[str]) -> list[Override]:
    """Parse overrides. Raises ConfigError for one that is none."""
    given = ""
    try:
        return [OverridesParser.create().parse_override(given := item) for item in overrides]
    except (HydraException, ValueError, RecursionError) as error:  # the latter for endless numbers and lists
        reason = f"{given[:_SHOWN]!r} cannot be read ({str(error).splitlines()[0]})"
        raise ConfigError(f"{reason}; overrides look like fusion=upper or \"key='a,b'\"") from error


@contextmanager
def explained() -> Iterator[None]:
    """Turn errors of Hydra and OmegaConf in a `with` block into ConfigError."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(str(error)) from error


def _check_names(overrides: Sequence[Override], own: Path | None) -> None:
    """Raise ConfigError for an unknown key or choice, with the nearest name."""
    choices, known = groups(own), [*keys(), "plugins"]
    sections = {key.rsplit(".", 1)[0] for key in known if "." in key}
    for item in overrides:
        key, allowed = item.key_or_group, choices.get(item.key_or_group)
        if allowed is not None:
            if not item.is_delete():
                check_choice(key, str(item.value()), allowed)
        elif re.match("hydra[./]", key):
            if not key.startswith(_OF_HYDRA):
                raise ConfigError(f"{key} is not taken; allowed of Hydra's: {LAUNCHER}, {', '.join(_OF_HYDRA)}")
        elif key not in known and key not in sections:
            close = " or ".join(map(repr, _nearest(key, [*known, *choices])))
            near = f", did you mean {close}?" if close else ""
            raise ConfigError(f"unknown key {key!r}{near}; `python train.py --help` lists all")


# The files that explain the keys of a group, if not its _base.
_EXPLAINED = {"recipe": ["_base", "paper"], "logger": ["none"], LAUNCHER: ["local", "slurm"]}


def help_text(own: Path | None = None) -> str:
    """Return the text of --help: every group, choice and key with their comments; own: a folder with more choices."""
    main = (config_dir() / "config.yaml").read_text()
    sections = [Path(__file__).with_name("help.txt").read_text().rstrip()]
    for group, choices in groups(own).items():
        default = re.search(rf"- (?:override )?{group}: (?!null)(\S+)", main)
        lines = [group + (f" (default: {default[1]})" if default else "")]
        for choice in choices:
            files = [place / group / f"{choice}.yaml" for place in (config_dir(), own) if place is not None]
            text = next(file for file in files if file.is_file()).read_text()
            comments = re.findall(r"^# *([^@\s].*)", text, re.MULTILINE)  # directives of Hydra begin with @
            lines.append(f"  {group}={choice:15} {next(iter(comments), '')}")
        for name in _EXPLAINED.get(group, ["_base"]):
            file = config_dir() / group / f"{name}.yaml"
            prefix = "" if name == "paper" else f"{group}.".replace("/", ".")
            lines += ["  keys", *_keys(file, prefix)] if file.is_file() else []
        sections.append("\n".join(lines))
    return "\n\n".join([*sections, "\n".join(["Other keys", *_keys(config_dir() / "config.yaml", "")])]) + "\n"


def _keys(path: Path, prefix: str) -> list[str]:
    """Return the lines of a file that set a key, with their comments, by the key's whole name."""
    lines, section = [], ""
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        if not key.startswith(" "):
            section = f"{key}." if not value.strip() else ""
        if value.strip() and not key.lstrip().startswith(("#", "-", "_")):
            lines.append(f"    {prefix}{section}{line.strip()}")
    return lines
