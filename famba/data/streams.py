"""Read webdatasets (wds/) with timm: streams of tar files, without random access.

A stream has no order that could be produced from the middle: its shuffling comes from (seed, epoch, rank, worker), and
a start in mid-epoch reads what lies before and drops it. So a run on a stream repeats and resumes exactly with the same
number of processes and workers, and not with another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset

from famba.data.augment import Transform
from famba.data.draws import Stream, derived_integer
from famba.data.folders import image_suffixes
from famba.data.images import Colour, naming, to_rgb
from famba.data.sampler import EpochSampler
from famba.data.sources import check_labels
from famba.errors import DataError


@dataclass(frozen=True)
class StreamSource:
    """Opens one split of a webdataset."""

    name: str  # "wds/"
    root: str
    split: str  # the reader's name of the split
    num_classes: int
    length: int  # number of images; 0 where the data set does not say
    background: Colour | None  # as in `images.to_rgb`

    def __len__(self) -> int:
        return self.length

    def images(self, rank: int = 0, world_size: int = 1, **options: Any) -> Iterator[tuple[Image.Image, int]]:
        """Yield one process's images, in RGB, and labels: in the order of the files, or as timm's options say.

        Call it where it is iterated: the reader asks torch which worker it is in. In training, a worker that has read
        all of its shards starts again, so that every one gives its share, rounded up to whole batches. Raises DataError
        for an image that cannot be converted or a label out of range.
        """
        if self.background is not None:
            suffixes = sorted(suffix[1:] for suffix in image_suffixes())
            keys = ";".join(dict.fromkeys(("jpg", "png", "webp", *suffixes)))
            options |= {"input_img_mode": "", "input_key": keys}  # every format, as it is stored
        dataset = create_dataset(self.name, self.root, split=self.split, **options)
        # The reader takes these from torch.distributed; here they are plain arguments.
        reader = dataset.reader
        reader.dist_rank, reader.dist_num_replicas = rank, world_size
        reader.global_num_workers = world_size * reader.num_workers
        where = f"{self.name!r} in {self.root}, split {self.split}: an image"
        for image, label in dataset:
            with naming(where.__str__):
                rgb = to_rgb(image, self.background)
            yield rgb, int(check_labels(np.array([label]), self.num_classes, lambda _: where)[0])


def training_share(
    source: StreamSource,
    transform: Transform,
    sampler: EpochSampler,
    epoch: int,
    start_step: int,
    worker: int,
    workers: int,
) -> Iterator[tuple[torch.Tensor, torch.Tensor] | None]:
    """Yield a worker's batches of an epoch, None for those before the first step. Raises DataError without a file."""
    skipped, wanted = (steps * sampler.accumulation for steps in (start_step, sampler.steps_per_epoch))
    size, shuffle = sampler.micro_batch, derived_integer(Stream.STREAMED_ORDER, sampler.seed, epoch, bits=31)
    samples = source.images(sampler.rank, sampler.world_size, is_training=True, batch_size=size, seed=shuffle)
    for number in range(worker, wanted, workers):
        chunk = list(islice(samples, size))
        if len(chunk) < size:
            most = f"at most (files / {sampler.world_size} processes) workers"
            raise DataError(f"{source.name!r} is too short: every worker needs a file of its own, so use {most}.")
        yield None if number < skipped else _batch(transform, chunk, epoch, sampler.start(number))


def evaluation_share(
    source: StreamSource, transform: Transform, batch_size: int, rank: int, world_size: int, worker: int, workers: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield a worker's batches of all images. Every process reads all: the reader would repeat or leave out some."""
    samples = islice(source.images(), rank, None, world_size)
    while chunk := list(islice(samples, batch_size)):
        yield _batch(transform, chunk, 0, 0)


def _batch(
    transform: Transform, chunk: list[tuple[Image.Image, int]], epoch: int, start: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return transform((image for image, _ in chunk), epoch, start), torch.tensor([label for _, label in chunk])
