"""Hold labelled images by number: in memory, in files, or a part of either."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torchvision.transforms import functional as vision

from famba.data.draws import Stream, permutation
from famba.errors import ConfigError, DataError

Labels = npt.NDArray[np.int64]


class Source(Protocol):
    """Gives labelled images by number."""

    @property
    def num_classes(self) -> int:
        """Return the number of classes."""

    @property
    def labels(self) -> Labels | torch.Tensor:
        """Return the labels, int64 (n,), in 0 .. num_classes - 1; DataError where one is out of range."""

    def __len__(self) -> int: ...

    def image(self, index: int) -> Image.Image:
        """Return an RGB image; DataError naming the file (and row) where it is corrupt."""


@dataclass(frozen=True)
class Splits:
    """Holds the parts of a data set, all with the same class numbers."""

    train: Source
    validation: Source | None  # None unless it was held out or comes with the data
    test: Source
    classes: tuple[str, ...] | None = None  # names in the order of their numbers; None where the data does not tell


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Holds images in memory: images uint8 (n, 3, h, w), labels int64 (n,). Raises DataError for anything else."""

    images: torch.Tensor
    labels: torch.Tensor
    num_classes: int

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4 or self.images.shape[1] != 3:
            raise DataError(f"images must be uint8 (n, 3, h, w), not {self.images.dtype} {tuple(self.images.shape)}.")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            found = f"{self.labels.dtype} {tuple(self.labels.shape)}"
            raise DataError(f"labels must be int64 ({len(self.images)},), not {found}.")
        check_labels(self.labels.cpu().numpy(), self.num_classes, "image {}".format)

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """Return one image as RGB."""
        return vision.to_pil_image(self.images[index])


@dataclass(frozen=True, eq=False)
class LazySource:
    """Gives images that are read when they are wanted: each is opened anew, so processes share no open file."""

    read: Callable[[Any], Image.Image]  # key to RGB image; DataError naming its file where it cannot be read
    keys: Sequence[Any]  # n, such as the paths of files
    labels: Labels  # (n,)
    num_classes: int

    def __len__(self) -> int:
        return len(self.keys)

    def image(self, index: int) -> Image.Image:
        """Return an RGB image; DataError naming its file where that is missing or corrupt."""
        return self.read(self.keys[index])


def take(source: Source, indices: npt.NDArray[np.int64]) -> Source:
    """Return the images at `indices` (int64 (n,)), in that order; an ArraySource stays one."""
    if isinstance(source, ArraySource):
        return ArraySource(source.images[indices], source.labels[indices], source.num_classes)
    return LazySource(source.image, indices.tolist(), labels_of(source)[indices], source.num_classes)


def renumber(source: Source, numbers: tuple[int, ...], num_classes: int) -> Source:
    """Return the images with class i numbered `numbers[i]`, below `num_classes`; an ArraySource stays one."""
    labels = np.array(numbers, dtype=np.int64)[labels_of(source)]
    if isinstance(source, ArraySource):
        return ArraySource(source.images, torch.from_numpy(labels), num_classes)
    return LazySource(source.image, range(len(source)), labels, num_classes)


def labels_of(source: Source) -> Labels:
    """Return the labels of all images, int64 (n,); DataError where one is out of range."""
    return torch.as_tensor(source.labels).cpu().numpy()


def check_labels(labels: Labels, num_classes: int, where: Callable[[int], str]) -> Labels:
    """Return the labels, or raise DataError saying `where` the first wrong one was found, by its place."""
    for place in np.flatnonzero((labels < 0) | (labels >= num_classes))[:1].tolist():
        raise DataError(f"{where(place)}: label {labels[place]} is not in 0..{num_classes - 1}.")
    return labels


def check_num_classes(given: int | None, found: int | None, name: str) -> None:
    """Raise ConfigError where a number of classes is given that is not the one found in the data of that name."""
    if None not in (given, found) and given != found:
        raise ConfigError(f"num_classes is {given}, but {name} has {found} classes.", "num_classes")


def balanced_order(labels: Labels, stream: Stream) -> npt.NDArray[np.int64]:
    """Order images, by int64 (n,) labels, so that the first of them, however many, hold every class in proportion.

    The order within a class is drawn for `stream` and depends on no seed. The j-th of a class's n images gets the place
    (j + 0.5) / n; of equal places, lower class numbers come first. Returns indices, int64 (n,).
    """
    places = np.empty(len(labels))
    by_class = np.argsort(labels, kind="stable")
    numbers, starts = np.unique(labels[by_class], return_index=True)
    for number, own in zip(numbers.tolist(), np.split(by_class, starts[1:]), strict=True):
        places[own[permutation(stream, number, 0, len(own))]] = (np.arange(len(own)) + 0.5) / len(own)
    return np.lexsort((labels, places))


def sample(source: Source, images: int, version: int) -> Source:
    """Return a fixed sample of so many images, at most all, in the order of the source.

    A smaller sample lies in a larger one. version: 2; 1 for images that are evenly spaced, as Famba 0.1 took them.
    """
    if version == 1:
        return take(source, np.arange(images) * len(source) // images)
    return take(source, np.sort(balanced_order(labels_of(source), Stream.SUBSET)[:images]))
