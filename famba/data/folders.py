"""Find images in folders, one for each class, in one order on every disk, and read them when they are needed."""

from __future__ import annotations

import logging
import os
import posixpath
import re
from collections.abc import Iterable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from timm.data.readers.reader_image_folder import find_images_and_targets

from famba.data.images import Colour, Reading, read_file
from famba.data.sources import LazySource, Splits, check_num_classes
from famba.errors import DataError, some

# Formats that Pillow knows, but decodes not at all, or by another program alone.
_NOT_DECODED = frozenset(("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"))
_HIDDEN = frozenset(("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"))
_VALIDATION = {1: ("val", "validation"), 2: ("val", "valid", "validation")}
_log = logging.getLogger(__name__)


def _read(folder: Path, background: Colour | None, name: str) -> Image.Image:
    return read_file(folder / name, background)


def load_folder(root: Path, num_classes: int | None, reading: Reading) -> Splits:
    """Open the parts of a data set below a folder; classes have the same numbers in all of them.

    Raises ConfigError where there are other than `num_classes`; DataError as `find_parts` and `read_part`, and where a
    part has other classes than the training images.
    """
    places = find_parts(root, reading.version)
    seen: dict[tuple[int, int], Path] = {}
    parts = {part: read_part(path, reading.version, seen) for part, path in places.items()}
    classes = sorted({*parts["train"].values()}, key=order)
    for part, images in parts.items():
        missing, extra = {*classes} - {*images.values()}, {*images.values()} - {*classes}
        if missing or extra:
            said = [f"{how} {listed(names)}" for how, names in (("without", missing), ("with", extra)) if names]
            raise DataError(f"{places[part]}: its classes are not those of {places['train']}: {', '.join(said)}.")
    check_num_classes(num_classes, len(classes), str(root))
    found, numbers = {}, {name: number for number, name in enumerate(classes)}
    for part, images in parts.items():
        labels = np.array([numbers[label] for label in images.values()], dtype=np.int64)
        read = partial(_read, places[part], reading.colour)
        found[part] = LazySource(read, [*images], labels, len(classes))
    return Splits(found["train"], found.get("validation"), found["test"], tuple(map(_text, classes)))


def find_parts(root: Path, version: int) -> dict[str, Path]:
    """Return where "train", "test" and "validation" lie; where there is one of the last two, it is the test set.

    Raises DataError where a part is missing, or it is not clear which one is meant.
    """
    names = ("train", "test", *_VALIDATION[version])
    train, test, *validations = (root / name if (root / name).is_dir() else None for name in names)
    there = [path for path in validations if path is not None]
    if train is None or not (test or there):
        wanted = " or ".join(str(root / name) for name in (names[1:] if train else names[:1]))
        raise DataError(f"no {wanted}: it holds one folder of images for each class.", "root")
    parts = {"train": train, "test": test or there[0]}
    if test and there:
        parts["validation"] = there[0]
    if version > 1 and len(there) > 1:
        several = " and ".join(map(str, there))
        raise DataError(f"{several}: one of them may hold the validation images. Rename the others.", "root")
    if version > 1 and len({path.resolve() for path in parts.values()}) < len(parts):
        raise DataError(f"{root}: two of {', '.join(parts)} are one folder, by a link. Remove the link.", "root")
    return parts


def read_part(path: Path, version: int, seen: dict[tuple[int, int], Path]) -> dict[str, str]:
    """Map the images of a part, by their paths in it and in order, to the names of their classes.

    seen: the folders that were read, in other parts too. Logs what was skipped. Raises DataError where a folder cannot
    be read, a link leads nowhere or to what was read already, there are no images, some lie in no class, or a class has
    none.
    """
    found = _Found([], set(), [], [])
    try:
        if version == 1:
            files, numbers = find_images_and_targets(str(path))
            classes, top = list(numbers), os.path.join(path, "")
            labels = {file.removeprefix(top): classes[number] for file, number in files}
        else:
            seen |= {_identity(above): above for above in path.resolve().parents}
            _walk(path, "", seen, found)
            labels = {name: name.partition("/")[0] if "/" in name else "" for name in found.images}
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror}).") from error
    images = {name: labels[name] for name in sorted(labels, key=order)}
    others = f"files of kinds that Pillow does not read: {listed(found.skipped)}" if found.skipped else ""
    if not images:
        raise DataError(f"{path}: no images in class folders. {others}")
    if empty := found.folders - {*images.values()}:
        said = f"classes without images: {listed(empty)}"
        raise DataError(f"{path}: {said}. Add images, convert what is there, or remove the folders. {others}")
    if strays := [name for name, label in images.items() if not label]:
        raise DataError(f"{path}: images must lie in one folder for each class, but not so {listed(strays)}.")
    if len(found.folders) == 1 and all(name.count("/") > 1 for name in images):
        said = f"all images lie in folders of {found.folders.pop()!r}, so all are of one class"
        raise DataError(f"{path}: {said}. If those folders are the classes, move them up into {path}.")
    if others:  # they may be images that are missed; hidden names are meant to be left out
        _log.warning("%s: skipped %s", path, others)
    if found.hidden:
        _log.info("%s: skipped hidden names: %s", path, listed(found.hidden))
    return images


class _Found(NamedTuple):
    """Lists what lies in a part, as paths in it."""

    images: list[str]
    folders: set[str]  # that lie directly in it
    skipped: list[str]  # files that are no images
    hidden: list[str]  # not looked at


def _walk(part: Path, folder: str, seen: dict[tuple[int, int], Path], found: _Found) -> None:
    """Add what lies in a folder of the part; seen: the folders that were read, and those that hold the part."""
    path = part / folder
    if (earlier := seen.setdefault(_identity(path), path)) != path:
        raise DataError(f"{path}: this is {earlier} once more, by a link. Remove the link.")
    with os.scandir(path) as entries:
        for entry in entries:
            name = posixpath.join(folder, entry.name)
            if is_hidden(entry.name):
                found.hidden.append(name)
            elif entry.is_symlink() and not os.path.exists(entry.path):
                raise DataError(f"{entry.path}: this link leads nowhere. Mend or remove it.")
            elif entry.is_dir():
                found.folders.update(() if folder else (name,))
                _walk(part, name, seen, found)
            else:
                (found.images if entry.is_file() and is_image(name) else found.skipped).append(name)


def _identity(path: Path) -> tuple[int, int]:
    return (found := os.stat(path)).st_dev, found.st_ino


@cache
def _suffixes() -> frozenset[str]:
    Image.init()
    kinds = Image.registered_extensions().items()
    return frozenset(suffix for suffix, kind in kinds if kind in Image.OPEN and kind not in _NOT_DECODED)


def is_image(name: str) -> bool:
    """Return whether a file's name ends as those of images that Pillow decodes here."""
    return os.path.splitext(name)[1].lower() in _suffixes()


def is_hidden(name: str) -> bool:
    """Return whether a name is one that systems and programs make for themselves."""
    return name.startswith(".") or name in _HIDDEN


def order(name: str) -> tuple[list[str | int], str]:
    """Return the key that sorts names naturally (a2, A10, b), and those that are alike by their characters."""
    # Every second piece is a number: \d matches what int() reads, and not "²".
    pieces = enumerate(re.split(r"(\d+)", name.lower()))
    return [int(piece) if place % 2 else piece for place, piece in pieces], name


def listed(names: Iterable[str]) -> str:
    """Return the first few names in order, of which those that are no text become text."""
    return some([_text(name) for name in sorted(names, key=order)])


def _text(name: str) -> str:
    return os.fsencode(name).decode(errors="replace")
