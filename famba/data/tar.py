"""Find the images in a tar file that holds one folder, or one tar file, for each class."""

from __future__ import annotations

import os
import posixpath
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from famba.data.layout import (
    VERSION_1_SUFFIXES,
    Entry,
    Found,
    Part,
    arranged,
    checked,
    has_suffix,
    image_suffixes,
    in_order,
    is_hidden,
    natural_key,
    refuse_empty,
    refuse_wrapped,
)
from famba.errors import DataError

_TAR = (".tar",)
_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
"""Programs that unpack files that begin so."""
_PIECE = 1 << 20  # bytes


def read_tar(path: Path, version: int) -> Part:
    """Find the images of a part, with their classes and their places in the file.

    A tar file in it stands for a folder of its name, without .tar.

    Raises DataError where the file is compressed or damaged, there are no images, some lie in no class, or a link leads
    to nothing in the file.
    """
    try:
        with open(path, "rb") as file:
            return _version_1(path, file) if version == 1 else _read(path, file)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise DataError(
            f"{path}: holds no readable images: it is damaged or no tar file ({error}). Make or fetch it again."
        ) from error


def _version_1(path: Path, file: IO[bytes]) -> Part:
    """Find images as Famba 0.1 did: the innermost folder or tar file is the class."""
    # Tar files first, in the order of the file, and then the images beside them; none in tar files in tar files.
    found, beside = Found(), []
    for member in _members(path, file, os.path.getsize(path)):
        if not member.isfile():
            continue
        if has_suffix(member.path, _TAR):
            stem = os.path.splitext(os.path.basename(member.path))[0]
            file.seek(member.offset_data)
            for inner in _members(path, file, member.offset_data + member.size):
                if inner.isfile() and has_suffix(inner.path, VERSION_1_SUFFIXES):
                    found.entries.append(_version_1_entry(inner, stem))
        elif has_suffix(member.path, VERSION_1_SUFFIXES):
            beside.append(_version_1_entry(member, ""))
    found.entries += beside
    # Names that are alike stay in the order of the file.
    entries = sorted(found.entries, key=lambda entry: natural_key(entry.name))
    return checked(Part(path, entries, tuple(in_order({entry.label for entry in entries}))), found)


def _version_1_entry(member: tarfile.TarInfo, stem: str) -> Entry:
    folder = os.path.join(stem, os.path.dirname(member.path)).strip(os.path.sep)
    return Entry(member.path, os.path.basename(folder), (member.offset_data, member.size))


def _read(path: Path, file: IO[bytes]) -> Part:
    reader = _Reader(path, file)
    reader.read("", os.path.getsize(path))
    found = reader.resolved()
    names = [entry.name for entry in found.entries]
    # "tar -cf train.tar train" puts the part's own name before all others.
    top = f"{path.stem}/"
    if names and all(name.startswith(top) for name in names):
        names = [name[len(top) :] for name in names]
        found.skipped = [name.removeprefix(top) for name in found.skipped]
        reader.folders = {folder[len(top) :] for folder in reader.folders if folder.startswith(top)}
    found.entries = [
        Entry(name, name.partition("/")[0] if "/" in name else "", entry.span)
        for name, entry in zip(names, found.entries, strict=True)
    ]
    refuse_empty(path, (folder.partition("/")[0] for folder in reader.folders if folder not in ("", ".")), found)
    part = arranged(path, found)
    refuse_wrapped(path, names, "make the tar file from within it")
    return part


