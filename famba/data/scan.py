"""Find the images below a folder that holds one folder for each class."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeAlias

from famba.data.layout import (
    VERSION_1_SUFFIXES,
    Entry,
    Found,
    Part,
    arranged,
    has_suffix,
    image_suffixes,
    in_order,
    is_hidden,
    refuse_empty,
    refuse_wrapped,
)
from famba.errors import DataError

_Identity: TypeAlias = tuple[int, int]  # of a folder, whatever path leads to it: device and inode


def read_folder(path: Path, version: int) -> Part:
    """Find the images of a part, with their classes.

    Raises DataError where there are none, a class has none, some lie in no class, a folder cannot be read, or links
    lead in circles, nowhere, or to the images of another class.
    """
    if version == 1:
        return arranged(path, _as_version_1(path))
    found = _Scan(path).run()
    part = arranged(path, found)
    names = [entry.name for entry in part.entries]
    refuse_wrapped(path, names, f"move their folders up into {path}")
    return part


def _as_version_1(path: Path) -> Found:
    """Find images as Famba 0.1 did: the innermost folder is the class, and links are followed blindly."""
    found = Found()
    for folder, _, files in os.walk(path, followlinks=True):
        below = os.path.relpath(folder, path) if folder != str(path) else ""
        label = os.path.basename(below)
        found.entries += (
            Entry(os.path.join(below, file), label) for file in files if has_suffix(file, VERSION_1_SUFFIXES)
        )
    return found


class _Scan:
    """A walk through a part. Every folder is read once, whatever links lead to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found = Found()
        self.suffixes = image_suffixes()
        self.read: dict[_Identity, str] = {}

    def run(self) -> Found:
        """Find the images; the folders at the top are their classes."""
        above = {_identity(folder): folder for folder in (self.path.resolve(), *self.path.resolve().parents)}
        classes = self._files("", "")
        for name in classes:
            self._folder(name, name, above)
        refuse_empty(self.path, classes, self.found)
        return self.found

    def _folder(self, name: str, label: str, above: dict[_Identity, Path]) -> None:
        """Read a folder and those in it. above: the folders that contain it."""
        path = self.path / name
        identity = _identity(path)
        if identity in above:
            raise DataError(f"{path}: this link leads to {above[identity]}, which contains it. Remove it.")
        earlier = self.read.setdefault(identity, name)
        if earlier != name:
            if earlier.split("/")[0] != label:
                raise DataError(
                    f"{path}: this is the folder {self.path / earlier} once more, by a link, so its images would be in "
                    "two classes. Remove one of them."
                )
            self.found.again.append(name)
            return
        for inner in self._files(name, label):
            self._folder(inner, label, {**above, identity: path})

    def _files(self, name: str, label: str) -> list[str]:
        """Take the images that lie in a folder itself; return the folders in it, in order.

        All names are paths in the part, "/" between.
        """
        path = self.path / name
        try:
            with os.scandir(path) as entries:
                there = {entry.name: entry for entry in entries}
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
        folders = []
        for file in in_order(there):
            inner = f"{name}/{file}" if name else file
            if is_hidden(file):
                self.found.hidden.append(inner)
            elif there[file].is_symlink() and not os.path.exists(there[file].path):
                raise DataError(f"{self.path / inner}: this link leads nowhere. Mend or remove it.")
            elif there[file].is_dir():
                folders.append(inner)
            elif there[file].is_file() and has_suffix(file, self.suffixes):
                self.found.entries.append(Entry(inner, label))
            else:
                self.found.skipped.append(inner)
        return folders


def _identity(path: Path) -> _Identity:
    try:
        found = os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    return found.st_dev, found.st_ino
