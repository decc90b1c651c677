"""Load the data sets that are the same wherever their files lie: CIFAR-10, CIFAR-100 and scikit-learn's digits."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import filelock
import numpy as np
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets import utils as torchvision_utils

from famba.data.images import Colour, decode_rgb, naming
from famba.data.sources import ArraySource, Splits, check_label
from famba.errors import ConfigError, DataError, near_miss

_SIDE = 32  # pixels
_SHARD = re.compile(r"-(\d+)-of-(\d+)\.parquet$")
_NO_DOWNLOAD = {
    "digits": "the digits come with scikit-learn and need no download",
    "folder": "a folder of images is yours to provide",
    "tar": "tar files of images are yours to provide",
}


class _Cifar(NamedTuple):
    num_classes: int
    official: type[CIFAR10]  # torchvision's reader of the pickles, with their published MD5 sums
    labels: tuple[str, ...]  # names that the column of labels may have in parquet files
    hub_folder: str  # where the hub's repository keeps its parquet files


CIFAR = {
    "cifar10": _Cifar(10, CIFAR10, ("label",), "plain_text"),
    "cifar100": _Cifar(100, CIFAR100, ("fine_label", "label"), "cifar100"),
}
NUM_CLASSES = {"cifar10": 10, "cifar100": 100, "digits": 10}
TRAINING_IMAGES = {"cifar10": 50_000, "cifar100": 50_000, "digits": 1437}


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

    root: folder that holds the data in any of the known layouts; None for `default_root()`, which alone is downloaded
    into. background: of transparent images in parquet files, as in `images.to_rgb`. Raises DataError where data is
    missing, incomplete or damaged, naming the file (and row).
    """
    folder = default_root() if root is None else root
    by_hand = not _missing(name, folder) or any(_shards(place, "train") for place in _parquet_folders(name, folder))
    if root is None and not by_hand:
        download(name, folder)  # also where it is there: this waits for a download in another process
    return find_cifar(name, folder)(background)


def find_cifar(name: str, root: Path) -> Callable[[Colour | None], Splits]:
    """Return what loads CIFAR from a folder. Raises DataError where no known layout fits; no file is read."""
    official, places = root / CIFAR[name].official.base_folder, _parquet_folders(name, root)
    for folder in (official, root):
        missing = _missing(name, folder)
        if not missing:
            return partial(_load_official, name, folder)
        if folder == official and folder.is_dir():
            raise DataError(f"{folder}: {', '.join(missing)} of {name} is missing. Fetch the data again.")
    for folder in places:
        found = {split: _shards(folder, split) for split in ("train", "test")}
        lacking = [split for split, paths in found.items() if not paths]
        if not lacking:
            return partial(_load_parquet, CIFAR[name], found)
        if len(lacking) == 1:
            raise DataError(f"{folder}: holds parquet files, but no {lacking[0]}-*.parquet.")
    raise DataError(
        f"no {name} under {root}. Looked for the official files in {official}, {root}; for train-*.parquet and "
        f"test-*.parquet in {', '.join(map(str, places))}. To fetch it: famba download {name} --root {root}",
        "root",
    )


def _missing(name: str, folder: Path, *, or_damaged: bool = False) -> list[str]:
    """Return the official files that are not in a folder, or are not as they were published."""
    kind = CIFAR[name].official
    files = [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]
    check = torchvision_utils.check_integrity
    return [file for file, md5 in files if not check(folder / file, md5 if or_damaged else None)]


