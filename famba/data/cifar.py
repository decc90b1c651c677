"""CIFAR-10 and CIFAR-100, from the official pickles or from parquet files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from famba.data.download import ARCHIVES, default_root, download
from famba.data.parquet import read_parquet, shards
from famba.data.pickles import read_pickles
from famba.data.sources import ArraySource, Splits
from famba.errors import DataError


@dataclass(frozen=True)
class _Kind:
    num_classes: int
    pickle_labels: str  # entry of the pickled dictionary
    parquet_labels: tuple[str, ...]
    hub_folder: str  # where the hub's repository keeps its parquet files


KINDS = {
    "cifar10": _Kind(10, "labels", ("label",), "plain_text"),
    "cifar100": _Kind(100, "fine_labels", ("fine_label", "label"), "cifar100"),
}
TRAINING_IMAGES = 50_000


def load_cifar(name: str, root: Path | None) -> Splits:
    """Load CIFAR into memory as uint8 (n, 3, 32, 32).

    Args:
        name: "cifar10" or "cifar100".
        root: folder that holds the data in any of the known layouts; a folder that is given is never
            downloaded into. None: `default_root()`, with a download where the data is missing.

    Raises:
        DataError: where data is missing, incomplete or damaged, naming the file (and row).
    """
    folder = default_root() if root is None else root
    if root is None and not _placed_by_hand(name, folder):
        # Checks what is there under a lock, so that a download in another process is never seen half done.
        download(name, folder)
    load = _find(name, folder)
    return Splits(train=load("train"), validation=None, test=load("test"))


def check_folder(name: str, root: Path) -> None:
    """Raise DataError where a folder holds CIFAR in none of the known layouts; its files are not read."""
    _find(name, root)


def _placed_by_hand(name: str, root: Path) -> bool:
    """Whether the data lies where no download puts it."""
    return not _missing_pickles(name, root) or any(shards(f, "train") for f in _parquet_folders(name, root))


def _find(name: str, root: Path) -> Callable[[str], ArraySource]:
    """Return what loads a split by its name. Raises DataError where no layout fits."""
    for folder in _pickle_folders(name, root):
        missing = _missing_pickles(name, folder)
        if not missing:
            return partial(_load_pickles, name, folder)
        if folder != root and folder.is_dir():
            raise DataError(f"{folder}: {', '.join(missing)} of {name} is missing. Fetch the data again.")
    for folder in _parquet_folders(name, root):
        found = {split: shards(folder, split) for split in ("train", "test")}
        if any(found.values()):
            _need_both(folder, found)
            return partial(_load_parquet, name, found)
    raise DataError(_not_found(name, root), "root")


def _pickle_folders(name: str, root: Path) -> list[Path]:
    return [root / ARCHIVES[name].base_folder, root]


def _parquet_folders(name: str, root: Path) -> list[Path]:
    return list(dict.fromkeys([root, root / "data", root / name, root / KINDS[name].hub_folder]))


def _missing_pickles(name: str, folder: Path) -> list[str]:
    files = [file for file, _ in ARCHIVES[name].train_list + ARCHIVES[name].test_list]
    return [file for file in files if not (folder / file).is_file()]


def _load_pickles(name: str, folder: Path, split: str) -> ArraySource:
    archive, kind = ARCHIVES[name], KINDS[name]
    files = archive.train_list if split == "train" else archive.test_list
    return read_pickles(folder, [(file, md5) for file, md5 in files], kind.pickle_labels, kind.num_classes)


def _load_parquet(name: str, found: dict[str, list[Path]], split: str) -> ArraySource:
    kind = KINDS[name]
    return read_parquet(found[split], kind.parquet_labels, kind.num_classes)


def _need_both(folder: Path, found: dict[str, list[Path]]) -> None:
    for split, paths in found.items():
        if not paths:
            raise DataError(f"{folder}: holds parquet files, but no {split}-*.parquet.")


def _not_found(name: str, root: Path) -> str:
    pickled = ", ".join(str(folder) for folder in _pickle_folders(name, root))
    parquet = ", ".join(str(folder) for folder in _parquet_folders(name, root))
    return (
        f"no {name} under {root}. Looked for the official files in {pickled}; "
        f"for train-*.parquet and test-*.parquet in {parquet}. "
        f"To fetch it: famba download {name} --root {root}"
    )
