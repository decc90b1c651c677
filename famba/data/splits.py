"""Open data sets by name, take a part of the training images, and hold some out for validation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from famba.data.draws import Stream, permutation
from famba.data.folders import find_parts, load_folder
from famba.data.images import Reading
from famba.data.published import CIFAR, NUM_CLASSES, TRAINING_IMAGES, find_cifar, load_cifar, load_digits, load_named
from famba.data.sources import Splits, balanced_order, check_num_classes, labels_of, sample, take
from famba.errors import ConfigError, DataError, near_miss

LOADERS: dict[str, Callable[[Path | None, int | None], Splits]] = {}
"""Map names of data sets that were added to Famba's own to functions of data.root and data.num_classes."""
PUBLISHED = tuple(NUM_CLASSES)  # data sets that are the same wherever their files lie


def load_splits(
    name: str,
    root: str | Path | None,
    *,
    subset: int | None,
    val_fraction: float,
    num_classes: int | None,
    background: str = Reading.background,
    version: int = Reading.version,
) -> Splits:
    """Open a data set.

    Args:
        name: cifar10, cifar100, digits, folder, one of `LOADERS`, or "hfds/NAME" of the Hugging Face hub.
        root: folder that holds the data. None: CIFAR comes from `default_root()` and is downloaded where it
            is missing there; digits need no folder.
        subset: number of training images to use, None for all; the same for every seed, with every class in proportion.
        val_fraction: share of these, in [0, 1), that is held out as the validation set, in the same way.
        num_classes: number of classes where the data does not tell; where it does, it must be right.
        background: the colour behind transparent images: a name, as in CSS, or "#rrggbb".
        version: 2; or 1 to read folders and images, and choose `subset` and `val_fraction`, as Famba 0.1 did.

    Raises ConfigError where an argument cannot work with this data; DataError where data is missing or damaged.
    """
    check_request(name, root, subset=subset, val_fraction=val_fraction, num_classes=num_classes)
    reading = Reading(version, background)
    splits = _load(name, None if root is None else Path(root).expanduser(), num_classes, reading)
    if subset is not None:
        _check_subset(subset, len(splits.train))
        part = take(splits.train, np.arange(subset)) if version == 1 else sample(splits.train, subset, version)
        splits = replace(splits, train=part)
    return _hold_out(splits, val_fraction, version) if val_fraction else splits


def check_request(
    name: str,
    root: str | Path | None,
    *,
    subset: int | None,
    val_fraction: float,
    num_classes: int | None,
    **reading: Any,
) -> None:
    """Raise ConfigError for what `load_splits` could not open whatever lies on the disk; arguments as there."""
    Reading(**reading)
    if not 0 <= val_fraction < 1:
        raise ConfigError(f"val_fraction is {val_fraction}, but must be at least 0 and below 1.", "val_fraction")
    known = (*PUBLISHED, "folder", *LOADERS)
    if name == "digits" and root is not None:
        raise ConfigError(f"digits come with scikit-learn, from no folder: leave out data.root (given {root}).", "root")
    if name == "folder" and root is None:
        raise ConfigError(f"data {name!r} needs data.root, the folder that holds train and val.", "root")
    if name not in known and not name.startswith("hfds/"):
        allowed = f"{', '.join(known)}, and hfds/NAME of the Hugging Face hub"
        raise ConfigError(f"unknown data {name!r}{near_miss(name, known)}. Known are {allowed}.", "name")
    check_num_classes(num_classes, NUM_CLASSES.get(name), name)
    if (images := TRAINING_IMAGES.get(name)) is not None:
        _check_subset(subset, images)


def check_folder(name: str, root: str | Path | None, version: int = Reading.version) -> None:
    """Raise DataError where the folder of CIFAR or of class folders cannot hold the data; no image is read."""
    if root is None or not (name in CIFAR or name == "folder"):
        return
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise DataError(f"root {folder} is no folder; give the one that holds the data.", "root")
    if name in CIFAR:
        find_cifar(name, folder)
    else:
        find_parts(folder, version)


def held_out(images: int, fraction: float) -> int:
    """Return how many of the training images are held out for validation: at least one, and not all."""
    return min(max(round(images * fraction), 1), images - 1) if fraction else 0


def _check_subset(subset: int | None, images: int) -> None:
    if subset is not None and not 1 <= subset <= images:
        raise ConfigError(f"subset is {subset}, but must be from 1 to the {images} training images.", "subset")


def _load(name: str, root: Path | None, num_classes: int | None, reading: Reading) -> Splits:
    if name in LOADERS:
        return LOADERS[name](root, num_classes)
    if name == "digits":
        return load_digits()
    if name in CIFAR:
        return load_cifar(name, root, reading.colour)
    if name == "folder" and root is not None:
        return load_folder(root, num_classes, reading)
    return load_named(name, root, num_classes, reading)


def _hold_out(splits: Splits, fraction: float, version: int) -> Splits:
    if splits.validation is not None:
        raise ConfigError("the data comes with a validation set: set val_fraction to 0 to use it.", "val_fraction")
    train = splits.train
    if len(train) < 2:
        raise ConfigError(f"val_fraction needs at least two training images, there is {len(train)}.", "val_fraction")
    count, held = len(train), held_out(len(train), fraction)
    order = (
        permutation(Stream.SPLIT, 0, 0, count) if version == 1 else balanced_order(labels_of(train), Stream.HELD_OUT)
    )
    # Sorted, so that what is left is in the order of the data set.
    return replace(splits, train=take(train, np.sort(order[held:])), validation=take(train, np.sort(order[:held])))
