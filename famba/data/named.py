"""Open the data sets that timm knows by a name with a prefix: torch/, hfds/, hfids/, tfds/ and wds/."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import create_dataset
from timm.data.readers.reader import Reader
from torchvision.datasets import INaturalist

from famba.data.draws import Stream, derived_integer
from famba.data.folders import image_suffixes
from famba.data.images import Colour, Reading, decode_rgb, naming, read_file, to_rgb
from famba.data.sources import Labels, Source, Splits, check_labels, check_num_classes
from famba.errors import ConfigError, DataError, near_miss

PREFIXES = ("torch", "hfds", "hfids", "tfds", "wds")
_STREAMED = ("hfids", "tfds", "wds")
_TEST_SPLITS = {1: ("validation", "val", "test"), 2: ("validation", "val", "valid", "test")}
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class NamedSource:
    """Gives the images of a data set of torchvision's, or of timm's reader of hfds/.

    timm's own ImageDataset takes the next image where one is broken, so this goes to the reader directly.
    """

    dataset: Any  # (image, label) by number; a reader has (file, label)
    num_classes: int
    background: Colour | None  # as in `images.to_rgb`

    def __post_init__(self) -> None:
        if self.background is not None and hasattr(self.dataset, "loader"):
            # torchvision's own drops transparency and orientation.
            self.dataset.loader = partial(read_file, background=self.background)
        if self.background is not None and isinstance(self.dataset, INaturalist):
            self.dataset.index.sort()  # torchvision has it in the order of the disk

    def __len__(self) -> int:
        return len(self.dataset)

    def image(self, index: int) -> Image.Image:
        """Return an RGB image; DataError naming its file, or data set and number, where it cannot be read."""
        image = self._read(index)[0]
        with naming(lambda: self._where(index)):
            if isinstance(image, Image.Image):
                return to_rgb(image, self.background)
            with image as file:
                return decode_rgb(file, self.background)

    @cached_property
    def labels(self) -> Labels:
        """Return the labels, int64 (n,), without reading the images where the data set lists them."""
        if isinstance(self.dataset, Reader):
            found = self.dataset.dataset[self.dataset.label_key][:]  # type: ignore[attr-defined]
        elif isinstance(self.dataset, INaturalist) and self.dataset.target_type == ["full"]:
            found = [category for category, _ in self.dataset.index]
        else:
            found = getattr(self.dataset, "targets", None)
        if np.ndim(found) != 1:  # QMNIST's are rows of facts, whose first one it gives
            found = [self._read(index)[1] for index in range(len(self))]
        try:
            return check_labels(np.asarray(found, dtype=np.int64), self.num_classes, self._where)
        except (TypeError, ValueError) as error:
            raise DataError(f"{self._where(0)} and others: labels must be whole numbers ({error}).") from error

    def _read(self, index: int) -> Any:
        with naming(lambda: self._where(index)):
            return self.dataset[index]

    def _where(self, index: int) -> str:
        if isinstance(self.dataset, Reader):
            return str(self.dataset.filename(index, absolute=True))
        return f"{type(self.dataset).__name__} in {getattr(self.dataset, 'root', '?')}, image {index}"


@dataclass(frozen=True)
class StreamSource:
    """Opens one split of a data set that timm reads as a stream, without random access (webdataset, tfds, hfids)."""

    name: str  # timm's, such as "wds/"
    root: str | None  # None where the reader needs no folder
    split: str  # the reader's name of the split
    num_classes: int
    length: int  # number of images; 0 where the data set does not say
    background: Colour | None  # as in `images.to_rgb`

    def __len__(self) -> int:
        return self.length

    def open_training(
        self, seed: int, epoch: int, micro_batch: int, rank: int, world_size: int
    ) -> Iterable[tuple[Image.Image, Any]]:
        """Return one process's shuffled images, in RGB, and labels of an epoch.

        Call it where it is iterated: the reader asks torch which worker it is in. A worker that has read all of its
        shards starts again, so that every one gives its share, rounded up to whole micro-batches.
        """
        shuffle = derived_integer(Stream.STREAMED_ORDER, seed, epoch, bits=31)
        dataset = self._create(rank, world_size, is_training=True, batch_size=micro_batch, seed=shuffle)
        dataset.set_epoch(epoch)
        return self._decoded(dataset)

    def open_evaluation(self) -> Iterable[tuple[Image.Image, Any]]:
        """Return all images, in RGB, and labels in the order of the files (those of one worker, in a worker)."""
        # As one process: split over several, the readers would repeat or leave out images.
        return self._decoded(self._create(0, 1, is_training=False))

    def where(self) -> str:
        """Name the split in errors."""
        return f"{self.name!r} in {self.root}, split {self.split}"

    def _create(self, rank: int, world_size: int, **options: Any) -> Any:
        if self.background is not None and _prefix(self.name) != "tfds":
            options["input_img_mode"] = ""  # as it is stored
            if _prefix(self.name) == "wds":
                suffixes = sorted(suffix[1:] for suffix in image_suffixes())
                options["input_key"] = ";".join(dict.fromkeys(("jpg", "png", "webp", *suffixes)))
        dataset = create_dataset(self.name, self.root, split=self.split, **options)
        # The readers take these from torch.distributed; here they are plain arguments.
        reader = dataset.reader
        reader.dist_rank, reader.dist_num_replicas = rank, world_size
        reader.global_num_workers = world_size * reader.num_workers
        return dataset

    def _decoded(self, dataset: Any) -> Iterator[tuple[Image.Image, Any]]:
        for image, label in dataset:
            with naming(lambda: f"{self.where()}: an image"):
                rgb = to_rgb(image, self.background)
            yield rgb, label


def load_named(name: str, root: Path | None, *, num_classes: int | None, reading: Reading) -> Splits:
    """Open a data set by timm's name, such as "torch/cifar10" or "wds/"; nothing is downloaded by Famba.

    root is where the data lies; hfds, hfids and tfds use their own cache where it is None. num_classes is None where
    the data set tells it. The test set is the first of `_TEST_SPLITS` that exists: public data sets often have a "test"
    whose labels are secret.

    Raises ConfigError for a number of classes that is missing or wrong; DataError where timm cannot open the data, or
    training and test images have other classes.
    """
    if reading.version > 1 and _prefix(name) == "tfds":
        _log.warning("%r: TensorFlow decodes these images, and drops transparency and EXIF orientation", name)
    folder = None if root is None else str(root)
    train, classes = _open(name, folder, ("train",), num_classes, reading)
    test, others = _open(name, folder, _TEST_SPLITS[reading.version], num_classes or train.num_classes, reading)
    if classes and others and classes != others:
        pairs = enumerate(zip_longest(classes, others))
        number, (one, other) = next((number, pair) for number, pair in pairs if pair[0] != pair[1])
        differ = f"class {number} is {one!r} in training and {other!r} in the test set"
        raise DataError(f"data {name!r} in {root}: its parts have other classes, or in another order: {differ}.")
    for part in (train, test):
        check_num_classes(num_classes, part.num_classes, repr(name))
    return Splits(train=train, validation=None, test=test, classes=classes)


def check_named(name: str, root: Path | str | None) -> None:
    """Raise ConfigError for an unknown prefix or a missing root."""
    prefix = _prefix(name)
    if prefix not in PREFIXES:
        known = ", ".join(f"{known}/" for known in PREFIXES)
        raise ConfigError(f"data {name!r}: unknown prefix, known are {known}{near_miss(prefix, PREFIXES)}.", "name")
    if root is None and needs_root(name):
        raise ConfigError(f"data {name!r} needs data.root, the folder that holds it.", "root")


def needs_root(name: str) -> bool:
    """Say whether a name with a prefix is read from a folder that has to be there."""
    return _prefix(name) in ("torch", "wds")


def _prefix(name: str) -> str:
    return name.partition("/")[0].lower()


def _open(
    name: str, root: str | None, splits: tuple[str, ...], num_classes: int | None, reading: Reading
) -> tuple[Source | StreamSource, tuple[str, ...] | None]:
    """Return the images of the first split that exists, and the names of their classes where it tells them."""
    streamed, reasons = _prefix(name) in _STREAMED, []
    for split in splits:
        try:
            # Only the training stream must know its length.
            dataset = create_dataset(name, root, split=split, is_training=streamed and split == "train")
            break
        except Exception as error:  # the readers and the packages behind them raise all kinds
            reasons.append(f"{split}: {str(error) or type(error).__name__}")
    else:
        raise DataError(f"data {name!r} in {root} cannot be opened ({'; '.join(reasons)}).")
    if reasons:
        _log.warning("%r: split %r is the test set, since others cannot be opened: %s", name, split, reasons[0])
    reader = getattr(dataset, "reader", None)
    numbers = getattr(reader, "class_to_idx", None)
    found = sorted(numbers, key=numbers.__getitem__) if numbers else getattr(dataset, "classes", None) or ()
    # ImageNet has several names for a class.
    classes = tuple(one if isinstance(one, str) else ", ".join(one) for one in found)
    count = len(classes) or num_classes
    if not count:
        raise ConfigError(f"data {name!r} does not say how many classes it has: set num_classes.", "num_classes")
    if streamed:
        length = int(dataset.reader.num_samples or 0)
        return StreamSource(name, root, split, count, length, reading.colour), classes or None
    return NamedSource(dataset if reader is None else reader, count, reading.colour), classes or None
