"""Load the data sets that are the same wherever their files lie: CIFAR-10, CIFAR-100 and scikit-learn's digits."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets import utils as torchvision_utils

from famba.data.images import Colour, decode_rgb, naming
from famba.data.sources import ArraySource, Splits, check_label
from famba.errors import ConfigError, DataError, near_miss

SIDE = 32  # pixels
_SHARD = re.compile(r"-(\d+)-of-(\d+)\.parquet$")
_NO_DOWNLOAD = {
    "digits": "the digits come with scikit-learn and need no download",
    "folder": "a folder of images is yours to provide",
    "tar": "tar files of images are yours to provide",
}


@dataclass(frozen=True)
class _Cifar:
    num_classes: int
    official: type[CIFAR10]  # torchvision's reader of the pickles, with their published MD5 sums
    labels: tuple[str, ...]  # names that the column of labels may have in parquet files
    hub_folder: str  # where the hub's repository keeps its parquet files


CIFAR = {
    "cifar10": _Cifar(10, CIFAR10, ("label",), "plain_text"),
    "cifar100": _Cifar(100, CIFAR100, ("fine_label", "label"), "cifar100"),
}
NUM_CLASSES = {**{name: kind.num_classes for name, kind in CIFAR.items()}, "digits": 10}
TRAINING_IMAGES = {**dict.fromkeys(CIFAR, 50_000), "digits": 1437}


def load_digits() -> Splits:
    """Return 1437 training and 360 test images, uint8 (n, 3, 32, 32), the same split in every run."""
    from sklearn import datasets, model_selection  # takes a second, and only these images need it

    digits = datasets.load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # 0..16 as stored
    scaled = [np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for image in grey]
    images = torch.from_numpy(np.stack(scaled))[:, None].expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(digits.target.astype(np.int64))
    parts = model_selection.train_test_split(
        np.arange(len(labels)), train_size=TRAINING_IMAGES["digits"], stratify=digits.target, random_state=0
    )
    chosen = (torch.from_numpy(np.sort(part)) for part in parts)
    train, test = (ArraySource(images[indices], labels[indices], NUM_CLASSES["digits"]) for indices in chosen)
    return Splits(train, None, test, classes=tuple(map(str, digits.target_names)))


def load_cifar(name: str, root: Path | None, background: Colour | None) -> Splits:
    """Load CIFAR into memory as uint8 (n, 3, 32, 32).

    Args:
        name: "cifar10" or "cifar100".
        root: folder that holds the data in any of the known layouts; a folder that is given is never downloaded into.
            None: `default_root()`, with a download where the data is missing.
        background: of transparent images in parquet files, as in `images.to_rgb`.

    Raises DataError where data is missing, incomplete or damaged, naming the file (and row).
    """
    folder = default_root() if root is None else root
    if root is None and not _placed_by_hand(name, folder):
        # Checks what is there under a lock, so that a download in another process is never seen half done.
        download(name, folder)
    return find_cifar(name, folder)(background)


def find_cifar(name: str, root: Path) -> Callable[[Colour | None], Splits]:
    """Return what loads CIFAR from a folder. Raises DataError where no known layout fits; no file is read."""
    kind = CIFAR[name]
    for folder in (root / kind.official.base_folder, root):
        missing = _missing(name, folder)
        if not missing:
            return partial(_load_official, name, folder)
        if folder != root and folder.is_dir():
            raise DataError(f"{folder}: {', '.join(missing)} of {name} is missing. Fetch the data again.")
    for folder in _parquet_folders(name, root):
        found = {split: _shards(folder, split) for split in ("train", "test")}
        for split, paths in found.items():
            if not paths and any(found.values()):
                raise DataError(f"{folder}: holds parquet files, but no {split}-*.parquet.")
        if any(found.values()):
            return partial(_load_parquet, kind, found)
    raise DataError(
        f"no {name} under {root}. Looked for the official files in {root / kind.official.base_folder}, {root}; for "
        f"train-*.parquet and test-*.parquet in {', '.join(map(str, _parquet_folders(name, root)))}. "
        f"To fetch it: famba download {name} --root {root}",
        "root",
    )


def _placed_by_hand(name: str, root: Path) -> bool:
    """Say whether the data lies where no download puts it."""
    return not _missing(name, root) or any(_shards(folder, "train") for folder in _parquet_folders(name, root))


# The official files


def _missing(name: str, folder: Path, *, or_damaged: bool = False) -> list[str]:
    """Return the official files that are not in a folder, or are not as they were published."""
    kind = CIFAR[name].official
    files = [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]
    check = torchvision_utils.check_integrity
    return [file for file, md5 in files if not check(folder / file, md5 if or_damaged else None)]


def _load_official(name: str, folder: Path, _: Colour | None) -> Splits:
    kind = CIFAR[name]
    here = type(name, (kind.official,), {"base_folder": ""})
    try:
        # It unpickles a file only if its sum is the published one, for a pickle can run any code.
        parts = [here(folder, train=train) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{folder}: {', '.join(_missing(name, folder, or_damaged=True)) or error}: damaged or not the published "
            "file. Delete it and fetch it again."
        ) from error
    pixels = (torch.from_numpy(np.ascontiguousarray(part.data.transpose(0, 3, 1, 2))) for part in parts)
    train, test = (
        ArraySource(images, torch.tensor(part.targets), kind.num_classes)
        for images, part in zip(pixels, parts, strict=True)
    )
    return Splits(train, None, test, classes=tuple(parts[0].classes))


def default_root() -> Path:
    """Return the folder for data when none is given: $FAMBA_DATA, else ~/.cache/famba/data."""
    given = os.environ.get("FAMBA_DATA")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "famba" / "data"


def download(name: str, root: str | Path | None) -> Path:
    """Fetch "cifar10" or "cifar100" into a folder unless it is there, and return the folder.

    Several processes may call this at once: one downloads, the others wait. root: made where missing; None for
    `default_root()`.

    Raises ConfigError where there is nothing to download under this name; DataError where the download or writing the
    folder fails.
    """
    if name in _NO_DOWNLOAD:
        raise ConfigError(f"data {name!r} has no download: {_NO_DOWNLOAD[name]}.")
    if name not in CIFAR:
        raise ConfigError(f"data {name!r} has no download here, only {', '.join(CIFAR)}{near_miss(name, CIFAR)}.")
    folder, kind = default_root() if root is None else Path(root).expanduser(), CIFAR[name].official
    unpacked = folder / kind.base_folder
    try:
        if not _missing(name, unpacked, or_damaged=True):
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / f".{name}.lock"):
            if _missing(name, unpacked, or_damaged=True):  # another process may have been first
                archive = folder / kind.filename
                torchvision_utils.download_url(kind.url, str(folder), filename=kind.filename, md5=kind.tgz_md5)
                unpack(archive, folder)
                archive.unlink()
                if _missing(name, unpacked, or_damaged=True):
                    raise RuntimeError("the archive does not hold the published files")
    except (OSError, RuntimeError) as error:  # no network, no space, no permission; a wrong checksum
        raise DataError(
            f"{name} could not be downloaded from {kind.url} to {folder} ({error}). "
            f"On a machine with network access run: famba download {name} --root DIR; "
            "then copy DIR here and set data.root to it."
        ) from error
    return folder


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a tar file, compressed or not, into a folder.

    Raises DataError where it is damaged, or a member would lie or point outside the folder, or is no file, folder or
    link. Members before that one stay.
    """
    if not hasattr(tarfile, "data_filter"):
        raise DataError(
            "this Python unpacks archives without looking where their files go; use 3.10.12, 3.11.4, 3.12 or later, "
            f"or unpack {archive} yourself"
        )
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{archive} cannot be unpacked ({error}); delete it and fetch it again") from error


