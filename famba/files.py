"""Write files whole or not at all, seal them so that damage shows, and read them without running code."""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import os
import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from famba.errors import CheckpointError, DamagedError

_TEMPORARY = ".tmp"
# The seal is the comment at the end of a zip file, which readers of zip files pass over.
_MARK = b"famba-sha256="
_SEAL_BYTES = len(_MARK) + 64
_NO_COMMENT = b"\0\0"  # the length of none
_BLOCK = 1 << 20
# torch's words for a type that it does not read; those of a blocked module run commands or touch files.
_REFUSED = re.compile(r"GLOBAL (\S+) (?:was not an allowed|whose module \S+ is (blocked))")
_CONVERSION = """
import torch
def plain(x):
    x = x.state_dict() if isinstance(x, torch.nn.Module) else x
    x = {key: plain(value) for key, value in x.items()} if isinstance(x, dict) else x
    return x if torch.is_tensor(x) or type(x) in (dict, str, int, float) else None
torch.save(plain(torch.load(%r, map_location="cpu", weights_only=False)), %r)"""


def write_whole(path: Path, write: Callable[[str], object]) -> None:
    """Write a file beside its place, sync it and rename it: a reader sees the old one or the new one, whole.

    Raises CheckpointError where the disk refuses; the old file is then still there.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{_TEMPORARY}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        write(str(temporary))
        temporary.chmod(mode)  # by the umask, as all files of a run; safetensors lets its user alone read
        _sync(temporary)
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # not every file system syncs folders
            _sync(path.parent)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError where a disk is full, and hides its own error
        cause = error.__cause__ or error.__context__
        told = str(cause if isinstance(cause, OSError) else error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"cannot write {path}: {told}; the file before it is unharmed") from error
    finally:
        with contextlib.suppress(OSError):  # it has its name now, or never was: a folder may be a file
            temporary.unlink()


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files that killed writes left in this folder; nobody may be writing there."""
    for path in folder.glob(f".*{_TEMPORARY}"):
        path.unlink(missing_ok=True)


def seal(path: str | Path) -> None:
    """Add the SHA-256 of a zip file, such as torch.save writes, as its comment. It stays a zip file."""
    with open(path, "rb+") as file:
        end = file.seek(-len(_NO_COMMENT), os.SEEK_END)
        assert file.read() == _NO_COMMENT, "a zip file without a comment"
        file.seek(end)
        file.write(_SEAL_BYTES.to_bytes(2, "little"))
        file.flush()
        file.write(_MARK + sha256(path).encode())


def read_seal(path: str | Path) -> bool | None:
    """Return whether a file is as it was sealed, None if it has no seal. Raises OSError if it cannot be read."""
    end = os.path.getsize(path) - _SEAL_BYTES
    if end < 0:
        return None
    with open(path, "rb") as file:
        file.seek(end)
        found = file.read()
    return found == _MARK + sha256(path, end).encode() if found.startswith(_MARK) else None


def sha256(path: str | Path, length: int | None = None) -> str:
    """Return the SHA-256 of a file, or of its first `length` bytes, in hexadecimal."""
    left = os.path.getsize(path) if length is None else length
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(min(_BLOCK, left)):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_file(path: str | Path) -> dict[str, Any]:
    """Read what a .pth or .safetensors file holds, without running any code that it may hold.

    Raises CheckpointError if the file is missing, of another kind, or damaged; a seal, if there is one, shows damage.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}; give a .pth, .pt or .safetensors file")
    import torch  # not needed to tell how far a run is, and takes seconds
    from safetensors.torch import load_file

    try:
        if read_seal(path) is False:
            raise DamagedError(f"{path} is damaged: it is not what was written (its SHA-256 differs)")
        if path.suffix == ".safetensors":
            return load_file(path)
        # The official files hold their command line's namespace beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # parsers raise whatever a damaged file leads them to
        # Damage may lead to a seek that is invalid; other numbers are of the machine.
        if isinstance(error, MemoryError) or getattr(error, "errno", None) not in (None, errno.EINVAL):
            raise CheckpointError(f"{path} cannot be read: {error or 'no memory'}; try again") from error
        raise CheckpointError(_why_not_read(path, error)) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a dictionary of weights")
    return content


def _why_not_read(path: Path, error: Exception) -> str:
    """Say why torch or safetensors did not read a file, and what to do."""
    found = _REFUSED.search(str(error))
    if found is None:
        kind = type(error).__name__
        return f"{path} is truncated or no checkpoint, but perhaps a program ({kind}); fetch or save its weights again"
    if found[2]:
        return f"{path} would call {found[1]} when it is read, which weights never need; do not trust this file"
    converted = str(path.with_name(f"{path.stem}.weights.pt"))
    return (
        f"{path} holds an object of the type {found[1]}, and reading one can run code, so nothing was read. If you "
        f"trust the file, write its weights to {converted} by this Python code, and give that file:"
        f"{_CONVERSION % (str(path), converted)}"
    )
