"""Sources with random access behind timm's names: data sets of torchvision's, and of the Hugging Face hub."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from PIL import Image
from torchvision.datasets import INaturalist

from famba.data.images import decode_rgb, naming, read_file, to_rgb
from famba.data.reading import Colour
from famba.data.sources import check_label
from famba.errors import DataError


@dataclass(eq=False)
class HubSource:
    """Images behind timm's reader of hfds/, which hands out encoded files.

    timm's own ImageDataset takes the next image where one is broken, so this goes to the reader directly.
    background: as in `famba.data.images.to_rgb`.
    """

    reader: Any
    num_classes: int
    background: Colour | None

    def __len__(self) -> int:
        return len(self.reader)

    def image(self, index: int) -> Image.Image:
        """Return an RGB image; DataError naming its file where that is missing or corrupt."""
        with naming(lambda: self._where(index)), self.reader[index][0] as file:
            return decode_rgb(file, self.background)

    def label(self, index: int) -> int:
        """Return the label, without reading the image."""
        with naming(lambda: self._where(index)):
            label = int(self._labels[index])
        return check_label(label, self.num_classes, lambda: self._where(index))

    @cached_property
    def _labels(self) -> Any:
        return self.reader.dataset[self.reader.label_key][:]

    def _where(self, index: int) -> str:
        return str(self.reader.filename(index, absolute=True))


@dataclass(eq=False)
class DatasetSource:
    """A map-style data set of torchvision's, which gives (image, label) by number.

    background: as in `famba.data.images.to_rgb`.
    """

    dataset: Any
    num_classes: int
    background: Colour | None

    def __post_init__(self) -> None:
        if self.background is not None and hasattr(self.dataset, "loader"):
            # torchvision's own drops what is transparent, and how a camera was held.
            self.dataset.loader = partial(read_file, background=self.background)
        if self.background is not None and isinstance(self.dataset, INaturalist):
            self.dataset.index.sort()  # torchvision has it in the order of the disk

    def __len__(self) -> int:
        return len(self.dataset)

    def image(self, index: int) -> Image.Image:
        """Return an RGB image; DataError naming the data set and the number where it cannot be read."""
        with naming(lambda: self._where(index)):
            image = self.dataset[index][0]
            if isinstance(image, Image.Image):
                return to_rgb(image, self.background)
        raise DataError(f"{self._where(index)}: gives {type(image).__name__} where an image is needed.")

    def label(self, index: int) -> int:
        """Return the label, without reading the image where the data set lists its labels."""
        with naming(lambda: self._where(index)):
            label = int(self.dataset[index][1] if self._targets is None else self._targets[index])
        return check_label(label, self.num_classes, lambda: self._where(index))

    @cached_property
    def _targets(self) -> Any:
        if isinstance(self.dataset, INaturalist) and self.dataset.target_type == ["full"]:
            return [category for category, _ in self.dataset.index]
        return getattr(self.dataset, "targets", None)

    def _where(self, index: int) -> str:
        return f"{type(self.dataset).__name__} in {getattr(self.dataset, 'root', '?')}, image {index}"
