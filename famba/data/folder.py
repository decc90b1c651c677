"""Image folders and tar files: one folder of images for each class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.data.readers import create_reader

from famba.data.readers import ReaderSource
from famba.data.sources import Splits
from famba.errors import ConfigError, DataError

_TRAIN = ("train",)
_VALIDATION = ("val", "validation")
_TEST = ("test",)


def load_folder(root: Path, *, tar: bool, num_classes: int | None) -> Splits:
    """Open `root/train` and `root/val` (or validation, or test), or `root/train.tar` and so on.

    Where both a validation and a test part exist, they are used as such; where there is only one, it is
    the test set.

    Args:
        root: the folder that holds the parts.
        tar: whether the parts are tar files rather than folders.
        num_classes: None, or the number of classes there must be.

    Raises:
        ConfigError: where `num_classes` is not what is found.
        DataError: where a part is missing or empty, or the classes of the parts differ.
    """
    train_path, validation_path, test_path = find_parts(root, tar=tar)
    train, test = _open(train_path), _open(test_path)
    validation = _open(validation_path) if validation_path else None
    for other in (test, validation):
        if other is not None:
            _same_classes(train, other)
    if num_classes is not None and num_classes != train.num_classes:
        raise ConfigError(f"num_classes is {num_classes}, but {root} holds {train.num_classes} classes.", "num_classes")
    return Splits(train=train, validation=validation, test=test)


def find_parts(root: Path, *, tar: bool) -> tuple[Path, Path | None, Path]:
    """Return where training, validation and test images lie. Raises DataError where a part is missing."""
    suffix = ".tar" if tar else ""
    train = _need(root, _TRAIN, suffix)
    validation, test = _existing(root, _VALIDATION, suffix), _existing(root, _TEST, suffix)
    if test is None:
        return train, None, validation or _need(root, _VALIDATION + _TEST, suffix)
    return train, validation, test


def classes_of(reader: Any) -> dict[str, int]:
    """Return the class numbers by name that a reader found; empty where it knows none."""
    return dict(getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None) or {})


def _existing(root: Path, names: tuple[str, ...], suffix: str) -> Path | None:
    for name in names:
        path = root / (name + suffix)
        if path.is_file() if suffix else path.is_dir():
            return path
    return None


def _need(root: Path, names: tuple[str, ...], suffix: str) -> Path:
    path = _existing(root, names, suffix)
    if path is None:
        wanted = " or ".join(str(root / (name + suffix)) for name in names)
        layout = "it holds one folder of images for each class."
        raise DataError(f"no {wanted}: {layout}", "root")
    return path


def _open(path: Path) -> ReaderSource:
    try:
        reader = create_reader("", str(path))
    except Exception as error:  # timm raises RuntimeError, ValueError, AssertionError, tarfile.ReadError ...
        raise DataError(f"{path}: holds no readable images in class folders ({error}).") from error
    classes = classes_of(reader)
    if "" in classes:
        raise DataError(f"{path}: images must lie in one folder for each class, but some lie outside.")
    return ReaderSource(reader, len(classes))


def _same_classes(train: ReaderSource, other: ReaderSource) -> None:
    expected, found = set(classes_of(train.reader)), set(classes_of(other.reader))
    if expected == found:
        return
    parts = [
        f"{which} {', '.join(sorted(names)[:5])}{' ...' if len(names) > 5 else ''}"
        for which, names in (("without", expected - found), ("with the unknown", found - expected))
        if names
    ]
    raise DataError(f"{other.reader.root}: its classes differ from those of {train.reader.root}: {', '.join(parts)}.")
