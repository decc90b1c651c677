"""The state of a run and its checkpoints: written whole and sealed, beside training, and read without running code."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from timm.utils import ModelEmaV3
from torch import Tensor

from famba import data
from famba.errors import CheckpointError, DamagedError, some
from famba.files import read_file, read_seal, seal, write_whole
from famba.models import Backbone
from famba.training import interrupts
from famba.training.config import RunConfig, flatten, plain, with_added_keys
from famba.training.distributed import Process
from famba.training.optimizer import load_state, portable_state

FORMAT = 2
_KEPT = 2
_CONTENT = {"format", "config", "world_size", "step", "model", "optimizer", "scaler", "ema", "totals", "schedule"}
_log = logging.getLogger(__name__)

# Settings that may change when a run goes on: the weights that come out stay the same.
_FREE = (
    "run_dir",
    "resume",
    "data.root",
    "data.workers",
    "trainer.max_steps",
    "trainer.device",
    "trainer.cuda_graphs",
    "trainer.log_every",
    "trainer.eval_every",
    "trainer.save_every_min",
    "logger.",
)


@dataclass
class Totals:
    """Hold the sums of a run so far. Times are seconds.

    The epoch_ members cover the current epoch; epoch_open says that it is not yet evaluated and logged. evaluated is
    the last evaluation, best that of the selected checkpoint, schedules each measurement of an adaptive schedule, and
    started_from describes the weights that init_from named.
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

    def begin_epoch(self) -> None:
        """Set the sums of the epoch to zero."""
        self.epoch_data_s = self.epoch_step_s = self.epoch_loss = 0.0
        self.epoch_steps = self.epoch_losses = 0

    def add(self, steps: int, data_s: float, step_s: float) -> None:
        """Add steps and their times."""
        self.steps += steps
        self.epoch_steps += steps
        self.data_s += data_s
        self.epoch_data_s += data_s
        self.step_s += step_s
        self.epoch_step_s += step_s


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

    def is_finite(self) -> bool:
        """Return whether every parameter is a finite number."""
        return all(bool(torch.isfinite(p).all()) for p in self.model.parameters())


class Saver:
    """Write checkpoints in the background, one at a time; training waits for the copy, not for the write."""

    def __init__(self) -> None:
        self._write: Future[object] | None = None

    def save(self, content: Mapping[str, Any], write: Callable[[dict[str, Any]], object]) -> None:
        """Copy `content` and pass the copy to `write` in the background. Raises what the write before it raised."""
        self.wait()
        thread = ThreadPoolExecutor(1, "saving")
        self._write = thread.submit(write, on_host(content))
        thread.shutdown(wait=False)  # it ends with the write: loaders fork best without threads

    def wait(self) -> None:
        """Wait until all is written. Raises what the write raised."""
        write, self._write = self._write, None
        if write is not None:
            write.result()

    def check(self) -> None:
        """Raise what a write has raised, without waiting for one."""
        if self._write is not None and self._write.done():
            self.wait()


def on_host(value: Any) -> Any:
    """Copy nested containers with every tensor in them to the host's memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: on_host(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(on_host(item) for item in value)
    return value


class Checkpoints:
    """The folder of a run's checkpoints: the last two, and the one that validation selected."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.best = folder / "best.pt"

    def path(self, step: int) -> Path:
        """Return the path of the checkpoint of a step."""
        return self.folder / f"step_{step:08d}.pt"

    def newest_first(self) -> list[Path]:
        """Return all checkpoints of steps, whole or not."""
        return sorted(self.folder.glob("step_*[0-9].pt"), reverse=True)

    def save(self, step: int, content: dict[str, Any], selected: bool = False) -> None:
        """Write the checkpoint of a step, also as the selected one where it is; remove all but the last two."""
        path = self.path(step)
        if selected:
            # The selected one first: a run that continues from the other does not select again.
            write(self.best, content)
            write_whole(path, lambda file: _link(self.best, file))
        else:
            write(path, content)
        for old in self.newest_first()[_KEPT:]:
            old.unlink(missing_ok=True)

    def find_last(self) -> Path | None:
        """Return the newest checkpoint that is whole, None where there is none; rename damaged later ones.

        Raises CheckpointError where all are damaged, or where the newest whole one cannot be read.
        """
        damaged: list[Path] = []
        for path in self.newest_first():
            try:
                load(path)
            except DamagedError as error:
                _log.warning("%s; trying the one before it", error)
                damaged.append(path)
                continue
            for later in damaged:
                later.rename(later.with_suffix(".damaged"))
            return path
        if damaged:
            raise CheckpointError(f"no checkpoint in {self.folder} can be read; start anew in another run_dir")
        return None


def load(path: Path) -> dict[str, Any]:
    """Read a run's checkpoint.

    Raises DamagedError where it is not what was written, CheckpointError where it is missing, of another kind or
    format, or cannot be read.
    """
    try:
        content = read_file(path)
    except DamagedError:
        raise
    except CheckpointError as error:
        if path.is_file() and path.suffix != ".safetensors" and not read_seal(path):
            raise DamagedError(str(error)) from error
        raise
    if "format" not in content or "step" not in content:
        raise CheckpointError(f"{path} is no checkpoint of a run; to start from its weights use init_from")
    if content["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {content['format']}, this release reads {FORMAT}; use the release that wrote it"
        )
    if not content.keys() >= _CONTENT or not read_seal(path):
        raise DamagedError(f"{path} is damaged: its end, which seals it, is missing or changed")
    return content


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint and seal it. Raises CheckpointError where the disk refuses."""

    def to_file(name: str) -> None:
        # Python's file reports a full disk; torch's own does not.
        with open(name, "wb") as file:
            torch.save({"format": FORMAT, **content}, file)
        seal(name)

    write_whole(path, to_file)


def save_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write weights alone as safetensors; equal weights give equal bytes."""
    on_cpu = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    write_whole(path, lambda file: save_file(on_cpu, file))


