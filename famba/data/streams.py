"""Data sets that timm reads as a stream, without random access (webdataset, tfds, hfids)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from PIL import Image
from timm.data import create_dataset

from famba.data.draws import Stream, derived_integer
from famba.data.images import naming, to_rgb
from famba.data.layout import image_suffixes
from famba.data.reading import Colour


@dataclass(frozen=True)
class StreamSource:
    """One split of a streamed data set.

    Attributes:
        name: timm's name, such as "wds/".
        root: where its files lie, or None where the reader needs no folder.
        split: the reader's name of the split.
        num_classes: number of classes.
        length: number of images; 0 where the data set does not say.
        background: as in `famba.data.images.to_rgb`.
    """

    name: str
    root: str | None
    split: str
    num_classes: int
    length: int
    background: Colour | None

    def __len__(self) -> int:
        return self.length

    def open_training(
        self, *, seed: int, epoch: int, micro_batch: int, rank: int, world_size: int
    ) -> Iterable[tuple[Any, Any]]:
        """Return one process's shuffled images, in RGB, and labels of an epoch.

        Call it where it is iterated: the reader asks torch which worker it is in. Shards go round the
        workers of all processes; a worker that has read all of its shards starts again, so that every one
        gives its share, rounded up to whole micro-batches.
        """
        shuffle = derived_integer(Stream.STREAMED_ORDER, seed, epoch, bits=31)
        dataset = self._create(is_training=True, batch_size=micro_batch, seed=shuffle)
        _set_place(dataset.reader, rank, world_size)
        dataset.set_epoch(epoch)
        return self._decoded(dataset)

    def open_evaluation(self) -> Iterable[tuple[Any, Any]]:
        """Return all images, in RGB, and labels in the order of the files (those of one worker, in a worker)."""
        dataset = self._create(is_training=False)
        # As one process: split over several, the readers would repeat or leave out images.
        _set_place(dataset.reader, 0, 1)
        return self._decoded(dataset)

    def _create(self, **options: Any) -> Any:
        if self.background is not None and not decodes_itself(self.name):
            options["input_img_mode"] = ""  # as it is stored
            if self.name.lower().startswith("wds/"):
                suffixes = sorted(suffix[1:] for suffix in image_suffixes())
                options["input_key"] = ";".join(dict.fromkeys(("jpg", "png", "webp", *suffixes)))
        return create_dataset(self.name, self.root, split=self.split, **options)

    def _decoded(self, dataset: Any) -> Iterator[tuple[Image.Image, Any]]:
        where = partial("{!r} in {}, split {}: an image".format, self.name, self.root, self.split)
        for image, label in dataset:
            with naming(where):
                rgb = to_rgb(image, self.background)
            yield rgb, label


def decodes_itself(name: str) -> bool:
    """Whether a reader's own package decodes the images, so that transparency and EXIF orientation are lost."""
    return name.lower().startswith("tfds/")


def _set_place(reader: Any, rank: int, world_size: int) -> None:
    # The readers take these from torch.distributed; here they are plain arguments.
    reader.dist_rank, reader.dist_num_replicas = rank, world_size
    reader.global_num_workers = world_size * reader.num_workers
