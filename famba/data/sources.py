"""What a data set is to the rest of the project: labelled images by number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torchvision.transforms import functional as vision

from famba.errors import DataError

if TYPE_CHECKING:
    from famba.data.streams import StreamSource


@runtime_checkable
class Source(Protocol):
    """A set of labelled images with random access."""

    @property
    def num_classes(self) -> int:
        """Labels lie in 0 .. num_classes - 1."""

    def __len__(self) -> int: ...

    def image(self, index: int) -> Image.Image:
        """Return an RGB image; DataError naming the file (and row) where it is corrupt."""

    def label(self, index: int) -> int:
        """Return the label; DataError where it is out of range."""


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Images held in memory.

    Attributes:
        images: uint8 (n, 3, h, w).
        labels: int64 (n,), in 0 .. num_classes - 1.
    """

    images: torch.Tensor
    labels: torch.Tensor
    num_classes: int

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4 or self.images.shape[1] != 3:
            found = f"{self.images.dtype} {tuple(self.images.shape)}"
            raise DataError(f"images must be uint8 (n, 3, h, w), not {found}.")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            found = f"{self.labels.dtype} {tuple(self.labels.shape)}"
            raise DataError(f"labels must be int64 ({len(self.images)},), not {found}.")
        wrong = torch.nonzero((self.labels < 0) | (self.labels >= self.num_classes)).flatten()
        if len(wrong):
            index = int(wrong[0])
            check_label(int(self.labels[index]), self.num_classes, lambda: f"image {index}")

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """Return one image as RGB."""
        return vision.to_pil_image(self.images[index])

    def label(self, index: int) -> int:
        """Return one label."""
        return int(self.labels[index])


@dataclass(frozen=True, eq=False)
class SubsetSource:
    """Some images of a source that is not in memory, in the order of `indices` (int64 (n,))."""

    source: Source
    indices: npt.NDArray[np.int64]

    @property
    def num_classes(self) -> int:
        """As in the whole source."""
        return self.source.num_classes

    def __len__(self) -> int:
        return len(self.indices)

    def image(self, index: int) -> Image.Image:
        """Return an RGB image; DataError as in the whole source."""
        return self.source.image(int(self.indices[index]))

    def label(self, index: int) -> int:
        """Return the label; DataError as in the whole source."""
        return self.source.label(int(self.indices[index]))


@dataclass(frozen=True)
class Splits:
    """The parts of a data set, all with the same class numbers.

    Attributes:
        validation: None unless it was held out or comes with the data.
        classes: names in the order of the class numbers; None where the data does not tell them.
    """

    train: Source | StreamSource
    validation: Source | StreamSource | None
    test: Source | StreamSource
    classes: tuple[str, ...] | None = None


def take(source: Source, indices: npt.NDArray[np.int64]) -> Source:
    """Return the images at `indices` (int64 (n,)), in that order; an ArraySource stays one."""
    if isinstance(source, ArraySource):
        chosen = torch.from_numpy(indices)
        return ArraySource(source.images[chosen], source.labels[chosen], source.num_classes)
    return SubsetSource(source, indices)


@dataclass(frozen=True, eq=False)
class RenumberedSource:
    """A source whose classes have other numbers: class i has the number `numbers[i]`, below `num_classes`."""

    source: Source
    numbers: tuple[int, ...]
    num_classes: int

    def __len__(self) -> int:
        return len(self.source)

    def image(self, index: int) -> Image.Image:
        """Return an RGB image; DataError as in the source."""
        return self.source.image(index)

    def label(self, index: int) -> int:
        """Return the class's other number; DataError as in the source."""
        return self.numbers[self.source.label(index)]


def renumber(source: Source, numbers: tuple[int, ...], num_classes: int) -> Source:
    """Return the images with class i numbered `numbers[i]`, below `num_classes`; an ArraySource stays one."""
    if isinstance(source, ArraySource):
        return ArraySource(source.images, torch.tensor(numbers)[source.labels], num_classes)
    return RenumberedSource(source, numbers, num_classes)


def labels_of(source: Source) -> npt.NDArray[np.int64]:
    """Return the labels of all images, int64 (n,); DataError where one is out of range."""
    if isinstance(source, ArraySource):
        return source.labels.numpy()
    if isinstance(source, SubsetSource):
        return labels_of(source.source)[source.indices]
    return np.fromiter((source.label(index) for index in range(len(source))), np.int64, len(source))


def check_label(label: int, num_classes: int, where: Callable[[], str]) -> int:
    """Return the label, or raise DataError saying `where` it was found."""
    if not 0 <= label < num_classes:
        raise DataError(f"{where()}: label {label} is not in 0..{num_classes - 1} ({num_classes} classes).")
    return label
