"""Data sets by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import numpy as np

from famba.data import cifar, digits
from famba.data.cifar import KINDS, load_cifar
from famba.data.draws import Stream, permutation
from famba.data.folder import find_parts, load_folder
from famba.data.named import check_named, check_named_folder, load_named, needs_root
from famba.data.reading import Reading
from famba.data.sampling import balanced_order, sample
from famba.data.sources import Source, Splits, labels_of, take
from famba.data.streams import StreamSource
from famba.errors import ConfigError, DataError, near_miss

Loader: TypeAlias = Callable[[Path | None, int | None], Splits]
"""(data.root, data.num_classes) to the images, either None where it is not given."""

LOADERS: dict[str, Loader] = {}
"""What opens each data set that was added to Famba's own. A new one is one more entry."""
PUBLISHED = (*KINDS, "digits")
"""Data sets that are the same wherever their files lie."""
_PARTS = ("folder", "tar")
_OWN = (*PUBLISHED, *_PARTS)


def num_classes_of(name: str) -> int | None:
    """Return the number of classes where the name alone tells it, else None."""
    if name == "digits":
        return digits.NUM_CLASSES
    return KINDS[name].num_classes if name in KINDS else None


def check_request(
    name: str,
    root: str | Path | None,
    *,
    subset: int | None,
    val_fraction: float,
    num_classes: int | None,
    background: str = Reading.background,
    version: int = Reading.version,
) -> None:
    """Raise ConfigError for what `load_splits` could not open whatever lies on the disk; arguments as there."""
    Reading(version, background)
    if not 0 <= val_fraction < 1:
        raise ConfigError(f"val_fraction is {val_fraction}, but must be at least 0 and below 1.", "val_fraction")
    _check_name(name, root)
    known = num_classes_of(name)
    if None not in (known, num_classes) and known != num_classes:
        raise ConfigError(f"num_classes is {num_classes}, but {name} has {known} classes.", "num_classes")
    images = training_images_of(name)
    if images is not None:
        _check_subset(subset, images)


def check_folder(name: str, root: str | Path | None, version: int = Reading.version) -> None:
    """Raise DataError where the folder that is given cannot hold the data; no image is read.

    Other packages' caches and the folders of loaders that were added are not judged.
    """
    if root is None or not (name in KINDS or name in _PARTS or needs_root(name)):
        return
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise DataError(f"root {folder} is no folder; give the one that holds the data.", "root")
    if name in KINDS:
        cifar.check_folder(name, folder)
    elif name in _PARTS:
        find_parts(folder, tar=name == "tar", version=version)
    else:
        check_named_folder(name, folder, version)


def training_images_of(name: str) -> int | None:
    """Return the number of training images where the name alone tells it, else None."""
    if name == "digits":
        return digits.TRAINING_IMAGES
    return cifar.TRAINING_IMAGES if name in KINDS else None


def held_out(images: int, fraction: float) -> int:
    """Return how many of the training images are held out for validation: at least one, and not all."""
    return min(max(round(images * fraction), 1), images - 1) if fraction else 0


def _check_name(name: str, root: str | Path | None) -> None:
    if name == "digits" and root is not None:
        raise ConfigError(
            f"digits come with scikit-learn and are read from no folder: leave out data.root (given {root}).", "root"
        )
    if name in _PARTS and root is None:
        raise ConfigError(f"data {name!r} needs data.root, the folder that holds train and val.", "root")
    if name in _known():
        return
    if "/" in name:
        check_named(name, None if root is None else Path(root))
        return
    raise ConfigError(
        f"unknown data {name!r}{near_miss(name, _known())}. Known are {', '.join(_known())}, "
        "and timm's names with a prefix, such as torch/cifar10.",
        "name",
    )


def _known() -> tuple[str, ...]:
    return (*_OWN, *LOADERS)


def _check_subset(subset: int | None, images: int) -> None:
    if subset is not None and not 1 <= subset <= images:
        raise ConfigError(f"subset is {subset}, but must be from 1 to the {images} training images.", "subset")


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
        name: cifar10, cifar100, digits, folder, tar, one of `LOADERS`, or a name of timm's with a prefix
            ("torch/cifar10", "hfds/...", "wds/...").
        root: folder that holds the data. None: CIFAR comes from `default_root()` and is downloaded where it
            is missing there; digits need no folder.
        subset: use a sample of N training images only, the same for every seed, with every class in proportion (in
            version 1 the first N); None for all.
        val_fraction: share of these, in [0, 1), that is held out of training as the validation set. It
            depends on no seed, so every run holds out the same images, of every class in proportion (in version 1 of
            whatever class).
        num_classes: number of classes where the data does not tell; where it does, it must be right.
        background: what lies behind transparent images: a colour's name, as in CSS, or "#rrggbb".
        version: 2; or 1 to read folders and images as Famba 0.1 did.

    Raises:
        ConfigError: where an argument cannot work with this data.
        DataError: where data is missing or damaged.
    """
    check_request(
        name,
        root,
        subset=subset,
        val_fraction=val_fraction,
        num_classes=num_classes,
        background=background,
        version=version,
    )
    folder = None if root is None else Path(root).expanduser()
    splits = _load(name, folder, num_classes, Reading(version, background))
    return _hold_out(_reduced(splits, subset, version), val_fraction, version)


def _load(name: str, root: Path | None, num_classes: int | None, reading: Reading) -> Splits:
    if name in LOADERS:
        return LOADERS[name](root, num_classes)
    if name == "digits":
        return digits.load_digits()
    if name in KINDS:
        return load_cifar(name, root, reading.colour)
    if name in _PARTS:
        assert root is not None
        return load_folder(root, tar=name == "tar", num_classes=num_classes, reading=reading)
    return load_named(name, root, num_classes=num_classes, reading=reading)


def _reduced(splits: Splits, subset: int | None, version: int) -> Splits:
    if subset is None:
        return splits
    train = _need_random_access(splits.train, "subset")
    _check_subset(subset, len(train))
    part = take(train, np.arange(subset)) if version == 1 else sample(train, subset, version)
    return replace(splits, train=part)


def _hold_out(splits: Splits, fraction: float, version: int) -> Splits:
    if fraction == 0:
        return splits
    if splits.validation is not None:
        raise ConfigError("the data comes with a validation set: set val_fraction to 0 to use it.", "val_fraction")
    train = _need_random_access(splits.train, "val_fraction")
    if len(train) < 2:
        raise ConfigError(f"val_fraction needs at least two training images, there is {len(train)}.", "val_fraction")
    if version == 1:
        order = permutation(Stream.SPLIT, 0, 0, len(train))
    else:
        order = balanced_order(labels_of(train), Stream.HELD_OUT)
    held = held_out(len(train), fraction)
    # Sorted, so that what is left is in the order of the data set.
    return replace(
        splits,
        train=take(train, np.sort(order[held:])),
        validation=take(train, np.sort(order[:held])),
    )


def _need_random_access(source: Source | StreamSource, setting: str) -> Source:
    if isinstance(source, StreamSource):
        raise ConfigError(f"{setting} cannot be used with {source.name!r}: a stream has no random access.", setting)
    return source
