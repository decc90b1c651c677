"""CIFAR in its official form: Python pickles, checked against the published MD5 sums."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from famba.data.sources import ArraySource
from famba.errors import DataError

SIDE = 32  # pixels
_ROW = 3 * SIDE * SIDE

# What a pickled array is made of. Asking an array gives numpy's rebuilding function wherever it lives now.
_REBUILD = np.empty(0).__reduce__()[0]
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _REBUILD,
    ("numpy._core.multiarray", "_reconstruct"): _REBUILD,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Reads arrays and plain containers only: a pickle can otherwise run any code."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file does") from None


def read_pickles(folder: Path, files: list[tuple[str, str]], label_key: str, num_classes: int) -> ArraySource:
    """Read batches of CIFAR.

    Args:
        folder: where the files lie.
        files: (name, MD5 in hexadecimal) of each, in order.
        label_key: entry of the pickled dictionary that holds the labels.
        num_classes: number of classes.

    Raises:
        DataError: naming the file that is damaged or not what it should be.
    """
    images, labels = [], []
    for name, md5 in files:
        path = folder / name
        check_md5(path, md5)
        batch_images, batch_labels = _read_batch(path, label_key)
        images.append(batch_images)
        labels.append(_checked_labels(path, batch_labels, num_classes))
    data = np.concatenate(images).reshape(-1, 3, SIDE, SIDE)
    return ArraySource(torch.from_numpy(data), torch.from_numpy(np.concatenate(labels)), num_classes)


def read_names(path: Path, key: str, num_classes: int) -> tuple[str, ...] | None:
    """Return the names of the classes from CIFAR's file of them, None where there is no such file.

    Raises DataError where it is damaged.
    """
    if not path.is_file():
        return None
    with path.open("rb") as file:
        entry = _unpickle(file, path)
    names = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(names, list) or len(names) != num_classes or not all(isinstance(name, str) for name in names):
        raise DataError(f"{path}: {key!r} does not name {num_classes} classes. Delete it, or fetch the data again.")
    return tuple(names)


def file_md5(path: Path) -> str:
    """Return the MD5 of a file in hexadecimal."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_md5(path: Path, expected: str) -> None:
    """Raise DataError where a file is unreadable or is not the published one."""
    try:
        found = file_md5(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    if found != expected:
        raise DataError(
            f"{path}: damaged or not the published file (MD5 {found}, published {expected}). "
            "Delete it and fetch it again."
        )


def _read_batch(path: Path, label_key: str) -> tuple[np.ndarray, np.ndarray]:
    with path.open("rb") as file:
        entry = _unpickle(file, path)
    try:
        images, labels = entry["data"], np.asarray(entry[label_key])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: holds no 'data' and {label_key!r}, so it is no batch of CIFAR.") from error
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape != (len(images), _ROW):
        raise DataError(f"{path}: 'data' must be uint8 (n, {_ROW}).")
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise DataError(f"{path}: {label_key!r} must hold {len(images)} integers, one for each image.")
    return images, labels.astype(np.int64)


def _unpickle(file: IO[bytes], path: Path) -> Any:
    try:
        # Written by Python 2: its byte strings are the dictionary's keys and the arrays' bytes.
        return _ArrayUnpickler(file, encoding="latin1").load()
    except Exception as error:  # a damaged pickle can raise almost anything
        raise DataError(f"{path}: not a readable CIFAR file ({error}).") from error


def _checked_labels(path: Path, labels: np.ndarray, num_classes: int) -> np.ndarray:
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        row = int(wrong[0])
        raise DataError(f"{path}, row {row}: label {labels[row]} is not in 0..{num_classes - 1}.")
    return labels
