"""Find the images in a tar file that holds one folder, or one tar file, for each class."""

from __future__ import annotations

import os
import posixpath
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from timm.data.readers.reader_image_in_tar import extract_tarinfos

from famba.data.folders import Entry, Part, arranged, checked, has_suffix, image_suffixes, is_hidden
from famba.errors import DataError

# The programs that unpack files that begin so.
_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
_PIECE = 1 << 20  # bytes


def read_tar(path: Path, version: int) -> Part:
    """Find the images of a part, with their classes and their places in the file.

    A tar file in it stands for a folder of its name, without .tar; in version 1, the innermost folder or tar file is
    the class.

    Raises DataError where the file is compressed or damaged, there are no images, some lie in no class, or a link leads
    to nothing in the file.
    """
    part = Part(path)
    try:
        with open(path, "rb") as file:
            if version == 1:
                _refuse_compressed(path, file)
                part.entries = _version_1(path)
                return checked(part)
            members = _Members(part)
            members.read(file, "", 0)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise DataError(
            f"{path}: holds no readable images: it is damaged or no tar file ({error}). Make or fetch it again."
        ) from error
    members.finish()
    return arranged(part, "make the tar file from within it")


def _version_1(path: Path) -> list[Entry]:
    # timm's cache is a pickle beside the data.
    samples, numbers, of_classes, _ = extract_tarinfos(str(path), cache_tarinfo=False)
    classes = {number: name for name, number in of_classes.items()}
    return [
        Entry(image.path, classes[number], (image.offset_data + (inner.offset_data if inner else 0), image.size))
        for (image, _, inner), number in zip(samples, numbers.tolist(), strict=True)
    ]


class _Members:
    """Reads the members of a tar file and of those in it. A name that comes again replaces the earlier one."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.suffixes = image_suffixes()
        self.spans: dict[str, tuple[int, int]] = {}
        self.links: dict[str, str] = {}
        self.folders: set[str] = set()

    def read(self, file: IO[bytes], folder: str, begin: int) -> None:
        """Read a tar file that begins at a byte of the outermost one; its names lie in a folder."""
        for tar, member in _members(self.part.path, file):
            name = self._path(folder, member.name)
            if any(is_hidden(piece) for piece in name.split("/") if piece != "."):
                self.part.hidden.append(name)
                continue
            self.folders.add(name if member.isdir() else posixpath.dirname(name))
            if member.isfile() and has_suffix(name, (".tar",)):
                inner = os.path.splitext(name)[0]
                self.folders.add(inner)
                self.read(tar.extractfile(member), inner, begin + member.offset_data)  # type: ignore[arg-type]
            elif not member.isdir():
                self._file(member, name, folder, begin)

    def _file(self, member: tarfile.TarInfo, name: str, folder: str, begin: int) -> None:
        if not has_suffix(name, self.suffixes) or not (member.isfile() or member.islnk() or member.issym()):
            self.part.skipped.append(name)
        elif member.issparse():
            raise DataError(f"{self.part.path}, {name}: a sparse member, whose bytes lie apart; leave out --sparse.")
        elif member.isfile():
            self.spans[name] = (begin + member.offset_data, member.size)
            self.links.pop(name, None)
        else:
            beside = folder if member.islnk() else posixpath.dirname(name)
            self.links[name] = self._path(beside, member.linkname)
            self.spans.pop(name, None)

    def finish(self) -> None:
        """Give the images to the part, every link as the image that it leads to."""
        found = dict(self.spans)
        for name, target in self.links.items():
            followed = {name}
            while target in self.links and target not in followed:
                followed.add(target)
                target = self.links[target]
            if target not in self.spans:
                path = self.part.path
                raise DataError(f"{path}, {name}: this link leads to {target}, which is no image in the file.")
            found[name] = self.spans[target]
        # "tar -cf train.tar train" puts the part's own name before all others.
        top = f"{self.part.path.stem}/"
        strip = len(top) if found and all(name.startswith(top) for name in found) else 0
        names = {name: name[strip:] for name in found}
        self.part.entries = [
            Entry(name, name.partition("/")[0] if "/" in name else "", found[full]) for full, name in names.items()
        ]
        if strip:
            self.part.skipped = [name.removeprefix(top) for name in self.part.skipped]
            self.folders = {folder[strip:] for folder in self.folders if folder.startswith(top)}
        self.part.folders = {folder.partition("/")[0] for folder in self.folders} - {"", "."}

    def _path(self, folder: str, name: str) -> str:
        """Return a member's path without "." and ".."."""
        plain = posixpath.normpath(posixpath.join(folder, name.lstrip("/")))
        if plain.startswith(".."):
            path = self.part.path
            raise DataError(f"{path}, {name}: lies outside of the tar file. Make it anew, from within its folder.")
        return plain


def _members(path: Path, file: IO[bytes]) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Yield the members of a tar file, and refuse one that looks whole but is cut off, damaged or joined of several."""
    _refuse_compressed(path, file)
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


def _refuse_compressed(path: Path, file: IO[bytes]) -> None:
    header = file.read(tarfile.BLOCKSIZE)
    file.seek(0)
    for signature, program in _COMPRESSED.items():
        if header.startswith(signature) and not header[257:].startswith(b"ustar"):
            raise DataError(
                f"{path}: is compressed, or holds a compressed tar file, and images are read from their place in it. "
                f"Unpack it with {program}."
            )
