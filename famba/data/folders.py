"""Find images in folders, one for each class, in one order on every disk, and read them when they are needed."""

from __future__ import annotations

import io
import logging
import os
import posixpath
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from timm.data.readers.reader_image_folder import find_images_and_targets

from famba.data.images import Colour, decode_rgb, naming
from famba.errors import DataError

# Formats that Pillow knows, but decodes not at all, or by another program alone.
_NOT_DECODED = frozenset(("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"))
_HIDDEN = frozenset(("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"))
_SHOWN = 3
_log = logging.getLogger(__name__)


class Entry(NamedTuple):
    """Names an image in a part of a data set."""

    name: str  # its path in the part, "/" between
    label: str  # its class; "" where it lies in none
    span: tuple[int, int] | None = None  # first byte and size in a tar file


@dataclass
class Part:
    """Lists what was found in a part of a data set (train, val, test); names are paths in it."""

    path: Path
    entries: list[Entry] = field(default_factory=list)
    folders: set[str] = field(default_factory=set)  # that lie directly in it
    skipped: list[str] = field(default_factory=list)  # files that are no images
    hidden: list[str] = field(default_factory=list)  # not looked at
    again: list[str] = field(default_factory=list)  # links to folders that were read already

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the names of the classes in order."""
        return tuple(in_order({entry.label for entry in self.entries}))


@dataclass(frozen=True, eq=False)
class FileSource:
    """Gives the images of a part. Each is opened anew, so no open file is shared with another process."""

    path: Path  # the folder or tar file that holds them
    names: list[str]  # their paths in it
    labels: npt.NDArray[np.int64]  # (n,)
    spans: npt.NDArray[np.int64] | None  # first byte and size of each in the tar file, (n, 2); None for a folder
    num_classes: int
    background: Colour | None  # as in `images.to_rgb`

    @classmethod
    def of(cls, part: Part, classes: tuple[str, ...], background: Colour | None) -> FileSource:
        """Return the images of a part; a class's number is its place among the names of all classes."""
        numbers = {name: number for number, name in enumerate(classes)}
        names = [entry.name for entry in part.entries]
        labels = np.array([numbers[entry.label] for entry in part.entries], dtype=np.int64)
        spans = [entry.span for entry in part.entries if entry.span is not None]
        return cls(part.path, names, labels, np.array(spans, np.int64) if spans else None, len(classes), background)

    def __len__(self) -> int:
        return len(self.names)

    def image(self, index: int) -> Image.Image:
        """Return an RGB image; DataError naming its file where that is missing or corrupt."""
        with naming(lambda: self._where(index)), self._opened(index) as file:
            return decode_rgb(file, self.background)

    def _opened(self, index: int) -> IO[bytes]:
        if self.spans is None:
            return open(self.path / self.names[index], "rb")
        first, size = self.spans[index].tolist()
        with open(self.path, "rb") as file:
            file.seek(first)
            return io.BytesIO(file.read(size))

    def _where(self, index: int) -> str:
        return f"{self.path}{'/' if self.spans is None else ', '}{self.names[index]}"


@cache
def image_suffixes() -> frozenset[str]:
    """Return the endings, in lower case and with the dot, of the files that Pillow decodes here."""
    Image.init()
    kinds = Image.registered_extensions().items()
    return frozenset(suffix for suffix, kind in kinds if kind in Image.OPEN and kind not in _NOT_DECODED)


def is_image(name: str) -> bool:
    """Say whether a file's name is that of an image, in upper or lower case."""
    return os.path.splitext(name)[1].lower() in image_suffixes()


def is_hidden(name: str) -> bool:
    """Say whether it is a name that systems and programs make for themselves."""
    return name.startswith(".") or name in _HIDDEN


def order(name: str) -> tuple[list[str | int], str]:
    """Return the key that sorts names naturally (a2, A10, b), and those that are alike by their characters."""
    # Every second piece is a number: \d matches what int() reads, and not "²".
    pieces = enumerate(re.split(r"(\d+)", name.lower()))
    return [int(piece) if place % 2 else piece for place, piece in pieces], name


def in_order(names: Iterable[str]) -> list[str]:
    """Sort names by `order`: one total order."""
    return sorted(names, key=order)


def read_folder(path: Path, version: int) -> Part:
    """Find the images of a part, with their classes.

    Raises DataError as `checked`, and where a folder cannot be read or links lead in circles, nowhere, or to the images
    of another class.
    """
    part = Part(path)
    try:
        if version == 1:
            found, numbers = find_images_and_targets(str(path))
            classes, top = list(numbers), os.path.join(path, "")
            part.entries = [Entry(file.removeprefix(top), classes[number]) for file, number in found]
            part.entries.sort(key=lambda entry: order(entry.name))
            return checked(part)
        walk = _Walk(part)
        walk.read("", {_identity(folder): folder for folder in path.resolve().parents})
        walk.drop_links()
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror}).") from error
    return checked(part, f"move their folders up into {path}")


