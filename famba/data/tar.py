"""Find the images in a tar file that holds one folder, or one tar file, for each class."""

from __future__ import annotations

import os
import posixpath
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from timm.data.readers.reader_image_in_tar import extract_tarinfos

from famba.data.folders import Entry, Part, checked, is_hidden, is_image
from famba.errors import DataError

_PIECE = 1 << 20  # bytes


def read_tar(path: Path, version: int) -> Part:
    """Find the images of a part, with their classes and their places in the file.

    A tar file in it stands for a folder of its name, without .tar. Raises DataError as `checked`, and where the file is
    compressed or damaged, or a link leads to nothing in it.
    """
    part = Part(path)
    members = _Members(part)
    try:
        if version == 1:
            # timm's cache is a pickle beside the data.
            samples, targets, numbers, _ = extract_tarinfos(str(path), cache_tarinfo=False)
            classes = list(numbers)
            for (image, _, inner), number in zip(samples, targets, strict=True):
                begin = image.offset_data + (inner.offset_data if inner else 0)
                part.entries.append(Entry(image.path, classes[number], (begin, image.size)))
            return checked(part)
        with open(path, "rb") as file:
            members.read(file, "", 0)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise DataError(
            f"{path}: it or a tar file in it is damaged, compressed or no tar file ({error}). Unpack it with gunzip, "
            "bunzip2, unxz or the like, or fetch it again."
        ) from error
    members.finish()
    return checked(part, "make the tar file from within it")


class _Members:
    """Reads the members of a tar file and of those in it. A name that comes again replaces the earlier one."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.found: dict[str, tuple[int, int] | str] = {}  # images: their first byte and size, or where a link leads
        self.folders: set[str] = set()

    def read(self, file: IO[bytes], folder: str, begin: int) -> None:
        """Read a tar file that begins at a byte of the outermost one; its names lie in a folder."""
        for tar, member in _members(file):
            name = self._path(folder, member.name)
            if any(is_hidden(piece) for piece in name.split("/") if piece != "."):
                self.part.hidden.append(name)
                continue
            self.folders.add(name if member.isdir() else posixpath.dirname(name))
            if member.isfile() and name.lower().endswith(".tar"):
                inner = os.path.splitext(name)[0]
                self.folders.add(inner)
                self.read(tar.extractfile(member), inner, begin + member.offset_data)  # type: ignore[arg-type]
            elif is_image(name) and (member.islnk() or member.issym()):
                self.found[name] = self._path(folder if member.islnk() else posixpath.dirname(name), member.linkname)
            elif is_image(name) and member.issparse():
                raise DataError(f"{self.part.path}, {name}: its bytes lie apart. Make the tar file without --sparse.")
            elif is_image(name) and member.isfile():
                self.found[name] = begin + member.offset_data, member.size
            elif not member.isdir():
                self.part.skipped.append(name)

    def finish(self) -> None:
        """Give the images to the part, every link as the image that it leads to."""
        # "tar -cf train.tar train" puts the part's own name before all others.
        top = f"{self.part.path.stem}/"
        top = top if all(name.startswith(top) for name in self.found) else ""
        for full in self.found:
            name = full.removeprefix(top)
            self.part.entries.append(Entry(name, name.partition("/")[0] if "/" in name else "", self._span(full)))
        self.part.skipped = [name.removeprefix(top) for name in self.part.skipped]
        inside = (folder.removeprefix(top) for folder in self.folders if folder.startswith(top))
        self.part.folders = {folder.partition("/")[0] for folder in inside} - {"", "."}

    def _span(self, name: str) -> tuple[int, int]:
        found, followed = self.found[name], {name}
        while isinstance(found, str):
            if found in followed or found not in self.found:
                raise DataError(f"{self.part.path}, {name}: this link leads to {found}, which is no image in the file.")
            followed.add(found)
            found = self.found[found]
        return found

    def _path(self, folder: str, name: str) -> str:
        """Return a member's path without "." and ".."."""
        plain = posixpath.normpath(posixpath.join(folder, name.lstrip("/")))
        if plain.startswith(".."):
            raise DataError(f"{self.part.path}, {name}: lies outside of the tar file. Make it from within its folder.")
        return plain


def _members(file: IO[bytes]) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Yield the members of a tar file, and refuse one that looks whole but is cut off, damaged or joined of several."""
    with tarfile.TarFile(fileobj=file, mode="r") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # or it would keep all of them
            yield tar, member
        file.seek(tar.offset)
        mark = file.read(tarfile.BLOCKSIZE)
        if len(mark) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it ends without the mark of a tar file's end, so the rest may be missing")
        if any(mark):
            raise tarfile.ReadError(f"no header at byte {tar.offset:,}")
        while piece := file.read(_PIECE):
            if any(piece):
                raise tarfile.ReadError("more follows behind its end, as in tar files that were joined by cat")