def _link(path: Path, name: str) -> None:
    """Give a file another name; copy it where the file system has no links."""
    os.unlink(name)
    try:
        os.link(path, name)
    except OSError:
        shutil.copyfile(path, name)


def find_checkpoint(config: RunConfig, folder: Checkpoints, process: Process) -> dict[str, Any] | None:
    """Read the checkpoint to continue from, the same in all processes; None where the run starts anew.

    Raises CheckpointError where it is of another run, or where the folder holds later steps than the one that is named.
    """
    resume = config.resume
    if resume == "never" and not interrupts.is_restarted():
        return None
    path = process.from_main(folder.find_last() if process.is_main else None)
    named = Path(resume) if resume not in ("auto", "never") else None
    # A checkpoint of another folder is where the run began; what it has saved itself is where it goes on.
    if named is not None and (path is None or named.resolve().parent == folder.folder.resolve()):
        path = named
    if path is None:
        return None
    found = load(path)
    check_same_run(found, plain(config), process.world_size)
    newest = next((int(file.stem.removeprefix("step_")) for file in folder.newest_first()), 0)
    if path == named and newest > found["step"]:
        raise CheckpointError(
            f"{resume} is of step {found['step']}, but {folder.folder.parent} holds step {newest} already; "
            "choose another run_dir, or resume=auto"
        )
    return found


def changes_weights(key: str) -> bool:
    """Return whether a key, or a group of this name, changes the weights that come out."""
    return not f"{key}.".startswith(_FREE)


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """List the settings in which two configurations differ and that change the weights that come out."""
    old, new = flatten(before), flatten(now)
    return [
        f"{key}: {old.get(key)!r} before, {new.get(key)!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and changes_weights(key)
    ]


def check_same_run(content: dict[str, Any], config: dict[str, Any], world_size: int) -> None:
    """Raise CheckpointError where a checkpoint is of a run with other settings, naming each."""
    differ = differences(with_added_keys(content["config"]), config)
    if content["world_size"] != world_size:
        differ.append(
            f"processes: {content['world_size']} before, {world_size} now "
            "(another number adds up gradients in another order)"
        )
    if differ:
        raise CheckpointError(
            "\n  ".join(["the checkpoint is of a run with other settings:", *differ])
            + "\nUse the same settings to continue it, or another run_dir to start a new run"
        )


@dataclass(frozen=True)
class TrainedOn:
    """Describe the data of a run.

    num_classes: number of classes in the data. classes: their names by number, None where the data does not tell them.
    images: number of images by part.
    """

    num_classes: int
    classes: tuple[str, ...] | None
    images: dict[str, int]

    @classmethod
    def of(cls, splits: data.Splits) -> TrainedOn:
        """Describe the parts of a data set."""
        parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
        images = {name: len(part) for name, part in parts.items() if part is not None}
        return cls(splits.train.num_classes, splits.classes, images)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, as checkpoints hold them."""
        return {**asdict(self), "classes": None if self.classes is None else list(self.classes)}


def check_same_data(content: Mapping[str, Any], now: TrainedOn) -> None:
    """Raise CheckpointError where a run would continue on other classes or images.

    A checkpoint of a version that did not keep them is compared by its number of classes alone.
    """
    before, head = content.get("data"), content["model"].get("head.weight")
    if not before:
        chosen = content["config"]["model"]["num_classes"] is not None
        before = {"num_classes": now.num_classes if chosen or head is None else len(head)}
    differ = []
    if before["num_classes"] != now.num_classes:
        differ.append(f"{before['num_classes']} classes before, {now.num_classes} now")
    if before.get("classes") is not None and now.classes is not None:
        differ += class_differences(before["classes"], now.classes)
    images = before.get("images") or now.images
    for part in dict.fromkeys([*images, *now.images]):
        old, new = images.get(part, 0), now.images.get(part, 0)
        if old != new:
            differ.append(f"{old} {part} images before, {new} now")
    if differ:
        raise CheckpointError(
            "\n  ".join(["the checkpoint is of a run on other data:", *differ])
            + "\nRestore the data to continue the run, or start a new run_dir with init_from=RUN"
        )


def class_differences(before: Sequence[str], now: Sequence[str]) -> list[str]:
    """Describe the differences between two lists of class names; empty where they are equal."""
    lost = [name for name in before if name not in set(now)]
    new = [name for name in now if name not in set(before)]
    differ = [f"classes that are gone: {some(lost)}"] if lost else []
    differ += [f"classes that are new: {some(new)}"] if new else []
    if not differ and list(before) != list(now):
        number = next(i for i, (old, other) in enumerate(zip(before, now, strict=True)) if old != other)
        differ.append(f"the classes are numbered otherwise: {number} was {before[number]}, and is {now[number]} now")
    return differ
