"""Images in the files of a folder, or in a tar file, read when they are needed."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
from PIL import Image

from famba.data.images import decode_rgb, naming
from famba.data.layout import Part
from famba.data.reading import Colour


@dataclass(frozen=True, eq=False)
class FileSource:
    """Images of a part of a data set. Each is opened anew, so no open file is shared with another process.

    Attributes:
        path: the folder or tar file that holds them.
        names: their paths in it.
        labels: int64 (n,).
        spans: first byte and size of each in the tar file, int64 (n, 2); None for a folder.
        num_classes: number of classes.
        background: as in `famba.data.images.to_rgb`.
    """

    path: Path
    names: list[str]
    labels: npt.NDArray[np.int64]
    spans: npt.NDArray[np.int64] | None
    num_classes: int
    background: Colour | None

    @classmethod
    def of(cls, part: Part, classes: tuple[str, ...], background: Colour | None) -> FileSource:
        """Return the images of a part; a class's number is its place among the names of all classes."""
        numbers = {name: number for number, name in enumerate(classes)}
        labels = np.array([numbers[entry.label] for entry in part.entries], dtype=np.int64)
        spans = [entry.span for entry in part.entries if entry.span is not None]
        return cls(
            part.path,
            [entry.name for entry in part.entries],
            labels,
            np.array(spans, dtype=np.int64) if spans else None,
            len(classes),
            background,
        )

    def __len__(self) -> int:
        return len(self.names)

    def image(self, index: int) -> Image.Image:
        """Return an RGB image; DataError naming its file where that is missing or corrupt."""
        with naming(lambda: self._where(index)), self._opened(index) as file:
            return decode_rgb(file, self.background)

    def label(self, index: int) -> int:
        """Return the label."""
        return int(self.labels[index])

    def _opened(self, index: int) -> IO[bytes]:
        if self.spans is None:
            return open(self.path / self.names[index], "rb")
        first, size = self.spans[index].tolist()
        with open(self.path, "rb") as file:
            file.seek(first)
            return io.BytesIO(file.read(size))

    def _where(self, index: int) -> str:
        name = self.names[index]
        return str(self.path / name) if self.spans is None else f"{self.path}, {name}"