# Parquet files, as the Hugging Face hub stores them


def _parquet_folders(name: str, root: Path) -> list[Path]:
    return list(dict.fromkeys([root, root / "data", root / name, root / CIFAR[name].hub_folder]))


def _shards(folder: Path, split: str) -> list[Path]:
    """Return the parquet files of a split in order. Raises DataError where their names say that one is missing."""
    found = sorted(folder.glob(f"{split}-*.parquet"))
    for path in found:
        match = _SHARD.search(path.name)
        if match and int(match[2]) != len(found):
            raise DataError(
                f"{folder}: {path.name} is one of {int(match[2])} files, but {len(found)} lie there. "
                "Fetch the missing ones, or remove those of another data set."
            )
    return found


def _load_parquet(kind: _Cifar, found: dict[str, list[Path]], background: Colour | None) -> Splits:
    train, test = (_read_parquet(kind, found[split], background) for split in ("train", "test"))
    return Splits(train, None, test, classes=_class_names(kind, [*found["train"], *found["test"]]))


def _read_parquet(kind: _Cifar, paths: list[Path], background: Colour | None) -> ArraySource:
    images: list[np.ndarray] = []
    labels: list[int] = []
    for path in paths:
        with _opened(path) as file:
            columns = [_column(path, file, names) for names in (("img", "image"), kind.labels)]
            rows = zip(*(file.read([column]).column(0).to_pylist() for column in columns), strict=True)
        for row, (image, label) in enumerate(rows):
            where = partial("{}, row {}".format, path, row)
            images.append(_pixels(image, where, background))
            if not isinstance(label, int):
                raise DataError(f"{where()}: label {label!r} is not an integer.")
            labels.append(check_label(label, kind.num_classes, where))
    if not images:
        raise DataError(f"{paths[0].parent}: {paths[0].name} holds no images.")
    # Decoded images are (h, w, 3); the copy to (n, 3, h, w) is made once for all of them.
    data = np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2))
    return ArraySource(torch.from_numpy(data), torch.tensor(labels), kind.num_classes)


