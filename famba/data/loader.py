"""Load batches for training and evaluation, in this process or in workers, with the same result and the same errors.

A stream has no order that could be produced from the middle: its shuffling comes from (seed, epoch, rank, worker), and
a start in mid-epoch reads what lies before and drops it. So a run on a stream repeats and resumes exactly with the same
number of processes and workers, and not with another.
"""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from famba.data.augment import Augmentation, Images, Normalize, Transform, evaluation_transform, training_transform
from famba.data.draws import Stream, derived_integer
from famba.data.named import StreamSource
from famba.data.sampler import EpochSampler, MicroBatch, check_numbers, check_rank
from famba.data.sources import ArraySource, Labels, Source, check_label, labels_of
from famba.errors import ConfigError, DataError, FambaError

Batch: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""Images, float32 (b, 3, s, s), and labels, int64 (b,)."""

Share: TypeAlias = Callable[[int, int], Iterator[Batch | None]]
"""(worker, workers) to every `workers`-th batch from `worker` on, None for one that is skipped."""

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

    image_size: side in pixels that the model takes. mean, std: of the colours, in 0..1. seed: of order and
    augmentation. seed to world_size and repeats: as in `EpochSampler`. workers: loading processes beside this one;
    images in memory with whole-batch augmentation need none. pin_memory: page-locked results, where there is CUDA.
    Raises ConfigError where the numbers do not fit.
    """
    check_numbers(0, workers=workers)
    check_numbers(image_size=image_size)
    sampler = EpochSampler(len(source), seed, batch_size, accumulation, rank, world_size, repeats)
    transform = partial(training_transform, augmentation, image_size, Normalize(tuple(mean), tuple(std)))
    if isinstance(source, StreamSource):
        if repeats > 1:
            raise ConfigError(f"repeats must be 1 with {source.name!r}: a stream cannot repeat images.", "repeats")
        return TrainBatches(sampler, partial(_streamed, source, transform, sampler), workers, pin_memory)
    load = partial(_load, source, labels_of(source), transform(Stream.AUGMENTATION, (seed,)))
    in_memory = augmentation.kind == "batch" and isinstance(source, ArraySource)
    return TrainBatches(sampler, partial(_shuffled, load, sampler), 0 if in_memory else workers, pin_memory)


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
) -> EvalBatches:
    """Return one process's share of the images, in order: each once over all processes, without padding.

    So the last batch may be smaller, and processes may have different numbers of batches, or none. It can be iterated
    repeatedly, which raises DataError where an image cannot be read. `eval_crop` and `interpolation` are used of the
    augmentation; batch_size is that of this process; the rest is as in `train_batches`.
    """
    check_numbers(0, workers=workers)
    check_numbers(image_size=image_size, batch_size=batch_size)
    check_rank(rank, world_size)
    transform = evaluation_transform(augmentation, image_size, Normalize(tuple(mean), tuple(std)))
    if isinstance(source, StreamSource):
        share = partial(_streamed_once, source, transform, batch_size, rank, world_size)
        return EvalBatches(share, workers, pin_memory)
    load = partial(_load, source, labels_of(source), transform)
    images = range(len(source) * rank // world_size, len(source) * (rank + 1) // world_size)
    needed = 0 if isinstance(source, ArraySource) else workers
    return EvalBatches(partial(_in_order, load, batch_size, images), needed, pin_memory)


class _Batches(IterableDataset[Any]):
    """Yields a worker's share; torch takes from the workers in turn, so all of them together yield every batch."""

    def __init__(self, share: Share) -> None:
        self.share = share

    def __iter__(self) -> Iterator[Batch | FambaError | None]:
        info = get_worker_info()
        try:
            yield from self.share(*((info.id, info.num_workers) if info else (0, 1)))
        except FambaError as error:
            yield error  # as a value: raised in a worker it would arrive wrapped in a traceback


def _unchanged(batch: Any) -> Any:
    return batch


def _leave_signals_to_parent(_: int) -> None:
    # Sent to the whole group by Ctrl-C or Slurm, they are for the training process, which ends its workers.
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # By this one Python ends workers too, should one be left at its exit: not at once, but all the same.
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_TIME_TO_SAVE_S))


