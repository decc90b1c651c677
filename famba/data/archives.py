"""Archives, unpacked so that nothing in them reaches outside the folder."""

from __future__ import annotations

import tarfile
from pathlib import Path

from famba.errors import DataError


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a tar file, compressed or not, into a folder.

    Raises:
        DataError: where it is damaged, or a member would lie or point outside the folder, or is no file, folder or
            link. What came before that member stays.
    """
    if not hasattr(tarfile, "data_filter"):
        raise DataError(
            "this Python unpacks archives without looking where their files go; use 3.10.12, 3.11.4, 3.12 or later, "
            f"or unpack {archive} yourself"
        )
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{archive} cannot be unpacked ({error}); delete it and fetch it again") from error
