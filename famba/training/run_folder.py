"""The run folder: the one product of a run."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from famba.errors import CheckpointError, ConfigError
from famba.files import remove_unfinished, write_whole
from famba.training import slurm
from famba.training.checkpoint import Checkpoints, differences
from famba.training.config import RunConfig, plain, with_added_keys
from famba.training.summary import FORMAT, SUMMARY, Summary

METRICS = "metrics.jsonl"
SWEEP = "sweep.json"
WEIGHTS = "model.safetensors"
_REQUEUED_S, _LOOKED_AT_S = 60.0, 0.5
_log = logging.getLogger(__name__)


class RunFolder:
    """Files of a run. Only the main process writes; `writes` is False in the others, whose calls do nothing."""

    def __init__(self, path: Path, writes: bool) -> None:
        self.path = path
        self.writes = writes
        self.checkpoints = Checkpoints(path / "checkpoints")
        self._lock = FileLock(path / ".lock")

    def __enter__(self) -> RunFolder:
        self.claim()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def claim(self) -> None:
        """Make the folder and keep other runs out of it. Raises ConfigError where it is taken or cannot be written."""
        if not self.writes:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # A job that Slurm requeued may start while a file system still holds the lock of its last start, and
            # `famba status` holds it for an instant.
            self._lock.acquire(timeout=_REQUEUED_S if slurm.is_restarted() else _LOOKED_AT_S)
        except Timeout:
            raise ConfigError(
                f"another run is writing to {self.path}; wait for it, or choose another run_dir"
            ) from None
        except NotImplementedError:
            _log.warning("the file system of %s has no locks: see to it that no other run writes there", self.path)
        except OSError as error:
            raise ConfigError(f"run_dir={self.path} cannot be written: {error}") from error
        remove_unfinished(self.path)
        self.checkpoints.remove_unfinished()

    def release(self) -> None:
        """Let other runs into the folder."""
        if self.writes:
            self._lock.release()

    @property
    def sweep(self) -> str | None:
        """Name of the sweep that the run belongs to; None where it stands alone."""
        parent = self.path.resolve().parent
        return parent.name if (parent / SWEEP).is_file() else None

    @property
    def summary(self) -> dict[str, Any] | None:
        """The summary so far, as plain values by the fields of Summary; None where there is none."""
        path = self.path / SUMMARY
        if not path.is_file():
            return None
        try:
            return Summary.parse(path.read_bytes()).values()
        except ValueError as error:
            raise ConfigError(f"{path} is damaged ({error}); remove it, or choose another run_dir") from error

    @property
    def config(self) -> dict[str, Any] | None:
        """The configuration of the run in this folder; None where there is none."""
        path = self.path / "config.yaml"
        if not path.is_file():
            return None
        try:
            config = yaml.safe_load(path.read_bytes())
            if not isinstance(config, dict) or not config.keys() >= {"trainer", "model"}:
                raise ValueError("it holds no configuration")
        except (yaml.YAMLError, ValueError) as error:
            raise ConfigError(f"{path} is damaged ({error}); remove it, or choose another run_dir") from error
        return config

    def write_config(self, config: dict[str, Any]) -> None:
        """Write the resolved configuration."""
        if self.writes:
            text = yaml.safe_dump(config, sort_keys=False)
            write_whole(self.path / "config.yaml", lambda file: Path(file).write_text(text))

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write the summary, from plain values by the fields of Summary."""
        if self.writes:
            text = json.dumps(Summary.parse(json.dumps({**summary, "format": FORMAT})).values(), indent=2) + "\n"
            write_whole(self.path / SUMMARY, lambda file: Path(file).write_text(text))

    def rewind_metrics(self, step: int, epoch_ended: bool) -> None:
        """Drop what metrics.jsonl says of later than `step`, and a line that was cut off.

        epoch_ended: whether the line of an epoch that ends with `step` is to stay.
        """
        path = self.path / METRICS
        if not self.writes or not path.is_file():
            return
        kept = [line for line in path.read_text(errors="replace").splitlines() if _is_before(line, step, epoch_ended)]
        text = "".join(f"{line}\n" for line in kept)
        write_whole(path, lambda file: Path(file).write_text(text))


def finished_weights(folder: Path) -> Path:
    """Return the file with the last weights of the finished run in a folder. Raises CheckpointError where none is."""
    weights = folder / WEIGHTS
    if weights.is_file():
        return weights
    latest = RunFolder(folder, writes=False).checkpoints.latest
    if latest is not None:
        raise CheckpointError(f"the run in {folder} is not finished; to take it as it is, give its checkpoint {latest}")
    raise CheckpointError(f"{folder} holds no trained network ({WEIGHTS}); give the run_dir of a finished run")


def finished(folder: RunFolder, config: RunConfig) -> dict[str, Any] | None:
    """Return the summary of a run that is done in this folder, with the same settings; None where there is work left.

    Raises FambaError where the folder holds a run that this configuration may not continue, or damage.
    """
    summary, before = folder.summary, folder.config
    # A job that Slurm starts again goes on with what it began itself.
    if config.resume == "never" and not slurm.is_restarted():
        if summary is not None or folder.checkpoints.latest is not None:
            raise ConfigError(
                f"{folder.path} holds a run, which resume=never would overwrite; choose another run_dir, or resume=auto"
            )
        return None
    if folder.checkpoints.contain(config.resume) or summary is None or before is None:
        return None
    if summary["status"] != "finished":
        return None
    changed = differences(with_added_keys(before), plain(config))
    if changed:
        listed = "\n  ".join(changed)
        raise CheckpointError(
            f"{folder.path} holds a finished run with other settings:\n  {listed}\nChoose another run_dir"
        )
    goal = config.trainer.max_steps
    longer = before["trainer"]["max_steps"] is not None and (goal is None or goal > summary["step"])
    return None if longer else summary


def _is_before(line: str, step: int, epoch_ended: bool) -> bool:
    try:
        logged = json.loads(line)
        return logged["step"] < step or (logged["step"] == step and (epoch_ended or logged["kind"] != "epoch"))
    except (json.JSONDecodeError, KeyError, TypeError):
        return False