def _class_names(kind: _Cifar, paths: list[Path]) -> tuple[str, ...] | None:
    """Return the classes' names, where the hub wrote them into the files. Raises DataError where they differ."""
    known: tuple[str, ...] | None = None
    for path in paths:
        with _opened(path) as file:
            column = _column(path, file, kind.labels)
            try:
                features = json.loads((file.schema_arrow.metadata or {})[b"huggingface"])["info"]["features"]
                names = tuple(map(str, features[column]["names"]))
            except (ValueError, KeyError, TypeError):  # another program wrote the file, or it says numbers alone
                continue
        if len(names) != kind.num_classes or names != (known or names):
            raise DataError(
                f"{path}: names {len(names)} classes, which are not the {kind.num_classes} of this data set in the "
                "order of the files before it. Fetch it again."
            )
        known = names
    return known


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a parquet file; an error inside the block becomes a DataError that names it."""
    import pyarrow
    from pyarrow import parquet  # only this format needs it

    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: not a readable parquet file ({error}). It may be incomplete: fetch it again."
        ) from error


def _column(path: Path, file: Any, wanted: tuple[str, ...]) -> str:
    names = file.schema_arrow.names
    for name in wanted:
        if name in names:
            return name
    raise DataError(f"{path}: no column {' or '.join(map(repr, wanted))} among {', '.join(names)}.")


def _pixels(value: Any, where: Callable[[], str], background: Colour | None) -> np.ndarray:
    encoded = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(encoded, bytes):
        raise DataError(f"{where()}: holds no encoded image. Replace or remove it.")
    with naming(where):
        image = decode_rgb(io.BytesIO(encoded), background)
    if image.size != (SIDE, SIDE):
        raise DataError(f"{where()}: the image is {image.width} x {image.height} pixels, not {SIDE} x {SIDE}.")
    return np.asarray(image)
