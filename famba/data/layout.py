"""The rules by which what lies in a part of a data set (train, val, test) becomes images with a class each.

They hold for folders and for tar files, and give the same classes in the same order in every process and on every disk.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from famba.errors import DataError

VERSION_1_SUFFIXES = frozenset((".png", ".jpg", ".jpeg"))
"""Endings of the files that Famba 0.1 took for images."""
_NOT_DECODED = frozenset(("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"))
"""Formats that Pillow knows, but decodes not at all, or by another program alone."""
_HIDDEN = frozenset(("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"))
_SHOWN = 3
_log = logging.getLogger(__name__)


class Entry(NamedTuple):
    """An image. name: its path in the part. label: its class. span: first byte and size in a tar file."""

    name: str
    label: str
    span: tuple[int, int] | None = None


@dataclass
class Found:
    """What a scan came across.

    entries: images. skipped: files that are none. hidden: names whose content was not looked at. again: links to
    folders that were read already.
    """

    entries: list[Entry] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    again: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Part:
    """A part as it was read: its images in order, and the names of its classes in order."""

    path: Path
    entries: list[Entry]
    classes: tuple[str, ...]


def image_suffixes() -> frozenset[str]:
    """Return the endings, in lower case and with the dot, of the files that Pillow decodes here."""
    Image.init()
    return frozenset(
        suffix
        for suffix, kind in Image.registered_extensions().items()
        if kind in Image.OPEN and kind not in _NOT_DECODED
    )


def has_suffix(name: str, suffixes: Collection[str]) -> bool:
    """Whether a file's name has one of some endings, in upper or lower case."""
    return os.path.splitext(name)[1].lower() in suffixes


def is_hidden(name: str) -> bool:
    """Whether a name in a folder is one that systems and programs make for themselves."""
    return name.startswith(".") or name in _HIDDEN


def natural_key(name: str) -> list[str | int]:
    """Return what orders names by the numbers in them, upper and lower case alike: a2, A10, b."""
    # Every second piece is a number: \d matches what int() reads, and not "²".
    return [int(piece) if place % 2 else piece for place, piece in enumerate(re.split(r"(\d+)", name.lower()))]


def in_order(names: Iterable[str]) -> list[str]:
    """Sort names naturally, and those that differ in case or zeros alone by their characters: one total order."""
    return sorted(names, key=lambda name: (natural_key(name), name))


def arranged(path: Path, found: Found) -> Part:
    """Put the images and classes of a part into their order, and log what was skipped.

    Raises DataError where there are none, or some lie in no class.
    """
    entries = sorted(found.entries, key=lambda entry: (natural_key(entry.name), entry.name))
    return checked(Part(path, entries, tuple(in_order({entry.label for entry in entries}))), found)


def checked(part: Part, found: Found) -> Part:
    """Return a part whose images all lie in classes; what was skipped is logged. Raises DataError as `arranged`."""
    if not part.entries:
        files = f"; it holds {listed('file', found.skipped)} of other kinds" if found.skipped else ""
        raise DataError(f"{part.path}: holds no readable images in class folders{files}.")
    strays = [entry.name for entry in part.entries if not entry.label]
    if strays:
        raise DataError(
            f"{part.path}: images must lie in one folder for each class, but some lie outside: "
            f"{listed('image', strays)}."
        )
    left_out = []
    if found.skipped:
        left_out.append(f"{listed('file', found.skipped)} of kinds that Pillow does not read")
    if found.hidden:
        left_out.append(listed("hidden name", found.hidden))
    if found.again:
        left_out.append(f"{listed('link', found.again)} to folders that were read already")
    if left_out:
        # Hidden names are meant to be left out; other files may be images that are missed.
        _log.log(logging.WARNING if found.skipped else logging.INFO, "%s: skipped %s", part.path, ", ".join(left_out))
    return part


def refuse_empty(path: Path, folders: Iterable[str], found: Found) -> None:
    """Raise DataError where some of the folders at the top of a part hold no image, but others do."""
    without = set(folders) - {entry.label for entry in found.entries}
    if not without or not found.entries:
        return
    skipped = [name for name in found.skipped if name.split("/")[0] in without]
    held = f", but {listed('file', skipped)} of other kinds" if skipped else ""
    raise DataError(
        f"{path}: {listed('class', sorted(without))} without any image that Pillow reads{held}. Add images, convert "
        "what is there, or remove the folder."
    )


def refuse_wrapped(path: Path, names: Iterable[str], advice: str) -> None:
    """Raise DataError where all images lie in folders of one folder, so that all would be of one class.

    names: paths of images in the part, "/" between. advice: how to mend it.
    """
    folders = {tuple(name.split("/")[:2]) if name.count("/") > 1 else ("", name) for name in names}
    if len({top for top, _ in folders}) == 1 and len(folders) > 1 and "" not in {top for top, _ in folders}:
        top = next(iter(folders))[0]
        inner = in_order({below for _, below in folders})
        raise DataError(
            f"{path}: all images lie in folders of {top!r}, so all are of one class. If {listed('folder', inner)} are "
            f"the classes, {advice}."
        )


def listed(kind: str, names: Sequence[str]) -> str:
    """Say how many names there are and what the first ones are: "5 files (a.txt, b.txt, c.txt, ...)"."""
    # File systems hold names that are no text; a log and a terminal cannot.
    shown = [os.fsencode(name).decode(errors="replace") for name in in_order(names)[:_SHOWN]]
    more = ", ..." if len(names) > _SHOWN else ""
    ending = "" if len(names) == 1 else "es" if kind.endswith("s") else "s"
    return f"{len(names):,} {kind}{ending} ({', '.join(shown)}{more})"
