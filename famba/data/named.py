"""Data sets that timm knows by a name with a prefix: torch/, hfds/, hfids/, tfds/ and wds/."""

from __future__ import annotations

import logging
from itertools import zip_longest
from pathlib import Path
from typing import Any

from timm.data import create_dataset

from famba.data.folder import find_parts, load_folder
from famba.data.readers import DatasetSource, HubSource
from famba.data.reading import Reading
from famba.data.sources import Source, Splits
from famba.data.streams import StreamSource, decodes_itself
from famba.errors import ConfigError, DataError, near_miss

PREFIXES = ("torch", "hfds", "hfids", "tfds", "wds")
_STREAMED = ("hfids", "tfds", "wds")
_NEED_ROOT = ("torch", "wds")
_IMAGE_FOLDERS = ("torch/image_folder", "torch/folder")
_TEST_SPLITS = {1: ("validation", "val", "test"), 2: ("validation", "val", "valid", "test")}
_log = logging.getLogger(__name__)


def load_named(name: str, root: Path | None, *, num_classes: int | None, reading: Reading) -> Splits:
    """Open a data set by timm's name; what its reader stores is not copied or downloaded by Famba.

    The test set is the split "validation", "val", "valid" or "test", the first that exists: public data sets often
    have a "test" whose labels are secret. torch/image_folder is read as `load_folder` does. tfds/ is decoded by
    TensorFlow, which drops transparency and EXIF orientation; a warning says so.

    Args:
        name: such as "torch/cifar10", "hfds/<repository>" or "wds/".
        root: where the data lies; hfds, hfids and tfds use their own cache where it is None.
        num_classes: number of classes; None where the data set tells.
        reading: how images are read.

    Raises:
        ConfigError: for an unknown prefix, a missing root, or a number of classes that is missing or wrong.
        DataError: where timm cannot open the data, or training and test images have other classes.
    """
    check_named(name, root)
    if is_image_folder(name, reading.version):
        assert root is not None
        return load_folder(root, tar=False, num_classes=num_classes, reading=reading)
    if reading.version > 1 and decodes_itself(name):
        _log.warning(
            "%r: TensorFlow decodes these images: what is transparent has no background, and EXIF turns nothing", name
        )
    folder = None if root is None else str(root)
    train, classes = _open(name, folder, ("train",), num_classes, reading)
    tests = _TEST_SPLITS[reading.version]
    test, _ = _open(name, folder, tests, num_classes or train.num_classes, reading, expected=classes)
    return Splits(train=train, validation=None, test=test, classes=classes)


def check_named(name: str, root: Path | None) -> None:
    """Raise ConfigError for an unknown prefix or a missing root."""
    prefix = _prefix(name)
    if prefix not in PREFIXES:
        known = ", ".join(f"{known}/" for known in PREFIXES)
        raise ConfigError(f"data {name!r}: unknown prefix, known are {known}{near_miss(prefix, PREFIXES)}.", "name")
    if root is None and needs_root(name):
        raise ConfigError(f"data {name!r} needs data.root, the folder that holds it.", "root")


def check_named_folder(name: str, root: Path, version: int) -> None:
    """Raise DataError where a folder of images lacks a part; other data sets are not judged."""
    if is_image_folder(name, version):
        find_parts(root, tar=False, version=version)


def is_image_folder(name: str, version: int) -> bool:
    """Whether a name is read as an image folder of Famba's: torchvision's has the faults that version 1 keeps."""
    return version > 1 and name.lower() in _IMAGE_FOLDERS


def needs_root(name: str) -> bool:
    """Whether a name with a prefix is read from a folder that has to be there."""
    return _prefix(name) in _NEED_ROOT


def _prefix(name: str) -> str:
    return name.partition("/")[0].lower()


def _open(
    name: str,
    root: str | None,
    splits: tuple[str, ...],
    num_classes: int | None,
    reading: Reading,
    expected: tuple[str, ...] | None = None,
) -> tuple[Source | StreamSource, tuple[str, ...] | None]:
    """Return the images of the first split that exists, and the names of their classes where they are told.

    Raises DataError where the classes are others than those that are expected, or in another order.
    """
    streamed = _prefix(name) in _STREAMED
    dataset, split = _create(name, root, splits, streamed=streamed)
    classes = _class_names(dataset)
    if classes and expected and classes != expected:
        pairs = enumerate(zip_longest(expected, classes))
        number, (one, other) = next((number, pair) for number, pair in pairs if pair[0] != pair[1])
        raise DataError(
            f"data {name!r} in {root}: its parts have other classes, or in another order: class {number} is {one!r} "
            f"in training and {other!r} in {split!r}."
        )
    count = _num_classes(name, classes, num_classes)
    if streamed:
        length = int(dataset.reader.num_samples or 0)
        return StreamSource(name, root, split, count, length, reading.colour), classes
    reader = getattr(dataset, "reader", None)
    if reader is None:
        return DatasetSource(dataset, count, reading.colour), classes
    return HubSource(reader, count, reading.colour), classes


def _create(name: str, root: str | None, splits: tuple[str, ...], *, streamed: bool) -> tuple[Any, str]:
    """Return the data set of the first split that exists, and that split's name."""
    reasons: list[str] = []
    for split in splits:
        # Only the training stream must know its length.
        dataset = _attempt(name, root, split, training=streamed and split == "train", reasons=reasons)
        if dataset is not None:
            if reasons:
                _log.warning("%r: split %r is the test set, since others cannot be opened: %s", name, split, reasons[0])
            return dataset, split
    raise DataError(f"data {name!r} in {root} cannot be opened ({'; '.join(reasons)}).")


def _attempt(name: str, root: str | None, split: str, *, training: bool, reasons: list[str]) -> Any:
    """Return timm's data set; None, with one more reason, where there is none."""
    try:
        return create_dataset(name, root, split=split, is_training=training)
    except Exception as error:  # the readers and the packages behind them raise all kinds
        reasons.append(f"{split}: {str(error) or type(error).__name__}")
        return None


def _class_names(dataset: Any) -> tuple[str, ...] | None:
    """Return the names of the classes in the order of their numbers; None where the data set tells none."""
    numbers = getattr(getattr(dataset, "reader", None), "class_to_idx", None)
    names = sorted(numbers, key=numbers.__getitem__) if numbers else getattr(dataset, "classes", None)
    # ImageNet has several names for a class.
    return tuple(name if isinstance(name, str) else ", ".join(name) for name in names) if names else None


def _num_classes(name: str, classes: tuple[str, ...] | None, given: int | None) -> int:
    if given is None and not classes:
        raise ConfigError(f"data {name!r} does not say how many classes it has: set num_classes.", "num_classes")
    if given is not None and classes and given != len(classes):
        raise ConfigError(f"num_classes is {given}, but {name!r} has {len(classes)} classes.", "num_classes")
    return given or len(classes or ())