def _load_official(name: str, folder: Path, _: Colour | None) -> Splits:
    here = type(name, (CIFAR[name].official,), {"base_folder": ""})
    try:
        # It unpickles a file only if its sum is the published one, for a pickle can run any code.
        parts = [here(folder, train=train) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        at_fault = ", ".join(_missing(name, folder, or_damaged=True)) or error
        raise DataError(f"{folder}: {at_fault}: damaged or not the published file. Fetch it again.") from error
    train, test = (_in_memory(part.data, part.targets, CIFAR[name].num_classes) for part in parts)
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
        known = f"only {', '.join(CIFAR)}{near_miss(name, CIFAR)}"
        raise ConfigError(f"data {name!r} has no download here: {_NO_DOWNLOAD.get(name, known)}.")
    folder, kind = default_root() if root is None else Path(root).expanduser(), CIFAR[name].official
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
        advice = (
            f"On a machine with network access run: famba download {name} --root DIR; copy DIR; set data.root to it"
        )
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


def _parquet_folders(name: str, root: Path) -> list[Path]:
    """Return where parquet files may lie; they are those of the Hugging Face hub."""
    return list(dict.fromkeys([root, root / "data", root / name, root / CIFAR[name].hub_folder]))


def _shards(folder: Path, split: str) -> list[Path]:
    """Return the parquet files of a split in order. Raises DataError where their names say that one is missing."""
    found = sorted(folder.glob(f"{split}-*.parquet"))
    for path in found:
        match = _SHARD.search(path.name)
        if match and int(match[2]) != len(found):
            counted = f"{path.name} is one of {int(match[2])} files, but {len(found)} lie there"
            raise DataError(f"{folder}: {counted}. Fetch the missing ones, or remove those of another data set.")
    return found


def _load_parquet(kind: _Cifar, shards: dict[str, list[Path]], background: Colour | None) -> Splits:
    classes: tuple[str, ...] | None = None
    parts: dict[str, ArraySource] = {}
    for split, paths in shards.items():
        images: list[np.ndarray] = []
        labels: list[int] = []
        for path in paths:
            names = _read_parquet(kind, path, background, images, labels)
            if names and (len(names) != kind.num_classes or names != (classes or names)):
                differ = f"names {len(names)} classes, which are not the {kind.num_classes} of this data set in order"
                raise DataError(f"{path}: {differ}. Fetch it again.")
            classes = names or classes
        if not images:
            raise DataError(f"{paths[0]}: holds no images. Fetch it again.")
        parts[split] = _in_memory(np.stack(images), labels, kind.num_classes)
    return Splits(parts["train"], None, parts["test"], classes=classes)


def _read_parquet(
    kind: _Cifar, path: Path, background: Colour | None, images: list[np.ndarray], labels: list[int]
) -> tuple[str, ...] | None:
    """Add the rows of a file to images, uint8 (32, 32, 3), and labels; return the classes' names where it has them."""
    import pyarrow
    from pyarrow import parquet  # only this format needs it

    try:
        with parquet.ParquetFile(path) as file:
            table = file.read()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file ({error}). Fetch it again.") from error
    columns = []
    for wanted in (("img", "image"), kind.labels):
        columns += [name for name in wanted if name in table.column_names][:1]
        if not columns or columns[-1] not in wanted:
            allowed = " or ".join(map(repr, wanted))
            raise DataError(f"{path}: no column {allowed} among {', '.join(table.column_names)}.")
    for row, (cell, label) in enumerate(zip(*(table[name].to_pylist() for name in columns), strict=True)):
        where = partial("{}, row {}".format, path, row)
        with naming(where):
            encoded = cell.get("bytes") if isinstance(cell, dict) else cell
            if not isinstance(encoded, bytes):
                raise ValueError("the row holds no encoded image")
            image = decode_rgb(io.BytesIO(encoded), background)
            if image.size != (_SIDE, _SIDE):
                raise ValueError(f"the image is {image.width} x {image.height} pixels, not {_SIDE} x {_SIDE}")
        images.append(np.asarray(image))
        labels.append(check_label(label, kind.num_classes, where))
    try:
        features = json.loads((table.schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(map(str, features[columns[1]]["names"]))
    except (ValueError, KeyError, TypeError):  # another program wrote the file, or it says numbers alone
        return None
