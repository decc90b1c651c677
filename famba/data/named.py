"""Open data sets of the Hugging Face hub, by timm's reader: hfds/NAME."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import create_dataset

from famba.data.images import Colour, Reading, decode_rgb, naming
from famba.data.sources import Labels, Source, Splits, check_labels, check_num_classes
from famba.errors import ConfigError, DataError, some

# Public data sets often have a "test" whose labels are secret.
_TEST_SPLITS = ("validation", "val", "valid", "test")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class HubSource:
    """Gives the images of timm's reader of the hub, whose own ImageDataset skips those that are broken."""

    reader: Any
    labels: Labels
    num_classes: int
    background: Colour | None  # as in `images.to_rgb`

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """Return an RGB image; DataError naming its file where it cannot be read."""
        with naming(lambda: self.reader.filename(index, absolute=True)), self.reader[index][0] as file:
            return decode_rgb(file, self.background)


def load_named(name: str, root: Path | None, num_classes: int | None, reading: Reading) -> Splits:
    """Open a data set of the hub by its name after "hfds/".

    root: the cache; None for that of the hub's own. num_classes is None where the data set tells it. The test set is
    the first of `_TEST_SPLITS` that exists. Raises ConfigError for a number of classes that is missing or wrong;
    DataError where timm cannot open the data, or training and test images have other classes.
    """
    train, classes = _open(name, root, ("train",), num_classes, reading)
    test, others = _open(name, root, _TEST_SPLITS, num_classes, reading)
    if classes != others:
        said = f"{some(classes)} in training, and {some(others)} in the test set"
        raise DataError(f"data {name!r} in {root}: its parts have other classes, or in another order: {said}.")
    return Splits(train=train, validation=None, test=test, classes=classes or None)


def _open(
    name: str, root: Path | None, splits: tuple[str, ...], num_classes: int | None, reading: Reading
) -> tuple[Source, tuple[str, ...]]:
    """Return the images of the first split that exists, and the names of their classes, none where it has none."""
    reasons: list[str] = []
    for split in splits:
        try:
            reader = create_dataset(name, None if root is None else str(root), split=split).reader
            break
        except Exception as error:  # the reader and the packages behind it raise all kinds
            reasons.append(f"{split}: {str(error) or type(error).__name__}")
    else:
        raise DataError(f"data {name!r} in {root} cannot be opened ({'; '.join(reasons)}).")
    if reasons:
        _log.warning("%r: split %r is the test set, since others cannot be opened: %s", name, split, reasons[0])
    classes = tuple(sorted(reader.class_to_idx, key=reader.class_to_idx.__getitem__))
    check_num_classes(num_classes, len(classes) or None, repr(name))
    count = len(classes) or num_classes
    if not count:
        raise ConfigError(f"data {name!r} does not say how many classes it has: set num_classes.", "num_classes")
    labels = np.asarray(reader.dataset[reader.label_key][:])
    labels = check_labels(labels, count, lambda index: reader.filename(index, absolute=True))
    return HubSource(reader, labels, count, reading.colour), classes
