"""Image folders and tar files: one folder of images for each class."""

from __future__ import annotations

from pathlib import Path

from famba.data.files import FileSource
from famba.data.layout import Part
from famba.data.reading import Reading
from famba.data.scan import read_folder
from famba.data.sources import Splits
from famba.data.tar import read_tar
from famba.errors import ConfigError, DataError

_TRAIN, _TEST = ("train",), ("test",)
_VALIDATION = {1: ("val", "validation"), 2: ("val", "valid", "validation")}


def load_folder(root: Path, *, tar: bool, num_classes: int | None, reading: Reading) -> Splits:
    """Open `root/train` and `root/val` (or valid, validation, or test), or `root/train.tar` and so on.

    Where both a validation and a test part exist, they are used as such; where there is only one, it is
    the test set. The folders directly in a part are its classes. They have the same numbers in all parts, in natural
    order (2 before 10, upper and lower case alike).

    Args:
        root: the folder that holds the parts.
        tar: whether the parts are tar files rather than folders.
        num_classes: None, or the number of classes there must be.
        reading: how they are read.

    Raises:
        ConfigError: where `num_classes` is not what is found.
        DataError: where a part is missing or empty, a class has no images, or the classes of the parts differ.
    """
    paths = find_parts(root, tar=tar, version=reading.version)
    read = read_tar if tar else read_folder
    train, validation, test = (None if path is None else read(path, reading.version) for path in paths)
    assert train is not None
    assert test is not None
    for other in (test, validation):
        if other is not None:
            _same_classes(train, other)
    classes = train.classes
    if num_classes not in (None, len(classes)):
        raise ConfigError(f"num_classes is {num_classes}, but {root} holds {len(classes)} classes.", "num_classes")
    return Splits(
        train=FileSource.of(train, classes, reading.colour),
        validation=None if validation is None else FileSource.of(validation, classes, reading.colour),
        test=FileSource.of(test, classes, reading.colour),
        classes=classes,
    )


def find_parts(root: Path, *, tar: bool, version: int) -> tuple[Path, Path | None, Path]:
    """Return where training, validation and test images lie.

    Raises DataError where a part is missing, or it is not clear which one is meant.
    """
    suffix = ".tar" if tar else ""
    validation_names = _VALIDATION[version]
    train = _need(root, _TRAIN, suffix)
    validations, tests = _existing(root, validation_names, suffix), _existing(root, _TEST, suffix)
    if version > 1 and len(validations) > 1:
        raise DataError(
            f"{' and '.join(map(str, validations))}: one of them may hold the validation images; remove or rename the "
            "others.",
            "root",
        )
    validation = validations[0] if validations else None
    if not tests:
        return train, None, validation or _need(root, validation_names + _TEST, suffix)
    return train, validation, tests[0]


def _existing(root: Path, names: tuple[str, ...], suffix: str) -> list[Path]:
    paths = [root / (name + suffix) for name in names]
    return [path for path in paths if (path.is_file() if suffix else path.is_dir())]


def _need(root: Path, names: tuple[str, ...], suffix: str) -> Path:
    paths = _existing(root, names, suffix)
    if not paths:
        wanted = " or ".join(str(root / (name + suffix)) for name in names)
        layout = "it holds one folder of images for each class."
        raise DataError(f"no {wanted}: {layout}", "root")
    return paths[0]


def _same_classes(train: Part, other: Part) -> None:
    expected, found = set(train.classes), set(other.classes)
    if expected == found:
        return
    parts = [
        f"{which} {', '.join(sorted(names)[:5])}{' ...' if len(names) > 5 else ''}"
        for which, names in (("without", expected - found), ("with the unknown", found - expected))
        if names
    ]
    raise DataError(f"{other.path}: its classes differ from those of {train.path}: {', '.join(parts)}.")
