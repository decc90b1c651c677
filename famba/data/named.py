"""Data sets that timm knows by a name with a prefix: torch/, hfds/, hfids/, tfds/ and wds/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.data import create_dataset

from famba.data.folder import classes_of
from famba.data.readers import DatasetSource, ReaderSource
from famba.data.sources import Source, Splits
from famba.data.streams import StreamSource
from famba.errors import ConfigError, DataError, near_miss

PREFIXES = ("torch", "hfds", "hfids", "tfds", "wds")
_STREAMED = ("hfids", "tfds", "wds")
_NEED_ROOT = ("torch", "wds")
_TEST_SPLITS = ("validation", "val", "test")


def load_named(name: str, root: Path | None, *, num_classes: int | None) -> Splits:
    """Open a data set by timm's name; what its reader stores is not copied or downloaded by Famba.

    The test set is the split "validation", "val" or "test", the first that exists: public data sets often
    have a "test" whose labels are secret.

    Args:
        name: such as "torch/cifar10", "hfds/<repository>" or "wds/".
        root: where the data lies; hfds, hfids and tfds use their own cache where it is None.
        num_classes: number of classes; None where the data set tells.

    Raises:
        ConfigError: for an unknown prefix, a missing root, or a number of classes that is missing or wrong.
        DataError: where timm cannot open the data.
    """
    check_named(name, root)
    prefix = _prefix(name)
    folder = None if root is None else str(root)
    train = _open(name, folder, ("train",), num_classes, streamed=prefix in _STREAMED)
    test = _open(name, folder, _TEST_SPLITS, num_classes or train.num_classes, streamed=prefix in _STREAMED)
    return Splits(train=train, validation=None, test=test)


def check_named(name: str, root: Path | None) -> None:
    """Raise ConfigError for an unknown prefix or a missing root."""
    prefix = _prefix(name)
    if prefix not in PREFIXES:
        known = ", ".join(f"{known}/" for known in PREFIXES)
        raise ConfigError(f"data {name!r}: unknown prefix, known are {known}{near_miss(prefix, PREFIXES)}.", "name")
    if root is None and needs_root(name):
        raise ConfigError(f"data {name!r} needs data.root, the folder that holds it.", "root")


def needs_root(name: str) -> bool:
    """Whether a name with a prefix is read from a folder that has to be there."""
    return _prefix(name) in _NEED_ROOT


def _prefix(name: str) -> str:
    return name.partition("/")[0].lower()


def _open(
    name: str, root: str | None, splits: tuple[str, ...], num_classes: int | None, *, streamed: bool
) -> Source | StreamSource:
    dataset, split = _create(name, root, splits, streamed=streamed)
    classes = _num_classes(name, dataset, num_classes)
    if streamed:
        length = int(dataset.reader.num_samples or 0)
        return StreamSource(name, root, split, classes, length)
    reader = getattr(dataset, "reader", None)
    return DatasetSource(dataset, classes) if reader is None else ReaderSource(reader, classes)


def _create(name: str, root: str | None, splits: tuple[str, ...], *, streamed: bool) -> tuple[Any, str]:
    """Return the data set of the first split that exists, and that split's name."""
    reasons: list[str] = []
    for split in splits:
        # Only the training stream must know its length.
        dataset = _attempt(name, root, split, training=streamed and split == "train", reasons=reasons)
        if dataset is not None:
            return dataset, split
    raise DataError(f"data {name!r} in {root} cannot be opened ({'; '.join(reasons)}).")


def _attempt(name: str, root: str | None, split: str, *, training: bool, reasons: list[str]) -> Any:
    """Return timm's data set; None, with one more reason, where there is none."""
    try:
        return create_dataset(name, root, split=split, is_training=training)
    except Exception as error:  # the readers and the packages behind them raise all kinds
        reasons.append(f"{split}: {str(error) or type(error).__name__}")
        return None


def _num_classes(name: str, dataset: Any, given: int | None) -> int:
    known = classes_of(getattr(dataset, "reader", None)) or getattr(dataset, "classes", None) or ()
    if given is None and not known:
        raise ConfigError(f"data {name!r} does not say how many classes it has: set num_classes.", "num_classes")
    if given is not None and known and given != len(known):
        raise ConfigError(f"num_classes is {given}, but {name!r} has {len(known)} classes.", "num_classes")
    return len(known) if given is None else given
