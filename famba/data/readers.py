"""Sources with random access that timm or torchvision reads: image folders, tar files, named data sets."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from famba.data.images import decode_rgb, naming
from famba.data.sources import check_label
from famba.errors import DataError


@dataclass(eq=False)
class ReaderSource:
    """Images behind one of timm's readers.

    timm's own ImageDataset takes the next image where one is broken, so this goes to the reader directly.
    """

    reader: Any
    num_classes: int
    _pid: int = field(default_factory=os.getpid, repr=False)

    def __len__(self) -> int:
        return len(self.reader)

    def __getstate__(self) -> dict[str, Any]:
        _forget_open_tars(self.reader)  # an open file does not travel to another process
        return self.__dict__

    def image(self, index: int) -> Image.Image:
        """Return an RGB image; DataError naming its file where that is missing or corrupt."""
        with naming(lambda: self._where(index)), self._read(index)[0] as file:
            return decode_rgb(file)

    def label(self, index: int) -> int:
        """Return the label, without reading the image where the reader knows it."""
        samples, targets = getattr(self.reader, "samples", None), getattr(self.reader, "targets", None)
        if targets is not None:  # tar files
            label = int(targets[index])
        elif samples is not None:  # image folders
            label = int(samples[index][1])
        else:
            with naming(lambda: self._where(index)):
                label = int(self._read(index)[1])
        return check_label(label, self.num_classes, lambda: self._where(index))

    def _read(self, index: int) -> tuple[Any, Any]:
        if self._pid != os.getpid():
            # A forked worker shares the parent's file handles and with them the place in the file.
            _forget_open_tars(self.reader)
            self._pid = os.getpid()
        file, label, *_ = self.reader[index]
        return file, label

    def _where(self, index: int) -> str:
        name = str(self.reader.filename(index, absolute=True))
        root = str(getattr(self.reader, "root", "") or "")
        return f"{root}, {name}" if root.endswith(".tar") else name


@dataclass(eq=False)
class DatasetSource:
    """A map-style data set of torchvision's, which gives (image, label) by number."""

    dataset: Any
    num_classes: int

    def __len__(self) -> int:
        return len(self.dataset)

    def image(self, index: int) -> Image.Image:
        """Return an RGB image; DataError naming the data set and the number where it cannot be read."""
        with naming(lambda: self._where(index)):
            image = self.dataset[index][0]
        if not isinstance(image, Image.Image):
            raise DataError(f"{self._where(index)}: gives {type(image).__name__} where an image is needed.")
        return image.convert("RGB")

    def label(self, index: int) -> int:
        """Return the label, without reading the image where the data set lists its labels."""
        targets = getattr(self.dataset, "targets", None)
        with naming(lambda: self._where(index)):
            label = int(self.dataset[index][1] if targets is None else targets[index])
        return check_label(label, self.num_classes, lambda: self._where(index))

    def _where(self, index: int) -> str:
        return f"{type(self.dataset).__name__} in {getattr(self.dataset, 'root', '?')}, image {index}"


def _forget_open_tars(reader: Any) -> None:
    """Make a reader of tar files open them anew."""
    state = getattr(reader, "tar_state", None)
    if state is None:
        return
    for tar in state.values() if isinstance(state, dict) else [state]:
        tar.reset()
        for child in tar.children.values():
            child.reset()
