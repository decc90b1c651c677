"""Batches for training and evaluation."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from famba.data.augment import (
    Augmentation,
    BatchTransform,
    Normalize,
    Scaling,
    evaluation_scaling,
    images_transform,
    training_scaling,
)
from famba.data.draws import Stream
from famba.data.plan import MicroBatch, Plan, check_rank
from famba.data.sources import ArraySource, Source
from famba.data.stream_loader import StreamBatches, StreamEvaluation
from famba.data.streams import StreamSource
from famba.data.workers import Batch, Fetch, check_workers, fetch_all
from famba.errors import ConfigError


class TrainBatches(Protocol):
    """The training batches of one process."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps in every epoch."""

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[Batch, None, None]:
        """Yield the micro-batches of an epoch from a step on, `accumulation` for each step.

        Each is (images float32 (b, 3, s, s), labels int64 (b,)). Workers end with the generator, also when
        it is closed early.

        Raises:
            ConfigError: where there is no such step.
            DataError: on the way, where an image cannot be read.
        """


class ImagesTransform(Protocol):
    """Turns images at positions start, start + 1, ... into float32 (b, 3, s, s)."""

    def __call__(self, images: Iterable[Image.Image], epoch: int, start: int) -> torch.Tensor:
        """Transform images as they come."""


@dataclass(frozen=True)
class Batches:
    """Training batches of a source with random access; see `TrainBatches`."""

    plan: Plan
    fetch: Fetch
    workers: int
    pin_memory: bool

    @property
    def steps_per_epoch(self) -> int:
        """Steps in every epoch."""
        return self.plan.steps_per_epoch

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[Batch, None, None]:
        """Yield micro-batches, see `TrainBatches.epoch`."""
        self.plan.check_place(epoch, start_step)
        keys = self.plan.micro_batches(epoch, start_step)
        return fetch_all(self.fetch, keys, self.workers, pin_memory=self.pin_memory)


@dataclass(frozen=True)
class EvalBatches:
    """One process's share of a source, in order, each image once; see `eval_batches`."""

    fetch: Fetch
    indices: range
    batch_size: int
    workers: int
    pin_memory: bool

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return fetch_all(self.fetch, self._keys(), self.workers, pin_memory=self.pin_memory)

    def _keys(self) -> Iterator[MicroBatch]:
        for first in range(0, len(self.indices), self.batch_size):
            chosen = self.indices[first : first + self.batch_size]
            yield MicroBatch(epoch=0, start=chosen.start, indices=np.arange(chosen.start, chosen.stop))


@dataclass(frozen=True)
class _FromMemory:
    source: ArraySource
    transform: BatchTransform

    def __call__(self, key: MicroBatch) -> Batch:
        chosen = torch.from_numpy(key.indices)
        return self.transform(self.source.images[chosen], key.epoch, key.start), self.source.labels[chosen]


@dataclass(frozen=True)
class _FromImages:
    source: Source
    transform: ImagesTransform

    def __call__(self, key: MicroBatch) -> Batch:
        indices = key.indices.tolist()
        images = self.transform((self.source.image(index) for index in indices), key.epoch, key.start)
        return images, torch.tensor([self.source.label(index) for index in indices])


@dataclass(frozen=True)
class _Evaluated:
    source: Source
    scaling: Scaling
    normalize: Normalize

    def __call__(self, key: MicroBatch) -> Batch:
        if isinstance(self.source, ArraySource):
            chosen = torch.from_numpy(key.indices)
            return self.normalize(self.scaling.batch(self.source.images[chosen])), self.source.labels[chosen]
        indices = key.indices.tolist()
        images = torch.stack([self.scaling.image(self.source.image(index)) for index in indices])
        return self.normalize(images), torch.tensor([self.source.label(index) for index in indices])


