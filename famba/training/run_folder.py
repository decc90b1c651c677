"""Read and write the run folder, the one product of a run, and go on with a run from its folder alone."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from famba.errors import CheckpointError, ConfigError
from famba.files import remove_unfinished, write_whole
from famba.plugins import VARIABLE
from famba.training import interrupts
from famba.training.checkpoint import Checkpoints, changes_weights, differences, refuse
from famba.training.compose import Command, compose, parse_overrides, quoted
from famba.training.config import ADDED_KEYS, CHANGED_DEFAULTS, RunConfig, flatten, parse, plain, with_added_keys
from famba.training.distributed import world_size
from famba.training.records import FORMAT, METRICS, SUMMARY, SWEEP, Summary, nested

CONFIG = "config.yaml"
WEIGHTS = "model.safetensors"
_REQUEUED_S, _LOOKED_AT_S = 60.0, 0.5
_OF_RECIPES = ("trainer.epochs", "trainer.batch_size", "trainer.precision")
_OF_A_FOLDER = ("run_dir", "resume")
_log = logging.getLogger(__name__)


class RunFolder:
    """Hold the files of a run; in a `with` block no other run may write there. `writes`: in the main process alone."""

    def __init__(self, path: Path, writes: bool) -> None:
        self.path, self.writes = path, writes
        self.checkpoints = Checkpoints(path / "checkpoints")
        self._lock = FileLock(path / ".lock")

    def __enter__(self) -> RunFolder:
        """Make the folder and keep other runs out of it. Raises ConfigError if it is taken or cannot be written."""
        if not self.writes:
            return self
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # A file system may still hold the lock of a requeued job, and `famba status` holds it for an instant.
            self._lock.acquire(timeout=_REQUEUED_S if interrupts.restarts() else _LOOKED_AT_S)
        except Timeout:
            told = "wait for it, or choose another run_dir"
            raise ConfigError(f"another run is writing to {self.path}; {told}") from None
        except NotImplementedError:
            _log.warning("the file system of %s has no locks: make sure that no other run writes there", self.path)
        except OSError as error:
            raise ConfigError(f"run_dir={self.path} cannot be written: {error}") from error
        remove_unfinished(self.path)
        remove_unfinished(self.checkpoints.folder)
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def release(self) -> None:
        """Let other runs into the folder."""
        self._lock.release()

    @property
    def summary(self) -> dict[str, Any] | None:
        """The summary so far, as plain values by the fields of Summary; None if there is none."""
        return self._read(SUMMARY, lambda content: Summary.parse(content).values())

    @property
    def config(self) -> dict[str, Any] | None:
        """The configuration of the run in this folder; None if there is none."""
        return self._read(CONFIG, _parse_config)

    def _read(self, name: str, parse: Any) -> dict[str, Any] | None:
        path = self.path / name
        try:
            return parse(path.read_bytes()) if path.is_file() else None
        except (OSError, ValueError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{path} cannot be read ({reason}); restore it or remove it") from error

    def write_config(self, config: dict[str, Any]) -> None:
        """Write the resolved configuration; a run of an earlier version stays without the keys that it did not have."""
        flat, old = flatten(config), flatten(self.config or config)
        added = {key for key, value in ADDED_KEYS.items() if key not in old and flat[key] == value}
        values = nested({key: value for key, value in flat.items() if key not in added})
        self._write(CONFIG, yaml.safe_dump(values, sort_keys=False))

    def write_summary(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Write the summary, from values by the fields of Summary; return it as plain values."""
        text = json.dumps({**summary, "format": FORMAT}, ensure_ascii=False)
        values = Summary.parse(text.encode(errors="replace")).values()  # paths in errors may be no text
        self._write(SUMMARY, json.dumps(values, indent=2) + "\n")
        return values

    def _write(self, name: str, text: str) -> None:
        if self.writes:
            write_whole(self.path / name, lambda file: Path(file).write_text(text))

    def rewind_metrics(self, step: int, epoch_ended: bool) -> None:
        """Remove the lines of metrics.jsonl after `step`, that of an epoch too unless epoch_ended, and broken lines."""
        path = self.path / METRICS
        if self.writes and path.is_file():
            lines = path.read_text(errors="replace").splitlines()
            self._write(METRICS, "".join(f"{line}\n" for line in lines if _is_before(line, step, epoch_ended)))


def _parse_config(content: bytes) -> dict[str, Any]:
    config = yaml.safe_load(content)
    if not isinstance(config, dict) or not config.keys() >= {"trainer", "model"}:
        raise ValueError("it holds no configuration")
    return config


def _is_before(line: str, step: int, epoch_ended: bool) -> bool:
    try:
        logged = json.loads(line)
        return logged["step"] < step or (logged["step"] == step and (epoch_ended or logged["kind"] != "epoch"))
    except (ValueError, KeyError, TypeError):
        return False


def finished_weights(folder: Path) -> Path:
    """Return the file with the last weights of the finished run in a folder. Raises CheckpointError without."""
    weights, summary = folder / WEIGHTS, RunFolder(folder, writes=False).summary
    # A run that ended at trainer.max_steps and goes on still has those of that end.
    if weights.is_file() and (summary is None or summary["status"] == "finished"):
        return weights
    if kept := Checkpoints(folder / "checkpoints").newest_first():
        raise CheckpointError(f"the run in {folder} is not finished, or has lost its {WEIGHTS}; give {kept[0]}")
    raise CheckpointError(f"{folder} holds no trained network ({WEIGHTS}); give the run_dir of a finished run")


