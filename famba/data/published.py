"""Load published data sets: CIFAR-10, CIFAR-100, scikit-learn's digits, and those of the Hugging Face hub."""

from __future__ import annotations

import io
import logging
import os
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets import utils as torchvision_utils

from famba.data.images import Colour, Reading, decode_rgb, naming
from famba.data.sources import ArraySource, LazySource, Source, Splits, check_labels, check_num_classes
from famba.errors import ConfigError, DataError, near_miss, some

_SIDE = 32  # pixels
CIFAR = {"cifar10": CIFAR10, "cifar100": CIFAR100}  # torchvision knows the MD5 sums of the published files
NUM_CLASSES = {"cifar10": 10, "cifar100": 100, "digits": 10}  # where the name alone tells them, as below
_LABELS = {"cifar10": "label", "cifar100": "fine_label"}  # columns of the parquet files
TRAINING_IMAGES = {"cifar10": 50_000, "cifar100": 50_000, "digits": 1437}
_TEST_SPLITS = ("validation", "val", "valid", "test")  # of the hub, where a "test" often has secret labels
_log = logging.getLogger(__name__)


def load_digits() -> Splits:
    """Return 1437 training and 360 test images, uint8 (n, 3, 32, 32), the same split in every run."""
    from sklearn import datasets, model_selection  # takes a second, and only these images need it

    digits = datasets.load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # 0..16 as stored
    scaled = [np.asarray(Image.fromarray(image).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)) for image in grey]
    images = torch.from_numpy(np.stack(scaled))[:, None].expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(digits.target.astype(np.int64))
    parts = model_selection.train_test_split(
        np.arange(len(labels)), train_size=TRAINING_IMAGES["digits"], stratify=digits.target, random_state=0
    )
    train, test = (ArraySource(images[part], labels[part], NUM_CLASSES["digits"]) for part in map(np.sort, parts))
    return Splits(train, None, test, classes=tuple(map(str, digits.target_names)))


def load_cifar(name: str, root: Path | None, background: Colour | None) -> Splits:
    """Load "cifar10" or "cifar100" into memory as uint8 (n, 3, 32, 32).

    root: folder that holds the official files, or the hub's parquet files; None for `default_root()`, which alone is
    downloaded into. background: of transparent images in parquet files, as in `images.to_rgb`. Raises DataError where
    data is missing, incomplete or damaged, naming the file (and row).
    """
    try:
        return find_cifar(name, default_root() if root is None else root)(background)
    except DataError as error:
        if root is not None or error.argument != "root":
            raise
        return find_cifar(name, download(name, None))(background)


def find_cifar(name: str, root: Path) -> Callable[[Colour | None], Splits]:
    """Return what loads CIFAR from a folder. Raises DataError, argument "root", where there is none; reads no file."""
    official = (root / CIFAR[name].base_folder, root)
    for folder in official:
        if not _missing(name, folder):
            return partial(_load_official, name, folder)
    hub = (root, root / "data", root / name, *([root / "plain_text"] if name == "cifar10" else []))
    for folder in hub:
        train, test = _shards(folder, "train"), _shards(folder, "test")
        if train and test:
            read = partial(_read_parquet, name)
            return lambda background: Splits(read(train, background), None, read(test, background))
    places, lacking = (", ".join(map(str, folders)) for folders in ((*official, *hub[1:]), _missing(name, official[0])))
    said = f"no official files (not in the first: {lacking}) nor train-*.parquet and test-*.parquet in {places}"
    raise DataError(f"{said}. To fetch {name}: famba download {name} --root {root}", "root")


def _missing(name: str, folder: Path, *, or_damaged: bool = False) -> list[str]:
    """Return the official files that are not in a folder, or are not as they were published."""
    kind, check = CIFAR[name], torchvision_utils.check_integrity
    files = [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]
    return [file for file, md5 in files if not check(folder / file, md5 if or_damaged else None)]


def _load_official(name: str, folder: Path, _: Colour | None) -> Splits:
    here = type(name, (CIFAR[name],), {"base_folder": ""})
    try:
        # It unpickles a file only if its sum is the published one, for a pickle can run any code.
        parts = [here(folder, train=train) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        at_fault = ", ".join(_missing(name, folder, or_damaged=True)) or error
        raise DataError(f"{folder}: {at_fault}: damaged or not the published file. Fetch it again.") from error
    train, test = (_in_memory(part.data, part.targets, NUM_CLASSES[name]) for part in parts)
    return Splits(train, None, test, classes=tuple(parts[0].classes))


def _in_memory(images: np.ndarray, labels: list[int], num_classes: int) -> ArraySource:
    pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    return ArraySource(pixels, torch.tensor(labels), num_classes)


def default_root() -> Path:
    """Return the folder for data when none is given: $FAMBA_DATA, else ~/.cache/famba/data."""
    given = os.environ.get("FAMBA_DATA")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "famba" / "data"


def download(name: str, root: str | Path | None) -> Path:
    """Fetch "cifar10" or "cifar100" into a folder unless it is there, and return the folder.

    Several processes may call this at once: one downloads, the others wait. root: made where missing; None for
    `default_root()`. Raises ConfigError where there is nothing to download under this name; DataError where the
    download or writing the folder fails.
    """
    if name not in CIFAR:
        known = f"only {' and '.join(CIFAR)}{near_miss(name, CIFAR)}; other images are yours to provide"
        raise ConfigError(f"data {name!r} has no download, {known}.")
    folder, kind = default_root() if root is None else Path(root).expanduser(), CIFAR[name]
    unpacked = folder / kind.base_folder
    try:
        if not _missing(name, unpacked, or_damaged=True):
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / f".{name}.lock"):
            if _missing(name, unpacked, or_damaged=True):  # another process may have been first
                torchvision_utils.download_url(kind.url, str(folder), filename=kind.filename, md5=kind.tgz_md5)
                unpack(folder / kind.filename, folder)
                (folder / kind.filename).unlink()
    except (OSError, RuntimeError) as error:  # no network, no space, no permission; a wrong checksum
        advice = f"On a machine with network run: famba download {name} --root DIR; copy DIR; set data.root to it"
        raise DataError(f"{name} could not be downloaded from {kind.url} to {folder} ({error}). {advice}.") from error
    return folder


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a tar file, compressed or not, into a folder.

    Raises DataError where it is damaged, or a member would lie or point outside the folder, or is no file, folder or
    link. Members before that one stay.
    """
    if not hasattr(tarfile, "data_filter"):
        better = f"use 3.10.12, 3.11.4, 3.12 or later, or unpack {archive} yourself"
        raise DataError(f"this Python unpacks archives without looking where their files go; {better}")
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{archive} cannot be unpacked ({error}); delete it and fetch it again") from error


def _shards(folder: Path, split: str) -> list[Path]:
    """Return the parquet files of a split in order. Raises DataError where the last one's name tells of others."""
    found = sorted(folder.glob(f"{split}-*.parquet"))
    if found and (count := found[-1].stem.rpartition("-of-")[2]).isdecimal() and int(count) != len(found):
        raise DataError(f"{folder}: {found[-1].name} is one of {int(count)} files, but {len(found)} lie there.")
    return found