def train_batches(
    source: Source | StreamSource,
    augmentation: Augmentation,
    *,
    image_size: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    seed: int,
    batch_size: int,
    accumulation: int,
    rank: int,
    world_size: int,
    workers: int,
    repeats: int,
    pin_memory: bool = False,
) -> TrainBatches:
    """Return the training batches of one process.

    What a step holds depends on (seed, epoch, step) and on the numbers below, never on what ran before, nor
    on `workers`; with `repeats` 1 and a source with random access, the processes together see the same
    images with the same augmentation however many they are.

    Args:
        source: the training images.
        augmentation: what they go through.
        image_size: pixels of the square images the model takes.
        mean: of the colours, in 0..1, taken off.
        std: of the colours, in 0..1, divided by.
        seed: of order and augmentation, non-negative.
        batch_size: images in one step of all processes; divisible by world_size * accumulation.
        accumulation: micro-batches per step.
        rank: number of this process.
        world_size: number of processes.
        workers: loading processes beside this one; images in memory with whole-batch augmentation need none.
        repeats: repeated augmentation, see `Plan`; 1 for none.
        pin_memory: page-locked results, where there is CUDA.

    Raises:
        ConfigError: where the numbers do not fit.
    """
    check_workers(workers)
    _check_size(image_size)
    plan = Plan(len(source), seed, batch_size, accumulation, rank, world_size, repeats)
    normalize = Normalize(tuple(mean), tuple(std))
    if isinstance(source, StreamSource):
        return StreamBatches(source, augmentation, image_size, normalize, plan, workers, pin_memory)
    stream, key = Stream.AUGMENTATION, (seed,)
    if augmentation.kind == "batch" and isinstance(source, ArraySource):
        scaling = training_scaling(augmentation, image_size)
        transform = BatchTransform(augmentation, scaling, normalize, stream, key)
        return Batches(plan, _FromMemory(source, transform), 0, pin_memory)
    images = images_transform(augmentation, image_size, normalize, stream, key)
    return Batches(plan, _FromImages(source, images), workers, pin_memory)


def eval_batches(
    source: Source | StreamSource,
    augmentation: Augmentation,
    *,
    image_size: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    batch_size: int,
    rank: int,
    world_size: int,
    workers: int,
    pin_memory: bool = False,
) -> Iterable[Batch]:
    """Return one process's share of the images, in order: each once over all processes, without padding.

    So the last batch may be smaller, and processes may have different numbers of batches, or none. It can
    be iterated repeatedly.

    Args:
        source: the images.
        augmentation: its `eval_crop` and `interpolation` are used.
        image_size: pixels of the square images the model takes.
        mean: of the colours, in 0..1, taken off.
        std: of the colours, in 0..1, divided by.
        batch_size: images in one batch of this process.
        rank: number of this process.
        world_size: number of processes.
        workers: loading processes beside this one; images in memory need none.
        pin_memory: page-locked results, where there is CUDA.

    Returns:
        Batches (images float32 (b, 3, s, s), labels int64 (b,)); iterating raises DataError where an image
        cannot be read.

    Raises:
        ConfigError: where the numbers do not fit.
    """
    check_workers(workers)
    _check_size(image_size)
    check_rank(rank, world_size)
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}, but must be at least 1.")
    normalize = Normalize(tuple(mean), tuple(std))
    scaling = evaluation_scaling(augmentation, image_size)
    if isinstance(source, StreamSource):
        return StreamEvaluation(source, scaling, normalize, batch_size, rank, world_size, workers, pin_memory)
    share = range(len(source) * rank // world_size, len(source) * (rank + 1) // world_size)
    in_memory = isinstance(source, ArraySource)
    fetch = _Evaluated(source, scaling, normalize)
    return EvalBatches(fetch, share, batch_size, 0 if in_memory else workers, pin_memory)


def _check_size(image_size: int) -> None:
    if image_size < 1:
        raise ConfigError(f"image_size is {image_size}, but must be at least 1 pixel.")
