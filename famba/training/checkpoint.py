"""Hold the state of a run, and write and read its checkpoints."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.utils._pytree import tree_map

from famba import data
from famba.errors import CheckpointError, DamagedError
from famba.files import read_file, read_seal, seal, write_whole
from famba.models import Backbone
from famba.training.config import flatten, with_added_keys
from famba.training.distributed import Process
from famba.training.optimizer import load_state, portable_state

FORMAT = 2
_KEPT = 2
_SHOWN = 1000  # characters of a difference that an error shows
_CONTENT = {"format", "config", "world_size", "step", "model", "optimizer", "scaler", "ema", "totals", "schedule"}
_log = logging.getLogger(__name__)

# Settings that may change when a run goes on: the weights that come out stay the same.
_OF_TRAINER = ("max_steps", "device", "cuda_graphs", "log_every", "eval_", "save_every_min")
_OTHERS = ("run_dir", "resume", "plugins", "data.root", "data.workers", "data.device", "logger.")
_FREE = (*_OTHERS, *(f"trainer.{key}" for key in _OF_TRAINER))


@dataclass
class Totals:
    """Hold the sums of a run so far. Times are seconds.

    The epoch_ members cover the current epoch; epoch_open says that it is not yet evaluated and logged. evaluated is
    the last evaluation, best the selected one, schedules each measurement of an adaptive schedule.
    """

    data_s: float = 0.0
    step_s: float = 0.0
    eval_s: float = 0.0
    steps: int = 0
    evaluations: int = 0
    epoch_open: bool = False
    epoch_data_s: float = 0.0
    epoch_step_s: float = 0.0
    epoch_steps: int = 0
    epoch_loss: float = 0.0
    epoch_losses: int = 0
    evaluated: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    schedules: list[dict[str, Any]] = field(default_factory=list)
    started_from: dict[str, Any] = field(default_factory=dict)

    def add(self, steps: int, data_s: float, step_s: float) -> None:
        """Add steps and their times."""
        self.steps, self.epoch_steps = self.steps + steps, self.epoch_steps + steps
        self.data_s, self.epoch_data_s = self.data_s + data_s, self.epoch_data_s + data_s
        self.step_s, self.epoch_step_s = self.step_s + step_s, self.epoch_step_s + step_s


@dataclass
class TrainingState:
    """Hold what training changes; step counts the steps that are done."""

    model: Backbone
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None
    totals: Totals = field(default_factory=Totals)
    step: int = 0

    def content(self) -> dict[str, Any]:
        """Return what a checkpoint needs to continue from, as tensors and plain values."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": portable_state(self.optimizer),
            "scaler": self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "schedule": list(self.model.fusion),
            "totals": asdict(self.totals),
        }

    def restore(self, content: dict[str, Any]) -> None:
        """Load what `content` returned."""
        self.step = content["step"]
        self.set_fusion(content["schedule"])
        self.model.load_state_dict(content["model"])
        load_state(self.optimizer, content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        if self.ema is not None:
            self.ema.module.load_state_dict(content["ema"])
        self.totals = Totals(**content["totals"])

    def set_fusion(self, schedule: Sequence[int]) -> None:
        """Set the schedule of the model and of its average."""
        self.model.set_fusion(schedule)
        if self.ema is not None:
            cast(Backbone, self.ema.module).set_fusion(schedule)


class Checkpoints:
    """Hold a run's checkpoints: the last two, and the one that validation selected.

    They are written in the background, one at a time: training waits for the copy, not for the write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.best = folder, folder / "best.pt"
        self._writing: Future[None] | None = None

    def path(self, step: int) -> Path:
        """Return the path of the checkpoint of a step."""
        return self.folder / f"step_{step:08d}.pt"

    def newest_first(self) -> list[Path]:
        """Return all checkpoints of steps, whole or not."""
        return sorted(self.folder.glob("step_*[0-9].pt"), reverse=True)

    def save(self, step: int, content: Mapping[str, Any], selected: bool, before: Callable[[], object]) -> None:
        """Copy a state and write it in the background, also as the selected one if it is; keep the last two.

        before: is called before the write. Raises what the write before it raised.
        """
        self.wait()
        copy = tree_map(lambda x: x.detach().to("cpu", copy=True) if isinstance(x, Tensor) else x, dict(content))

        def write_all() -> None:
            before()
            if selected:  # first, since a run that continues from the other does not select again
                write(self.best, copy)
            write(self.path(step), copy)
            for old in self.newest_first()[_KEPT:]:
                old.unlink(missing_ok=True)

        thread = ThreadPoolExecutor(1, "saving")
        self._writing = thread.submit(write_all)
        thread.shutdown(wait=False)  # it ends with the write: loaders fork best without threads

    def wait(self, block: bool = True) -> None:
        """Wait until all is written, or look whether it is. Raises what the write raised."""
        if self._writing is not None and (block or self._writing.done()):
            writing, self._writing = self._writing, None
            writing.result()

    def find_last(self) -> Path | None:
        """Return the newest checkpoint that is whole, None without any; rename damaged later ones unless all are."""
        paths = self.newest_first()
        for number, path in enumerate(paths):
            try:
                load(path)
            except DamagedError as error:
                _log.warning("%s; trying the one before it", error)
                continue
            for later in paths[:number]:
                later.rename(later.with_suffix(".damaged"))
            return path
        if paths:
            raise CheckpointError(f"no checkpoint in {self.folder} can be read; start anew in another run_dir")
        return None


def load(path: Path) -> dict[str, Any]:
    """Read a run's checkpoint. Raises DamagedError if it is not what was written, else CheckpointError."""
    try:
        content = read_file(path)
    except CheckpointError as error:
        if not isinstance(error, DamagedError) and path.is_file() and not read_seal(path):
            raise DamagedError(str(error)) from error
        raise
    if "format" not in content or "step" not in content:
        raise CheckpointError(f"{path} is no checkpoint of a run; to start from its weights use init_from")
    if (found := content["format"]) != FORMAT:
        raise CheckpointError(f"{path} has format {found}, this release reads {FORMAT}; use the release that wrote it")
    if not content.keys() >= _CONTENT or not read_seal(path):
        raise DamagedError(f"{path} is damaged: its end, which seals it, is missing or changed")
    return content


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint and seal it. Raises CheckpointError if the disk refuses."""

    def to_file(name: str) -> None:
        with open(name, "wb") as file:  # which reports a full disk; torch's own file does not
            torch.save({"format": FORMAT, **content}, file)
        seal(name)

    write_whole(path, to_file)


def save_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write weights alone as safetensors; equal weights give equal bytes."""
    on_cpu = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    write_whole(path, lambda file: Path(file).write_bytes(save(on_cpu)))  # save_file hides a full disk


def find_checkpoint(resume: str, now: dict[str, Any], folder: Checkpoints, process: Process) -> dict[str, Any] | None:
    """Read the checkpoint to continue from, the same in all processes; None if the run starts anew.

    The checkpoint that `resume` names is used only while the run has none of its own. now: as in `check_same_run`.
    """
    path = process.from_main(folder.find_last() if process.is_main else None)
    if path is None and resume in ("auto", "never"):
        return None
    asked = Path(resume).resolve()
    if path is not None and path.name != asked.name and path.resolve().parent == asked.parent and asked.suffix:
        _log.warning("this run goes on from %s; to go back to resume=%s, give another run_dir", path.name, resume)
    found = load(path or Path(resume))
    check_same_run(found, now)
    best = Path(resume).with_name(folder.best.name)
    if path is None and process.is_main and best.is_file():  # selected before the run goes on here
        write_whole(folder.best, lambda file: shutil.copyfile(best, file))
    return found


def changes_weights(key: str) -> bool:
    """Return whether a key or group changes the weights that come out."""
    return not f"{key}.".startswith(_FREE)


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """List the settings that differ between two configurations and change the weights."""
    old, new = flatten(before), flatten(now)
    return [
        f"{key}: {old.get(key)!r} before, {new.get(key)!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and changes_weights(key)
    ]


def refuse(differ: Sequence[str], what: str, advice: str) -> None:
    """Raise CheckpointError that lists what differs, if anything does."""
    if differ:
        raise CheckpointError("\n  ".join([f"{what}:", *(line[:_SHOWN] for line in differ)]) + f"\n{advice}")


def check_same_run(found: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise CheckpointError if config, world_size or data of a checkpoint are not those of the run, naming what is."""
    differ = differences(with_added_keys(found["config"]), now["config"])
    if (before := found["world_size"]) != (processes := now["world_size"]):
        differ.append(f"processes: {before} before, {processes} now (they add up gradients in another order)")
    advice = "Use the same settings to continue it, or another run_dir for a new run"
    refuse(differ, "the checkpoint is of a run with other settings", advice)
    before, own = found.get("data", now["data"]), now["data"]  # version 0.1 did not keep it
    if None in (before["classes"], own["classes"]):  # CIFAR's names are not in its parquet files
        before, own = ({**one, "classes": None} for one in (before, own))
    differ = differences(before, own)
    advice = "Restore the data to continue, or start a new run_dir with init_from=RUN"
    refuse(differ, "the checkpoint is of a run on other data", advice)


@dataclass(frozen=True)
class TrainedOn:
    """Describe the data of a run: its classes, their names by number if they are known, and the images of each part."""

    num_classes: int
    classes: list[str] | None
    images: dict[str, int]

    @classmethod
    def of(cls, splits: data.Splits) -> TrainedOn:
        """Describe the parts of a data set."""
        parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
        images = {name: len(part) for name, part in parts.items() if part is not None}
        return cls(splits.train.num_classes, list(splits.classes) if splits.classes else None, images)
