"""Load batches for training and evaluation, in this process or in workers, with the same result and the same errors.

A stream has no order that could be produced from the middle: its shuffling comes from (seed, epoch, rank, worker), and
a start in mid-epoch reads what lies before and drops it. So a run on a stream repeats and resumes exactly with the same
number of processes and workers, and not with another.
"""

from __future__ import annotations

import signal
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from famba.data.augment import (
    Augmentation,
    EvaluationTransform,
    Normalize,
    Transform,
    evaluation_scaling,
    training_transform,
)
from famba.data.draws import Stream, derived_integer
from famba.data.named import StreamSource
from famba.data.sampler import EpochSampler, MicroBatch, check_rank
from famba.data.sources import ArraySource, Source, check_label
from famba.errors import ConfigError, DataError, FambaError

Batch: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""Images, float32 (b, 3, s, s), and labels, int64 (b,)."""

_TIME_TO_SAVE_S = 60


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

    What a step holds depends on (seed, epoch, step) and on the numbers below, never on what ran before, nor on
    `workers`; with `repeats` 1 and a source with random access, the processes together see the same images with the
    same augmentation however many they are.

    image_size is the side in pixels of the images that the model takes; mean and std are of the colours, in 0..1. The
    seed is that of order and augmentation; seed, batch_size, accumulation, rank, world_size and repeats are as in
    `EpochSampler`. workers are loading processes beside this one; images in memory with whole-batch augmentation need
    none. pin_memory gives page-locked results, where there is CUDA.

    Raises ConfigError where the numbers do not fit.
    """
    _check(workers=(workers, 0), image_size=(image_size, 1))
    sampler = EpochSampler(len(source), seed, batch_size, accumulation, rank, world_size, repeats)
    transform = partial(training_transform, augmentation, image_size, Normalize(tuple(mean), tuple(std)))
    if isinstance(source, StreamSource):
        return StreamBatches(sampler, Workers(workers, pin_memory), source, transform)
    in_memory = augmentation.kind == "batch" and isinstance(source, ArraySource)
    fetch = _Fetch(source, transform(Stream.AUGMENTATION, (seed,)))
    return Batches(sampler, Workers(0 if in_memory else workers, pin_memory), fetch)


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

    So the last batch may be smaller, and processes may have different numbers of batches, or none. It can be iterated
    repeatedly, which raises DataError where an image cannot be read.

    `eval_crop` and `interpolation` are used of the augmentation; batch_size is that of this process; the other
    arguments and errors are as in `train_batches`.
    """
    _check(workers=(workers, 0), image_size=(image_size, 1), batch_size=(batch_size, 1))
    check_rank(rank, world_size)
    scaling = evaluation_scaling(augmentation, image_size)
    transform = EvaluationTransform(scaling, Normalize(tuple(mean), tuple(std)))
    if isinstance(source, StreamSource):
        return StreamEvaluation(source, transform, batch_size, rank, world_size, Workers(workers, pin_memory))
    share = range(len(source) * rank // world_size, len(source) * (rank + 1) // world_size)
    needed = Workers(0 if isinstance(source, ArraySource) else workers, pin_memory)
    return EvalBatches(_Fetch(source, transform), share, batch_size, needed)


def _check(**numbers: tuple[int, int]) -> None:
    """Raise ConfigError for a number that is below its limit."""
    for name, (number, least) in numbers.items():
        if number < least:
            raise ConfigError(f"{name} is {number}, but must be at least {least}.", name)


@dataclass(frozen=True)
class Workers:
    """Loads in `number` processes beside this one, ahead of time; with 0, in this one."""

    number: int
    pin_memory: bool

    def load(
        self, dataset: Dataset[Any], keys: Iterable[MicroBatch] | None = None, seed: int = 0
    ) -> Generator[Any, None, None]:
        """Yield the batches of a data set for each key, or as it yields them; raise the errors among them.

        Workers end when the generator does or is closed. Each has a seed of its own, worked out from `seed`.
        """
        loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=keys,
            num_workers=self.number,
            collate_fn=_unchanged,
            pin_memory=self.pin_memory and torch.cuda.is_available(),
            worker_init_fn=_leave_signals_to_parent,
            # Its own generator: the global one belongs to the training loop.
            generator=torch.Generator().manual_seed(seed),
        )
        with warnings.catch_warnings():
            # Python 3.12 warns of forking beside threads; torch's workers use none of the parent's.
            warnings.filterwarnings("ignore", r".*use of fork\(\) may lead to deadlocks", DeprecationWarning)
            batches = iter(loader)
        try:
            for batch in batches:
                if isinstance(batch, FambaError):
                    raise batch
                yield batch
        finally:
            # The last reference: workers end now, not when someone lets go of an error's traceback.
            del batches


def _unchanged(batch: Any) -> Any:
    return batch


def _leave_signals_to_parent(_: int) -> None:
    # Sent to the whole group by Ctrl-C or Slurm, they are for the training process, which ends its workers.
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # By this one Python ends workers too, should one be left at its exit: not at once, but all the same.
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_TIME_TO_SAVE_S))


@dataclass(frozen=True)
class TrainBatches(ABC):
    """Gives the training batches of one process."""

    sampler: EpochSampler
    workers: Workers

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of steps in every epoch."""
        return self.sampler.steps_per_epoch

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[Batch, None, None]:
        """Yield the micro-batches of an epoch from a step on, `accumulation` for each step.

        Workers end with the generator, also when it is closed early. Raises ConfigError where there is no such step;
        DataError on the way, where an image cannot be read.
        """
        self.sampler.check_place(epoch, start_step)
        return self._load(epoch, start_step)

    @abstractmethod
    def _load(self, epoch: int, start_step: int) -> Generator[Batch, None, None]: ...