class _Walk:
    """Walks through a part. Every folder is read once, whatever links lead to it."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.folders: dict[tuple[int, int], str] = {}  # by device and inode, whatever path leads to them
        self.links: set[str] = set()  # images that are links

    def read(self, folder: str, above: dict[tuple[int, int], Path]) -> None:
        """Add what lies in a folder to the part; above: the folders that hold it."""
        path = self.part.path / folder
        identity = _identity(path)
        if identity in above:
            raise DataError(f"{path}: this link leads to {above[identity]}, which contains it. Remove it.")
        if not self._is_new(self.folders, folder, "folder"):
            return
        with os.scandir(path) as found:
            entries = sorted(found, key=lambda entry: order(entry.name))
        for entry in entries:
            name = posixpath.join(folder, entry.name)
            if is_hidden(entry.name):
                self.part.hidden.append(name)
            elif entry.is_symlink() and not os.path.exists(entry.path):
                raise DataError(f"{entry.path}: this link leads nowhere. Mend or remove it.")
            elif entry.is_dir():
                if not folder:
                    self.part.folders.add(name)
                self.read(name, {**above, identity: path})
            elif entry.is_file() and is_image(name):
                if entry.is_symlink():
                    self.links.add(name)
                self.part.entries.append(Entry(name, folder.partition("/")[0]))
            else:
                self.part.skipped.append(name)

    def drop_links(self) -> None:
        """Leave out links to images that are in the part already."""
        if self.links:
            seen: dict[tuple[int, int], str] = {}
            files_first = sorted(self.part.entries, key=lambda entry: entry.name in self.links)
            self.part.entries = [entry for entry in files_first if self._is_new(seen, entry.name, "image")]

    def _is_new(self, seen: dict[tuple[int, int], str], name: str, kind: str) -> bool:
        """Say whether it was not met before. Raises DataError for what was met in another class."""
        path = self.part.path / name
        earlier = seen.setdefault(_identity(path), name)
        if earlier == name:
            return True
        if earlier.split("/")[0] != name.split("/")[0]:
            other = f"the {kind} {self.part.path / earlier}"
            raise DataError(f"{path}: this is {other} once more, by a link, in two classes. Remove one of them.")
        self.part.again.append(name)
        return False


def _identity(path: Path) -> tuple[int, int]:
    return (found := os.stat(path)).st_dev, found.st_ino


def checked(part: Part, advice: str | None = None) -> Part:
    """Return a part whose images all lie in classes, sorted but in version 1, and log what was skipped.

    advice: how to mend a part whose classes lie one folder too deep; None where they may. Raises DataError for that,
    where there are no images, where only some folders hold any, or where some images lie in no class.
    """
    if advice:
        part.entries.sort(key=lambda entry: order(entry.name))
    without = part.folders - {entry.label for entry in part.entries}
    if without and part.entries:
        skipped = [name for name in part.skipped if name.split("/")[0] in without]
        held = f", but {listed('file', skipped)} of other kinds" if skipped else ""
        lacking = f"{listed('class', without)} without any image that Pillow reads{held}"
        raise DataError(f"{part.path}: {lacking}. Add images, convert what is there, or remove the folder.")
    if not part.entries:
        files = f"; it holds {listed('file', part.skipped)} of other kinds" if part.skipped else ""
        raise DataError(f"{part.path}: holds no readable images in class folders{files}.")
    strays = [entry.name for entry in part.entries if not entry.label]
    if strays:
        outside = listed("image", strays)
        raise DataError(f"{part.path}: images must lie in one folder for each class, but some lie outside: {outside}.")
    places = {posixpath.dirname(entry.name) for entry in part.entries}
    common = posixpath.commonpath(places) if advice else ""
    if common and common not in places:
        inner = listed("folder", {place[len(common) + 1 :].partition("/")[0] for place in places})
        said = f"all images lie in folders of {common!r}, so all are of one class"
        raise DataError(f"{part.path}: {said}. If {inner} are the classes, {advice}.")
    left_out = [f"{listed('file', part.skipped)} of kinds that Pillow does not read"] if part.skipped else []
    left_out += [listed("hidden name", part.hidden)] if part.hidden else []
    left_out += [f"{listed('link', part.again)} to what was read already"] if part.again else []
    if left_out:
        # Hidden names are meant to be left out; other files may be images that are missed.
        _log.log(logging.WARNING if part.skipped else logging.INFO, "%s: skipped %s", part.path, ", ".join(left_out))
    return part


def listed(kind: str, names: Collection[str]) -> str:
    """Say how many names there are and what the first ones are: "5 files (a.txt, b.txt, c.txt, ...)"."""
    # File systems hold names that are no text; a log and a terminal cannot.
    shown = [os.fsencode(name).decode(errors="replace") for name in in_order(names)[:_SHOWN]]
    more = ", ..." if len(names) > _SHOWN else ""
    ending = "" if len(names) == 1 else "es" if kind.endswith("s") else "s"
    return f"{len(names):,} {kind}{ending} ({', '.join(shown)}{more})"