@dataclass(frozen=True)
class TrainBatches:
    """Gives the training batches of one process."""

    sampler: EpochSampler
    share: Callable[[int, int, int, int], Iterator[Batch | None]]  # (epoch, start_step) and the arguments of `Share`
    workers: int
    pin_memory: bool

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
        seed = derived_integer(Stream.STREAMED_ORDER, self.sampler.seed, epoch, self.sampler.rank)
        return _loaded(partial(self.share, epoch, start_step), self.workers, self.pin_memory, seed)


@dataclass(frozen=True)
class EvalBatches:
    """Gives one process's share of the images; see `eval_batches`."""

    share: Share
    workers: int
    pin_memory: bool

    def __iter__(self) -> Iterator[Batch]:
        return _loaded(self.share, self.workers, self.pin_memory, seed=0)


def _loaded(share: Share, workers: int, pin_memory: bool, seed: int) -> Generator[Batch, None, None]:
    """Yield the batches of all workers in order, and raise the errors among them.

    Workers, each with a seed of its own that is worked out from `seed`, end when the generator does or is closed.
    """
    loader = DataLoader(
        _Batches(share),
        batch_size=None,
        num_workers=workers,
        collate_fn=_unchanged,
        pin_memory=pin_memory and torch.cuda.is_available(),
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
            if batch is not None:
                yield batch
    finally:
        # The last reference: workers end now, not when someone lets go of an error's traceback.
        del batches


def _shuffled(
    load: Callable[[MicroBatch], Batch], sampler: EpochSampler, epoch: int, start_step: int, worker: int, workers: int
) -> Iterator[Batch]:
    return map(load, islice(sampler.micro_batches(epoch, start_step), worker, None, workers))


def _in_order(
    load: Callable[[MicroBatch], Batch], batch_size: int, images: range, worker: int, workers: int
) -> Iterator[Batch]:
    for first in images[::batch_size][worker::workers]:
        yield load(MicroBatch(0, first, np.arange(first, min(first + batch_size, images.stop))))


def _load(source: Source, labels: Labels, transform: Transform, one: MicroBatch) -> Batch:
    images: Images = (source.image(index) for index in one.indices.tolist())
    if isinstance(source, ArraySource):
        images = source.images[one.indices]
    return transform(images, one.epoch, one.start), torch.from_numpy(labels[one.indices])


def _streamed(
    source: StreamSource,
    transform: Callable[[Stream, tuple[int, ...]], Transform],  # from what its draws are for
    sampler: EpochSampler,
    epoch: int,
    start_step: int,
    worker: int,
    workers: int,
) -> Iterator[Batch | None]:
    skipped, wanted = (steps * sampler.accumulation for steps in (start_step, sampler.steps_per_epoch))
    size, augment = sampler.micro_batch, transform(Stream.STREAMED_AUGMENTATION, (sampler.seed, sampler.rank, worker))
    samples = iter(source.open_training(sampler.seed, epoch, size, sampler.rank, sampler.world_size))
    for turn, number in enumerate(range(worker, wanted, workers)):
        chunk = list(islice(samples, size))
        if len(chunk) < size:
            most = f"at most (files / {sampler.world_size} processes) workers"
            raise DataError(f"{source.name!r} is too short: every worker needs a file of its own, so use {most}.")
        yield None if number < skipped else _of_stream(source, augment, chunk, epoch, turn * size)


def _streamed_once(
    source: StreamSource, transform: Transform, batch_size: int, rank: int, world_size: int, worker: int, workers: int
) -> Iterator[Batch]:
    # Every process reads all and keeps its share; the readers' own way repeats some images or leaves some out. They
    # ask torch for the worker.
    samples = islice(source.open_evaluation(), rank, None, world_size)
    while chunk := list(islice(samples, batch_size)):
        yield _of_stream(source, transform, chunk, 0, 0)


def _of_stream(
    source: StreamSource, transform: Transform, chunk: list[tuple[Any, Any]], epoch: int, start: int
) -> Batch:
    labels = [check_label(int(label), source.num_classes, source.where) for _, label in chunk]
    return transform((image for image, _ in chunk), epoch, start), torch.tensor(labels)