@dataclass(frozen=True)
class _Fetch(Dataset[Any]):
    """Loads a micro-batch of a source with random access; torch's workers take micro-batches for indices."""

    source: Source
    transform: Transform

    def __getitem__(self, key: MicroBatch) -> Batch | FambaError:
        try:
            return self._batch(key)
        except FambaError as error:
            return error  # as a value: raised in a worker it would arrive wrapped in a traceback

    def _batch(self, key: MicroBatch) -> Batch:
        if isinstance(self.source, ArraySource):
            chosen = torch.from_numpy(key.indices)
            return self.transform(self.source.images[chosen], key.epoch, key.start), self.source.labels[chosen]
        indices = key.indices.tolist()
        images = self.transform((self.source.image(index) for index in indices), key.epoch, key.start)
        return images, torch.tensor([self.source.label(index) for index in indices])


@dataclass(frozen=True)
class Batches(TrainBatches):
    """Gives training batches of a source with random access."""

    fetch: _Fetch

    def _load(self, epoch: int, start_step: int) -> Generator[Batch, None, None]:
        return self.workers.load(self.fetch, self.sampler.micro_batches(epoch, start_step))


@dataclass(frozen=True)
class EvalBatches:
    """Gives one process's share of a source with random access; see `eval_batches`."""

    fetch: _Fetch
    indices: range
    batch_size: int
    workers: Workers

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        firsts = range(0, len(self.indices), self.batch_size)
        parts = (self.indices[first : first + self.batch_size] for first in firsts)
        keys = (MicroBatch(0, part.start, np.arange(part.start, part.stop)) for part in parts)
        return self.workers.load(self.fetch, keys)


class _Stream(IterableDataset[Any]):
    """Yields the batches that a function yields in a worker; an error comes as a value, see `_Fetch`."""

    def __init__(self, batches: Callable[[], Iterator[Batch | None]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch | FambaError | None]:
        try:
            yield from self.batches()
        except FambaError as error:
            yield error


@dataclass(frozen=True)
class StreamBatches(TrainBatches):
    """Gives training batches of a stream. A start in mid-epoch reads and drops what lies before."""

    source: StreamSource
    transform: Callable[[Stream, tuple[int, ...]], Transform]  # from what its draws are for

    def __post_init__(self) -> None:
        if self.sampler.repeats > 1:
            raise ConfigError(f"repeats must be 1 with {self.source.name!r}: a stream cannot repeat images.", "repeats")

    def _load(self, epoch: int, start_step: int) -> Generator[Batch, None, None]:
        sampler = self.sampler
        wanted, skipped = (steps * sampler.accumulation for steps in (self.steps_per_epoch, start_step))
        seed = derived_integer(Stream.STREAMED_ORDER, sampler.seed, epoch, sampler.rank)
        given = 0
        for batch in self.workers.load(_Stream(partial(self._share, epoch, skipped, wanted)), seed=seed):
            given += 1
            if batch is not None:
                yield batch
        if given < wanted:
            raise DataError(
                f"{self.source.name!r} gave {given} of {wanted} micro-batches: every worker needs a file of "
                f"its own, so use at most (files / {sampler.world_size} processes) workers."
            )

    def _share(self, epoch: int, skipped: int, wanted: int) -> Iterator[Batch | None]:
        """Yield a worker's share of an epoch's micro-batches, None for a skipped one."""
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        sampler, size = self.sampler, self.sampler.micro_batch
        transform = self.transform(Stream.STREAMED_AUGMENTATION, (sampler.seed, sampler.rank, worker))
        samples = iter(self.source.open_training(sampler.seed, epoch, size, sampler.rank, sampler.world_size))
        # Torch takes from the workers in turn, so micro-batch i of all is one of worker i % workers.
        for turn, number in enumerate(range(worker, wanted, workers)):
            chunk = list(islice(samples, size))
            if len(chunk) < size:
                return
            yield None if number < skipped else _batch(self.source, transform, chunk, epoch, turn * size)


@dataclass(frozen=True)
class StreamEvaluation:
    """Gives one process's share of a stream, each image once over all processes.

    Every process reads the whole stream and keeps every `world_size`-th image: the readers' own way of
    sharing repeats some images or leaves some out.
    """

    source: StreamSource
    transform: Transform
    batch_size: int
    rank: int
    world_size: int
    workers: Workers

    def __iter__(self) -> Iterator[Batch]:
        return self.workers.load(_Stream(self._share))

    def _share(self) -> Iterator[Batch]:
        samples = islice(self.source.open_evaluation(), self.rank, None, self.world_size)
        while chunk := list(islice(samples, self.batch_size)):
            yield _batch(self.source, self.transform, chunk, 0, 0)


def _batch(source: StreamSource, transform: Transform, chunk: list[tuple[Any, Any]], epoch: int, start: int) -> Batch:
    labels = [check_label(int(label), source.num_classes, source.where) for _, label in chunk]
    return transform((image for image, _ in chunk), epoch, start), torch.tensor(labels)
