"""The classes and images that a run is trained on: kept in its checkpoints, and compared when they are used again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from famba import data
from famba.errors import CheckpointError
from famba.training.summary import SUMMARY, Summary

_SHOWN = 5


@dataclass(frozen=True)
class TrainedOn:
    """The data of a run.

    Attributes:
        num_classes: number of classes in the data.
        classes: their names in the order of their numbers; None where the data does not tell them.
        images: number of images by part; 0 where a stream does not say.
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
        """Return it as plain values, as checkpoints hold it."""
        return {**asdict(self), "classes": None if self.classes is None else list(self.classes)}


def check_same_data(checkpoint: Mapping[str, Any], now: TrainedOn) -> None:
    """Raise CheckpointError where a run would go on with other classes or other images.

    A checkpoint of a version that did not keep them is compared by its number of classes alone.
    """
    before = checkpoint.get("data") or _by_weights(checkpoint)
    differ = []
    if before["num_classes"] is not None and before["num_classes"] != now.num_classes:
        differ.append(f"{before['num_classes']} classes before, {now.num_classes} now")
    if before.get("classes") is not None and now.classes is not None:
        differ += class_differences(before["classes"], now.classes)
    images = before.get("images") or now.images
    for part in dict.fromkeys([*images, *now.images]):
        old, new = images.get(part, 0), now.images.get(part, 0)
        if old != new:
            differ.append(f"{old} {part} images before, {new} now")
    if differ:
        listed = "\n  ".join(differ)
        raise CheckpointError(
            f"the checkpoint is of a run on other data:\n  {listed}\n"
            "Put the data back as it was to continue the run; to train on the new data, begin another run_dir with "
            "init_from=RUN"
        )


def saved_classes(content: Mapping[str, Any], file: Path) -> tuple[str, ...] | None:
    """Return the names of the classes that weights tell apart, None where nothing says them.

    Args:
        content: what was read from the file; a checkpoint holds the names.
        file: where it was read; a run's weights have their summary beside them.

    Raises:
        CheckpointError: the summary beside the file cannot be read.
    """
    kept: Any = content.get("data")
    beside = file.parent / SUMMARY
    if not isinstance(kept, Mapping) and beside.is_file():
        try:
            kept = Summary.parse(beside.read_bytes()).values()
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{beside} cannot be read ({error}); mend it or move it away") from error
    names = kept.get("classes") if isinstance(kept, Mapping) else None
    return tuple(map(str, names)) if isinstance(names, list) else None


def class_differences(before: Sequence[str], now: Sequence[str]) -> list[str]:
    """List in words what differs between two lists of class names; nothing where they are equal."""
    lost = [name for name in before if name not in set(now)]
    new = [name for name in now if name not in set(before)]
    differ = [f"classes that are gone: {some(lost)}"] if lost else []
    differ += [f"classes that are new: {some(new)}"] if new else []
    if not differ and list(before) != list(now):
        number, (old, other) = next(
            (i, pair) for i, pair in enumerate(zip(before, now, strict=True)) if pair[0] != pair[1]
        )
        differ.append(f"the classes are numbered otherwise: {number} was {old}, and is {other} now")
    return differ


def some(names: Sequence[str]) -> str:
    """Return the first few names for a message, and how many there are more."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _by_weights(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an earlier checkpoint's classifier tells of its data."""
    head = checkpoint["model"].get("head.weight")
    chosen = checkpoint["config"]["model"]["num_classes"] is not None
    return {"num_classes": None if chosen or head is None else len(head)}
