"""Read and write the run folder: the one product of a run."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from famba.errors import CheckpointError, ConfigError
from famba.files import remove_unfinished, write_whole
from famba.training import interrupts
from famba.training.checkpoint import Checkpoints, differences
from famba.training.config import ADDED_KEYS, CHANGED_DEFAULTS, RunConfig, flatten, parse, plain, with_added_keys
from famba.training.records import METRICS, SWEEP
from famba.training.summary import FORMAT, SUMMARY, Summary

CONFIG = "config.yaml"
WEIGHTS = "model.safetensors"
_REQUEUED_S, _LOOKED_AT_S = 60.0, 0.5
_log = logging.getLogger(__name__)


class RunFolder:
    """Hold the files of a run; in a `with` block no other run may write there. `writes`: in the main process alone."""

    def __init__(self, path: Path, writes: bool) -> None:
        self.path = path
        self.writes = writes
        self.checkpoints = Checkpoints(path / "checkpoints")
        self._lock = FileLock(path / ".lock")

    def __enter__(self) -> RunFolder:
        """Make the folder and keep other runs out of it. Raises ConfigError if it is taken or cannot be written."""
        if not self.writes:
            return self
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # A job that Slurm requeued may start while a file system still holds the lock of its last start, and
            # `famba status` holds it for an instant.
            self._lock.acquire(timeout=_REQUEUED_S if interrupts.restarts() else _LOOKED_AT_S)
        except Timeout:
            raise ConfigError(
                f"another run is writing to {self.path}; wait for it, or choose another run_dir"
            ) from None
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
    def sweep(self) -> str | None:
        """Name of the run's sweep; None if it stands alone."""
        parent = self.path.resolve().parent
        return parent.name if (parent / SWEEP).is_file() else None

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
        old = flatten(self.config or config)
        for key in ADDED_KEYS.keys() - old.keys():
            group, name = key.split(".")
            if config[group][name] == ADDED_KEYS[key]:
                del config[group][name]
        self._write(CONFIG, yaml.safe_dump(config, sort_keys=False))

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write the summary, from plain values by the fields of Summary."""
        values = Summary.parse(json.dumps({**summary, "format": FORMAT})).values()
        self._write(SUMMARY, json.dumps(values, indent=2) + "\n")

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
    weights = folder / WEIGHTS
    if weights.is_file():
        return weights
    if kept := Checkpoints(folder / "checkpoints").newest_first():
        raise CheckpointError(f"the run in {folder} is not finished, or has lost its {WEIGHTS}; give {kept[0]}")
    raise CheckpointError(f"{folder} holds no trained network ({WEIGHTS}); give the run_dir of a finished run")


def finished(folder: RunFolder, config: RunConfig) -> dict[str, Any] | None:
    """Return the summary of the run that is done in this folder, None if work is left; another run is an error."""
    summary, before = folder.summary, folder.config
    # A job that Slurm starts again goes on with what it began itself.
    if config.resume == "never" and not interrupts.restarts():
        if summary is not None or folder.checkpoints.newest_first():
            raise ConfigError(
                f"{folder.path} holds a run, which resume=never would overwrite; choose another run_dir, or resume=auto"
            )
        return None
    if summary is None or before is None or summary["status"] != "finished":
        return None
    if changed := differences(with_added_keys(before), plain(as_begun(config, folder.path))):
        listed = "\n  ".join([f"{folder.path} holds a finished run with other settings:", *changed])
        raise CheckpointError(f"{listed}\nChoose another run_dir")
    goal = config.trainer.max_steps
    longer = before["trainer"]["max_steps"] is not None and (goal is None or goal > summary["step"])
    return None if longer else summary


def as_begun(config: RunConfig, run_dir: Path) -> RunConfig:
    """Return the configuration with which the run in a folder continues.

    Keys that were added since the run began take the values that reproduce its version, and so do those of recipe=paper
    that changed; a new run's stay as they are.
    Raises FambaError if the run's own configuration cannot be read.
    """
    if config.resume == "never" and not interrupts.restarts():
        return config
    before = RunFolder(run_dir, writes=False).config
    if before is None:
        return config
    values = plain(config)
    old, now = flatten(before), flatten(values)
    kept = {key: value for key, value in ADDED_KEYS.items() if key not in old}
    if kept and all((old[key], now[key]) == both for key, both in CHANGED_DEFAULTS.items()):
        kept |= {key: then for key, (then, _) in CHANGED_DEFAULTS.items()}
    for key, value in kept.items():
        group, name = key.split(".")
        values[group][name] = value
    return parse(values)
