"""CIFAR-10 and CIFAR-100, from the official pickles or from parquet files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

from famba.data.download import ARCHIVES, default_root, download
from famba.data.parquet import class_names, read_parquet, shards
from famba.data.pickles import read_names, read_pickles
from famba.data.reading import Colour
from famba.data.sources import ArraySource, Splits
from famba.errors import DataError


@dataclass(frozen=True)
class _Kind:
    num_classes: int
    pickle_labels: str  # entry of the pickled dictionary
    parquet_labels: tuple[str, ...]
    hub_folder: str  # where the hub's repository keeps its parquet files


_Load: TypeAlias = Callable[[str], ArraySource]
_Names: TypeAlias = Callable[[], tuple[str, ...] | None]

KINDS = {
    "cifar10": _Kind(10, "labels", ("label",), "plain_text"),
    "cifar100": _Kind(100, "fine_labels", ("fine_label", "label"), "cifar100"),
}
TRAINING_IMAGES = 50_000


def load_cifar(name: str, root: Path | None, background: Colour | None) -> Splits:
    """Load CIFAR into memory as uint8 (n, 3, 32, 32).

    Args:
        name: "cifar10" or "cifar100".
        root: folder that holds the data in any of the known layouts; a folder that is given is never
            downloaded into. None: `default_root()`, with a download where the data is missing.

        background: what lies behind transparent images of parquet files, as in `famba.data.images.to_rgb`.

    Raises:
        DataError: where data is missing, incomplete or damaged, naming the file (and row).
    """
    folder = default_root() if root is None else root
    if root is None and not _placed_by_hand(name, folder):
        # Checks what is there under a lock, so that a download in another process is never seen half done.
        download(name, folder)
    load, classes = _find(name, folder, background)
    return Splits(train=load("train"), validation=None, test=load("test"), classes=classes())


def check_folder(name: str, root: Path) -> None:
    """Raise DataError where a folder holds CIFAR in none of the known layouts; its files are not read."""
    _find(name, root, None)


def _placed_by_hand(name: str, root: Path) -> bool:
    """Whether the data lies where no download puts it."""
    return not _missing_pickles(name, root) or any(shards(f, "train") for f in _parquet_folders(name, root))


def _find(name: str, root: Path, background: Colour | None) -> tuple[_Load, _Names]:
    """Return what loads a split by its name, and what reads the classes' names. DataError where no layout fits."""
    kind = KINDS[name]
    for folder in _pickle_folders(name, root):
        missing = _missing_pickles(name, folder)
        if not missing:
            meta = ARCHIVES[name].meta
            names = partial(read_names, folder / meta["filename"], meta["key"], kind.num_classes)
            return partial(_load_pickles, name, folder), names
        if folder != root and folder.is_dir():
            raise DataError(f"{folder}: {', '.join(missing)} of {name} is missing. Fetch the data again.")
    for folder in _parquet_folders(name, root):
        found = {split: shards(folder, split) for split in ("train", "test")}
        if any(found.values()):
            _need_both(folder, found)
            names = partial(_names_in_parquet, kind, found)
            return partial(_load_parquet, kind, found, background), names
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


def _load_parquet(kind: _Kind, found: dict[str, list[Path]], background: Colour | None, split: str) -> ArraySource:
    return read_parquet(found[split], kind.parquet_labels, kind.num_classes, background)


def _names_in_parquet(kind: _Kind, found: dict[str, list[Path]]) -> tuple[str, ...] | None:
    """Return the names of the classes where the files tell them. Raises DataError where they differ."""
    known: tuple[str, ...] | None = None
    for path in (path for paths in found.values() for path in paths):
        names = class_names(path, kind.parquet_labels)
        if names is None:
            continue
        if len(names) != kind.num_classes or names != (known or names):
            raise DataError(
                f"{path}: names {len(names)} classes, which are not the {kind.num_classes} of this data set in the "
                "order of the files before it. Fetch it again."
            )
        known = names
    return known


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
