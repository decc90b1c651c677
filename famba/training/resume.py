"""Go on with a run from its folder alone, and write command lines that go on, as a shell takes them."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from famba.errors import CheckpointError, ConfigError
from famba.plugins import VARIABLE
from famba.training import interrupts
from famba.training.checkpoint import changes_weights
from famba.training.compose import Command, compose, config_dir, groups, parse_overrides, quoted
from famba.training.config import RunConfig, flatten, parse, plain, with_added_keys
from famba.training.distributed import world_size
from famba.training.records import nested
from famba.training.run_folder import RunFolder

_OF_RECIPES = ("trainer.epochs", "trainer.batch_size", "trainer.precision")
_OF_A_FOLDER = ("run_dir", "resume")


def continued(command: Command) -> RunConfig:
    """Return the configuration of a command line; that of the run in its run_dir where one is there.

    What the command line says beside run_dir may change if the weights stay the same, and must equal the run's if not.
    Raises CheckpointError that names what differs.
    """
    config = command.config()
    folder = RunFolder(Path(config.run_dir), writes=False)
    before = folder.config
    if before is None or (config.resume == "never" and not interrupts.restarts()):
        return config
    command.notes.clear()  # they are of a new run
    given = {item.key_or_group for item in parse_overrides(command.overrides)}
    begun, own, asked = flatten(before), flatten(with_added_keys(before)), flatten(plain(config))

    def by_group(key: str) -> bool:
        chosen = key.split(".")[0] in given or ("recipe" in given and key in _OF_RECIPES)
        return key in begun and (chosen or "experiment" in given)

    named = [key for key in asked if key not in _OF_A_FOLDER and (key in given or by_group(key))]
    if differ := [key for key in named if changes_weights(key) and own.get(key) != asked[key]]:
        finished = (folder.summary or {}).get("status") == "finished"
        lines = [f"{folder.path} holds a {'finished ' * finished}run with other settings:"]
        lines += [f"  {key}: {own.get(key)!r} before, {asked[key]!r} now" for key in differ]
        if finished:
            longer = trained_on(folder.path, own, {key: asked[key] for key in differ})
            lines.append(f"Choose another run_dir. To train on from its weights:\n  {longer}")
        else:
            which = "it" if len(differ) == 1 else "them"
            lines.append(f"Leave {which} out to go on with its own, or choose another run_dir")
        raise CheckpointError("\n".join(lines))
    changed = {key: asked[key] for key in named if key in given or key.startswith("logger.")}
    kept = {key: own[key] for key in asked if key in own and key not in _OF_A_FOLDER}
    try:
        return parse(nested({**asked, **kept, **changed}))
    except ConfigError as error:
        told = f"{folder.path} cannot be continued here: {error}. If a plugin of yours added that, name its file in"
        raise ConfigError(f"{told} {VARIABLE}", error.argument) from error


def again(run_dir: str | Path) -> str:
    """Return the command that goes on with a run."""
    plugins = [name for name in os.environ.get(VARIABLE, "").split(os.pathsep) if name]
    arguments = [override("run_dir", str(run_dir)), *[override("plugins", plugins)] * bool(plugins)]
    if (processes := world_size()) == 1:
        return command_line(arguments)
    if os.environ.get("LOCAL_WORLD_SIZE") == str(processes):  # torchrun on one machine
        train = [] if _is_train_py() else ["train"]
        return shlex.join(["torchrun", f"--nproc-per-node={processes}", sys.argv[0], *train, *arguments])
    return f"{command_line(arguments)}  # in {processes} processes, as before"


def trained_on(run_dir: Path, own: dict[str, Any], changes: dict[str, Any]) -> str:
    """Return the command that begins a run as another was begun, by dotted keys, with changes and from its weights."""
    wanted, chosen = {**own, **changes, "init_from": str(run_dir)}, list[str]()
    for group, choices in groups().items():
        if group in wanted or any(key.startswith(f"{group}.") for key in wanted):
            chosen.append(f"{group}={max(choices, key=lambda choice: _likeness(group, choice, wanted))}")
    default = flatten(plain(compose(chosen)))
    new = Path(f"{run_dir}-on")
    while new.exists():
        new = Path(f"{new}-on")
    wanted = {key: value for key, value in wanted.items() if key not in _OF_A_FOLDER and default.get(key) != value}
    return command_line(
        [*chosen, *(override(key, value) for key, value in wanted.items()), override("run_dir", str(new))]
    )


def _likeness(group: str, choice: str, wanted: dict[str, Any]) -> int:
    """Return how many keys a choice sets as wanted, less those that it sets otherwise."""
    values = _sets(config_dir() / group / f"{choice}.yaml")
    return sum(1 if wanted[key] == value else -1 for key, value in values.items() if key in wanted)


def _sets(file: Path) -> dict[str, Any]:
    """Return the dotted keys that a choice's file sets, with those of the files that it begins with."""
    text = file.read_text()
    content, values = yaml.safe_load(text) or {}, dict[str, Any]()
    for base in content.pop("defaults", []):
        above = file.with_name(f"{base}.yaml")
        values |= _sets(above) if above.is_file() else {}
    return values | flatten(content, "" if "@package _global_" in text else f"{file.parent.name}.")


def command_line(arguments: Sequence[str]) -> str:
    """Return the command that was started, with these arguments, quoted for a shell."""
    program = ["python", sys.argv[0]] if _is_train_py() else ["famba", "train"]
    return shlex.join([*program, *arguments])


def _is_train_py() -> bool:
    return Path(sys.argv[0]).name == "train.py"


def override(key: str, value: Any) -> str:
    """Write a setting as Hydra reads it: trainer.epochs=3, "run_dir='a, b'"."""
    return f"{key}={_written(value)}"


def _written(value: Any) -> str:
    if isinstance(value, str):
        try:
            plainly = OverridesParser.create().parse_override(f"key={value}")
            is_same = not plainly.is_sweep_override() and plainly.value() == value and "${" not in value
        except HydraException:
            is_same = False
        return value if is_same else quoted(value)
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    return "null" if value is None else str(value).lower()