class _Reader:
    """Reads the members of a tar file and of those in it.

    A name that comes again replaces the earlier one, as in unpacking.
    """

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path, self.file = path, file
        self.suffixes = image_suffixes()
        self.spans: dict[str, tuple[int, int]] = {}
        self.links: dict[str, str] = {}
        self.found = Found()
        self.folders: set[str] = set()

    def read(self, folder: str, end: int) -> None:
        """Read the tar file that begins where the file is, up to the byte `end`; its names lie in a folder."""
        for member in _members(self.path, self.file, end, to_the_end=True):
            name = self._name(folder, member.name)
            if any(is_hidden(piece) for piece in name.split("/") if piece != "."):
                self.found.hidden.append(name)
                continue
            inner = os.path.splitext(name)[0]
            is_tar = member.isfile() and has_suffix(name, _TAR)
            self.folders.add(name if member.isdir() else inner if is_tar else posixpath.dirname(name))
            if member.isdir():
                continue
            if is_tar:
                self.file.seek(member.offset_data)
                self.read(inner, member.offset_data + member.size)
            elif not has_suffix(name, self.suffixes):
                self.found.skipped.append(name)
            elif member.issparse():
                raise DataError(f"{self.path}, {name}: a sparse member, whose bytes lie apart; leave out --sparse.")
            elif member.isfile():
                self.spans[name] = (member.offset_data, member.size)
                self.links.pop(name, None)
            elif member.islnk() or member.issym():
                beside = folder if member.islnk() else posixpath.dirname(name)
                self.links[name] = self._name(beside, member.linkname)
                self.spans.pop(name, None)
            else:
                self.found.skipped.append(name)

    def resolved(self) -> Found:
        """Return what was found, with every link as the image that it leads to; classes are not told yet."""
        for name, target in self.links.items():
            followed = {name}
            while target in self.links and target not in followed:
                followed.add(target)
                target = self.links[target]
            if target not in self.spans:
                raise DataError(f"{self.path}, {name}: this link leads to {target}, which is no image in the file.")
            self.found.entries.append(Entry(name, "", self.spans[target]))
        self.found.entries += (Entry(name, "", span) for name, span in self.spans.items())
        return self.found

    def _name(self, folder: str, name: str) -> str:
        """Return a member's path without "." and ".."."""
        plain = posixpath.normpath(posixpath.join(folder, name.lstrip("/")))
        if plain.startswith(".."):
            raise DataError(f"{self.path}, {name}: lies outside of the tar file. Make it anew, from within its folder.")
        return plain


def _members(path: Path, file: IO[bytes], end: int, *, to_the_end: bool = False) -> Iterator[tarfile.TarInfo]:
    """Yield the members of the tar file that begins where the file is; their offsets are those of the file.

    end: first byte behind it. to_the_end: refuse what looks whole but is cut off, damaged or joined from several.
    """
    start = file.tell()
    header = file.read(tarfile.BLOCKSIZE)
    file.seek(start)
    for signature, program in _COMPRESSED.items():
        if header.startswith(signature) and not header[257:].startswith(b"ustar"):
            raise DataError(
                f"{path}: is compressed, or holds a compressed tar file, and images are read from their place in it. "
                f"Unpack it with {program}."
            )
    with tarfile.TarFile(fileobj=file, mode="r") as tar:
        while (member := tar.next()) is not None and member.offset < end:
            tar.members.clear()  # type: ignore[attr-defined]  # or it would keep all of them
            # A size that was damaged.
            if member.isfile() and member.offset_data + member.size > end:
                raise tarfile.ReadError("unexpected end of data")
            yield member
        if to_the_end or tar.offset == start:
            _check_end(file, tar.offset if member is None else member.offset, end, whole=to_the_end)


def _check_end(file: IO[bytes], place: int, end: int, *, whole: bool) -> None:
    """Raise ReadError where no zeros begin at a place, or, if `whole`, anything but zeros follows."""
    file.seek(place)
    size = min(tarfile.BLOCKSIZE, end - place)
    mark = file.read(max(size, 0))
    if len(mark) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("it ends without the mark of a tar file's end, so the rest may be missing")
    if any(mark):
        raise tarfile.ReadError(f"no header at byte {place:,}")
    while whole and file.tell() < end:
        piece = file.read(min(_PIECE, end - file.tell()))
        if any(piece):
            raise tarfile.ReadError("more follows behind its end, as in tar files that were joined by cat")
        if not piece:
            break
