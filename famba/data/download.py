"""Where data lies when no folder is given, and how it gets there."""

from __future__ import annotations

import os
from pathlib import Path

import filelock
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets import utils as torchvision_utils

from famba.data.archives import unpack
from famba.data.pickles import file_md5
from famba.errors import ConfigError, DataError, near_miss

ARCHIVES: dict[str, type[CIFAR10]] = {"cifar10": CIFAR10, "cifar100": CIFAR100}
_REASONS = {
    "digits": "the digits come with scikit-learn and need no download",
    "folder": "a folder of images is yours to provide",
    "tar": "tar files of images are yours to provide",
}


def default_root() -> Path:
    """Return the folder for data when none is given: $FAMBA_DATA, else ~/.cache/famba/data."""
    given = os.environ.get("FAMBA_DATA")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "famba" / "data"


def download(name: str, root: str | Path | None) -> Path:
    """Fetch a data set into a folder unless it is there, and return the folder.

    Several processes may call this at once: one downloads, the others wait.

    Args:
        name: "cifar10" or "cifar100".
        root: folder, made where missing; None for `default_root()`.

    Raises:
        ConfigError: where there is nothing to download under this name.
        DataError: where the download or writing the folder fails.
    """
    if name not in ARCHIVES:
        raise ConfigError(_no_download(name))
    folder = default_root() if root is None else Path(root).expanduser()
    if _is_complete(name, folder):
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / f".{name}.lock"):
            if not _is_complete(name, folder):  # another process may have been first
                _fetch(name, folder)
    except (OSError, RuntimeError) as error:  # no network, no space, no permission; a wrong checksum
        raise DataError(
            f"{name} could not be downloaded from {ARCHIVES[name].url} to {folder} ({error}). "
            f"On a machine with network access run: famba download {name} --root DIR; "
            "then copy DIR here and set data.root to it."
        ) from error
    return folder


def _fetch(name: str, folder: Path) -> None:
    archive = ARCHIVES[name]
    torchvision_utils.download_url(archive.url, str(folder), filename=archive.filename, md5=archive.tgz_md5)
    unpack(folder / archive.filename, folder)
    (folder / archive.filename).unlink()
    if not _is_complete(name, folder):
        raise RuntimeError("the archive does not hold the published files")


def _is_complete(name: str, folder: Path) -> bool:
    archive = ARCHIVES[name]
    files = [(folder / archive.base_folder / file, md5) for file, md5 in archive.train_list + archive.test_list]
    return all(path.is_file() for path, _ in files) and all(file_md5(path) == md5 for path, md5 in files)


def _no_download(name: str) -> str:
    if name in _REASONS:
        return f"data {name!r} has no download: {_REASONS[name]}."
    known = ", ".join(ARCHIVES)
    return f"data {name!r} has no download here, only {known}{near_miss(name, ARCHIVES)}."