def finished(folder: RunFolder, config: RunConfig) -> dict[str, Any] | None:
    """Return the summary of the run that is done in this folder, None if work is left; another run is an error."""
    summary, begun = folder.summary, folder.checkpoints.newest_first()
    if interrupts.starts_anew(config.resume):
        if summary is not None or begun:
            told = "which resume=never would overwrite; choose another run_dir, or resume=auto"
            raise ConfigError(f"{folder.path} holds a run, {told}")
        return None
    before, now = folder.config, plain(as_begun(config, folder.path))
    done = summary if summary is not None and summary["status"] == "finished" else None
    if before is None or (done is None and not begun):
        return None
    if differ := differences(with_added_keys(before), now):
        what, advice = "run", "Leave these settings out to continue with the run's own, or choose another run_dir"
        if done is not None:
            what = "finished run"
            advice = f"Choose another run_dir. To train on from its weights:\n  {_trained_on(folder.path, now)}"
        refuse(differ, f"{folder.path} holds a {what} with other settings", advice)
    if done is None:
        return None
    most, goal = before["trainer"]["max_steps"], config.trainer.max_steps
    return done if most is None or (goal is not None and goal <= done["step"]) else None


def _trained_on(run_dir: Path, config: dict[str, Any]) -> str:
    """Return the command that begins a run with a configuration, from the weights of a finished run."""
    new = Path(f"{run_dir}-on")
    while new.exists():
        new = Path(f"{new}-on")
    wanted = {**flatten(config), "run_dir": str(new), "init_from": str(run_dir), "resume": "auto"}
    default = flatten(plain(compose([])))
    changed = [override(key, value) for key, value in wanted.items() if default[key] != value]
    return command_line([*changed, *_plugins()])


def as_begun(config: RunConfig, run_dir: Path) -> RunConfig:
    """Return the configuration with which the run in a folder continues.

    Keys that were added since the run began take the values that reproduce its version, and so do those of recipe=paper
    that changed. Raises FambaError if the run's own configuration cannot be read.
    """
    before = None if interrupts.starts_anew(config.resume) else RunFolder(run_dir, writes=False).config
    if before is None:
        return config
    old, now = flatten(before), flatten(plain(config))
    kept = {key: value for key, value in ADDED_KEYS.items() if key not in old}
    if kept and all((old[key], now[key]) == both for key, both in CHANGED_DEFAULTS.items()):
        kept |= {key: then for key, (then, _) in CHANGED_DEFAULTS.items()}
    return parse(nested({**now, **kept}))


def continued(command: Command) -> RunConfig:
    """Return the configuration of a command line; a run in its run_dir keeps its own where the command names none.

    Raises CheckpointError as `finished`.
    """
    config = command.config()
    folder = RunFolder(Path(config.run_dir), writes=False)
    before = None if interrupts.starts_anew(config.resume) else folder.config
    if before is None:
        if (folder.path / SWEEP).is_file():
            told = "is the folder of a sweep; repeat the command of the sweep, or name one of its runs"
            raise ConfigError(f"run_dir={folder.path} {told}")
        return config
    command.notes.clear()  # they are of a new run
    given = {item.key_or_group for item in parse_overrides(command.overrides)}
    begun, own, asked = flatten(before), flatten(with_added_keys(before)), flatten(plain(config))

    def is_named(key: str) -> bool:
        chosen = key.split(".")[0] in given or ("recipe" in given and key in _OF_RECIPES) or "experiment" in given
        by_group = key in begun and (changes_weights(key) or key.startswith("logger."))
        return key in given or key in _OF_A_FOLDER or (chosen and by_group)

    try:
        found = parse(nested({key: asked[key] if is_named(key) else own.get(key, asked[key]) for key in asked}))
    except ConfigError as error:
        if os.environ.get(VARIABLE):
            raise
        told = f"if the run in {folder.path} was begun with plugins=FILE, name it again, or by {VARIABLE}"
        raise ConfigError(f"{error}\n{told}") from error
    finished(folder, found)
    return found


def again(run_dir: str | Path) -> str:
    """Return the command that goes on with a run."""
    arguments = [override("run_dir", str(run_dir)), *_plugins()]
    if (processes := world_size()) == 1:
        return command_line(arguments)
    if os.environ.get("LOCAL_WORLD_SIZE") == str(processes):  # torchrun on one machine
        train = [] if _is_train_py() else ["train"]
        return shlex.join(["torchrun", f"--nproc-per-node={processes}", sys.argv[0], *train, *arguments])
    return f"{command_line(arguments)}  # in {processes} processes, as before"


def _plugins() -> list[str]:
    names = [name for name in os.environ.get(VARIABLE, "").split(os.pathsep) if name]
    return [override("plugins", names)] if names else []


def command_line(arguments: Sequence[str]) -> str:
    """Return the command that was started, with these arguments, quoted for a shell."""
    program = ["python", sys.argv[0]] if _is_train_py() else ["famba", "train"]
    return shlex.join([*program, *arguments])


def _is_train_py() -> bool:
    return Path(sys.argv[0]).name == "train.py"


def override(key: str, value: Any) -> str:
    """Write a setting as Hydra reads it: trainer.epochs=3, run_dir='a, b', plugins=['mine.py']."""
    if isinstance(value, list):
        return f"{key}=[{','.join(override('', item)[1:] for item in value)}]"
    if not isinstance(value, str):
        return f"{key}={json.dumps(value)}"
    # A word or a path; others may be a number, a list or null for Hydra.
    is_plain = re.fullmatch(r"(?!(?i:null|true|false|nan|inf)$)[A-Za-z]\w*|[\w.-]*(/[\w.-]+)+", value, re.ASCII)
    return f"{key}={value if is_plain else quoted(value)}"