def _read_parquet(name: str, paths: list[Path], background: Colour | None) -> ArraySource:
    import pyarrow
    from pyarrow import parquet  # only this format needs it

    images, labels, classes = [], [], NUM_CLASSES[name]
    for path in paths:
        try:
            table = parquet.read_table(path).to_pydict()
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path}: not a readable parquet file ({error}). Fetch it again.") from error
        cells, found = table.get("img", table.get("image")), table.get(_LABELS[name])
        if not cells or not found:
            raise DataError(f"{path}: no images (img or image) or labels ({_LABELS[name]}) among {', '.join(table)}.")
        for row, (cell, label) in enumerate(zip(cells, found, strict=True)):
            with naming(partial("{}, row {}".format, path, row)):
                image = decode_rgb(io.BytesIO(cell["bytes"]), background)
                if image.size != (_SIDE, _SIDE) or label not in range(classes):
                    said = f"it has {image.width} x {image.height} pixels and label {label}"
                    raise ValueError(f"{said}; allowed: {_SIDE} x {_SIDE}, 0..{classes - 1}")
            images.append(np.asarray(image))
            labels.append(label)
    return _in_memory(np.stack(images), labels, classes)


def _read_hub(reader: Any, place: str, background: Colour | None, index: int) -> Image.Image:
    # timm's own ImageDataset skips images that are broken.
    with naming(partial(_row, reader, place, index)), reader[index][0] as file:
        return decode_rgb(file, background)


def load_named(name: str, root: Path | None, num_classes: int | None, reading: Reading) -> Splits:
    """Open a data set of the hub by its name after "hfds/".

    root: the cache; None for that of the hub's own. num_classes is None where the data set tells it. The test set is
    the first of `_TEST_SPLITS` that exists. Raises ConfigError for a number of classes that is missing or wrong;
    DataError where timm cannot open the data, or training and test images have other classes.
    """
    train, classes = _open(name, root, ("train",), num_classes, reading)
    test, others = _open(name, root, _TEST_SPLITS, num_classes, reading)
    if classes != others:
        said = f"{some(classes)} in training, and {some(others)} in the test set"
        raise DataError(f"data {name!r} in {root}: its parts have other classes, or in another order: {said}.")
    return Splits(train=train, validation=None, test=test, classes=classes or None)


def _open(
    name: str, root: Path | None, splits: tuple[str, ...], num_classes: int | None, reading: Reading
) -> tuple[Source, tuple[str, ...]]:
    """Return the images of the first split that exists, and the names of their classes, none where it has none."""
    reasons: list[str] = []
    for split in splits:
        try:
            reader = create_dataset(name, None if root is None else str(root), split=split).reader
            break
        except Exception as error:  # the reader and the packages behind it raise all kinds
            reasons.append(f"{split}: {str(error) or type(error).__name__}")
    else:
        raise DataError(f"data {name!r} in {root} cannot be opened ({'; '.join(reasons)}).")
    if reasons:
        _log.warning("%r: split %r is the test set, since others cannot be opened: %s", name, split, reasons[0])
    classes = tuple(sorted(reader.class_to_idx, key=reader.class_to_idx.__getitem__))
    check_num_classes(num_classes, len(classes) or None, repr(name))
    count = len(classes) or num_classes
    if not count:
        raise ConfigError(f"data {name!r} does not say how many classes it has: set num_classes.", "num_classes")
    labels, place = np.asarray(reader.dataset[reader.label_key][:]), f"{name}, split {split}"
    if labels.dtype.kind not in "iu":
        raise DataError(f"{place}: labels in {reader.label_key!r} are {labels.dtype}; allowed: numbers of classes.")
    labels = check_labels(labels, count, partial(_row, reader, place))
    return LazySource(partial(_read_hub, reader, place, reading.colour), range(len(labels)), labels, count), classes


def _row(reader: Any, place: str, index: int) -> str:
    file = reader.filename(index, absolute=True)
    return f"{place}, row {index}{f' ({file})' if file else ''}"
