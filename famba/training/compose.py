"""Command lines, composed into configurations by Hydra, and their help."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import indent
from typing import Any

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import famba
from famba import plugins
from famba.errors import ConfigError, check_choice, near_miss
from famba.training.config import RunConfig, keys, parse

_SHOWN = 200  # characters of an override that an error repeats
# Options of Hydra's that are taken; some of the others start unchecked runs, one of them from a pickle.
_OPTIONS = ("overrides", "help", "cfg", "resolve", "multirun", "config_dir", "run")
_OF_HYDRA = ("hydra/launcher", "hydra.launcher", "hydra.sweeper.params")
# The files that explain the keys.
_EXPLAINED = (
    *("config", "model/_base", "fusion/_base", "data/_base", "recipe/paper", "recipe/_base", "logger/none"),
    *("hydra/launcher/local", "hydra/launcher/slurm"),
)


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
        known, unknown = get_args_parser().parse_known_intermixed_args(list(arguments))
        if unknown:
            option = unknown[0].split("=")[0]
            near = near_miss(option.replace("-", "_"), [*keys(), *groups()])
            told = f"{option} is no option; settings are given as KEY=VALUE{near}"
            raise ConfigError(f"{told}; `python train.py --help` lists all")
        given = vars(known)
        if not_taken := [name.replace("_", "-") for name, value in given.items() if value and name not in _OPTIONS]:
            raise ConfigError(f"--{not_taken[0]} is not taken; add your own files by --config-dir")
        folder = None if given["config_dir"] is None else Path(given["config_dir"]).absolute()
        if folder is not None and not folder.is_dir():
            raise ConfigError(f"--config-dir {given['config_dir']} is no folder")
        question = "help" if given["help"] else given["cfg"]
        return cls(tuple(given["overrides"]), given["multirun"], folder, question)

    def config(self) -> RunConfig:
        """Compose the configuration of one run. Raises ConfigError for what cannot be, or needs -m."""
        for item in parse_overrides(self.overrides):
            if item.is_sweep_override():
                raise ConfigError(f"{item.input_line!r} names several values; add -m for a run with each of them")
            if re.match("hydra[/.]launcher", item.key_or_group):
                raise ConfigError(f"{item.input_line!r} is for sweeps; add -m, also for a sweep of one run")
        return self.config_of(self.overrides)

    def config_of(self, overrides: Sequence[str]) -> RunConfig:
        """Compose the configuration of the run with these overrides. Raises ConfigError for what cannot be."""
        values = self.compose(overrides)
        if swept := swept_by_config(values).keys() - {item.key_or_group for item in parse_overrides(overrides)}:
            told = f"an experiment has several values of {', '.join(sorted(swept))}"
            way = "sweep one experiment at a time" if self.multirun else "add -m"
            raise ConfigError(f"{told}; {way}, or give one of each")
        # Plugins belong to a command line, not to the run's files: reading a run must not run code.
        own = [str(key) for key in values if key not in ("hydra", "plugins")]
        with explained():
            found: Any = OmegaConf.to_container(OmegaConf.masked_copy(values, own), resolve=True, throw_on_missing=True)
        return parse(found)

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
        given = {str(item.input_line): item.key_or_group for item in parse_overrides(overrides)}
        warmup, epochs = values.recipe.warmup_epochs, values.trainer.epochs
        numbers = isinstance(warmup, int | float) and isinstance(epochs, int)
        chosen = "trainer.epochs" in given.values() and "recipe.warmup_epochs" not in given.values()
        if not chosen or not numbers or not 0 < epochs <= warmup:
            return
        usual = self.compose([line for line, key in given.items() if key != "trainer.epochs"]).trainer.epochs
        fitting = warmup * epochs / usual
        # A learning rate that changes at epochs would spend its first one at warmup_lr.
        values.recipe.warmup_epochs = float(int(fitting)) if values.recipe.lr_steps == "epoch" else round(fitting, 4)
        shrunk = f"with trainer.epochs={epochs} it is {values.recipe.warmup_epochs}"
        self.notes.append(f"recipe.warmup_epochs={warmup} is for {usual} epochs; {shrunk}")


def compose(arguments: Sequence[str]) -> RunConfig:
    """Compose one run's configuration from a command line. Raises ConfigError, with a near miss where there is one."""
    return Command.parse(arguments).config()


def swept_by_config(values: DictConfig) -> dict[str, Any]:
    """Return the keys with several values in hydra.sweeper.params, which experiments set."""
    return dict(OmegaConf.select(values, "hydra.sweeper.params") or {})


def config_dir() -> Path:
    """Return the folder of the YAML files: inside the installed package, or beside it in a checkout."""
    package = Path(famba.__file__).resolve().parent
    return next(folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir())


def groups(own: Path | None = None) -> dict[str, dict[str, Path]]:
    """Return the choices of each config group and their files, with those in the folder `own`."""
    found: dict[str, dict[str, Path]] = {}
    for folder in [config_dir()] if own is None else [config_dir(), own]:
        for file in sorted(folder.rglob("[!_]*.yaml")):
            if file.parent != folder:
                found.setdefault(file.parent.relative_to(folder).as_posix(), {}).setdefault(file.stem, file)
    return found


def quoted(value: str) -> str:
    """Quote a value so that Hydra takes it literally."""
    return QuotedString(value, Quote.single).with_quotes()


def parse_overrides(overrides: Sequence[str]) -> list[Override]:
    """Parse overrides. Raises ConfigError for one that is none."""
    given = ""
    try:
        return [OverridesParser.create().parse_override(given := item) for item in overrides]
    except (HydraException, ValueError, RecursionError) as error:  # the latter for endless numbers and lists
        reason = f"{given[:_SHOWN]!r} cannot be read ({str(error).splitlines()[0]})"
        told = "overrides look like fusion=upper, and a value with = or , in it like \"run_dir='a=1,b=2'\""
        raise ConfigError(f"{reason}; {told}") from error


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
        key = item.key_or_group
        if key in choices:
            if not item.is_delete():
                check_choice(key, str(item.value()), choices[key])
        elif re.match("hydra[./]", key):
            if not key.startswith(_OF_HYDRA):
                raise ConfigError(f"{key} is not taken; allowed of Hydra's: {', '.join(_OF_HYDRA)}")
        elif key not in known and key not in sections:
            near = near_miss(key, [*known, *choices])
            raise ConfigError(f"unknown key {key!r}{near}; `python train.py --help` lists all")


def help_text(own: Path | None = None) -> str:
    """Return the text of --help: the choices of every group, and the files that explain every key; own: as `groups`."""
    text = Path(__file__).with_name("help.txt").read_text()
    for group, choices in groups(own).items():
        for choice, file in choices.items():
            comment = re.search(r"^# *([^@\s].*)", file.read_text(), re.MULTILINE)  # directives of Hydra begin with @
            text += f"\n{f'{group}={choice}':30} {comment[1] if comment else ''}"
    for name in _EXPLAINED:
        text += f"\n\nconfigs/{name}.yaml\n{indent((config_dir() / f'{name}.yaml').read_text().rstrip(), '  ')}"
    return f"{text}\n"
