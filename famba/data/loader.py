"""Load batches for training and evaluation, in this process or in workers, with the same result and the same errors."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from famba.data.augment import Augmentation, Images, Normalize, Transform, evaluation_transform, training_transform
from famba.data.sampler import EpochSampler, MicroBatch, check_numbers, check_rank
from famba.data.sources import ArraySource, Source, labels_of
from famba.errors import FambaError

Batch: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""Images as the transform gives them, float32 (b, 3, s, s), and labels, int64 (b,)."""

Share: TypeAlias = Callable[[int, int], Iterator[Batch]]
"""(worker, workers) to every `workers`-th batch from `worker` on."""

_TIME_TO_SAVE_S = 60


def train_batches(
    source: Source,
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

    A step depends on (seed, epoch, step) and the numbers below, never on what ran before, nor on `workers`; with
    `repeats` 1 the processes together see the same images and augmentation however many they are.

    image_size: side in pixels that the model takes. mean, std: of the colours, in 0..1. seed: of order and
    augmentation. seed to world_size and repeats: as in `EpochSampler`. workers: loading processes beside this one;
    images in memory with whole-batch augmentation need none. pin_memory: page-locked results, where there is CUDA.
    Raises ConfigError where the numbers do not fit.
    """
    check_numbers(0, workers=workers)
    check_numbers(image_size=image_size)
    sampler = EpochSampler(len(source), seed, batch_size, accumulation, rank, world_size, repeats)
    transform = training_transform(augmentation, image_size, Normalize(tuple(mean), tuple(std)), seed)
    needed = 0 if augmentation.kind == "batch" and isinstance(source, ArraySource) else workers
    return TrainBatches(sampler, partial(_read, source, transform, sampler.micro_batches), needed, pin_memory)


def eval_batches(
    source: Source,
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

    So the last batch may be smaller, and processes may have different numbers of batches, or none. `eval_crop` and
    `interpolation` are used of the augmentation; batch_size is that of this process; the rest as in `train_batches`.
    """
    check_numbers(0, workers=workers)
    check_numbers(image_size=image_size, batch_size=batch_size)
    check_rank(rank, world_size)
    transform = evaluation_transform(augmentation, image_size, Normalize(tuple(mean), tuple(std)))
    images = range(len(source) * rank // world_size, len(source) * (rank + 1) // world_size)
    share = partial(_read, source, transform, partial(_in_order, images, batch_size), 0, 0)
    return EvalBatches(share, 0 if isinstance(source, ArraySource) else workers, pin_memory)


class _Worker(IterableDataset[Any]):
    """Yields a worker's share; torch takes from the workers in turn, so all of them together yield every batch."""

    def __init__(self, share: Share) -> None:
        self.share = share

    def __iter__(self) -> Iterator[Batch | FambaError]:
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
class EvalBatches:
    """Gives one process's share of the images, as often as it is iterated; raises DataError on the way.

    Workers end when the iterator does or is closed.
    """

    share: Share
    workers: int
    pin_memory: bool

    def __iter__(self) -> Generator[Batch, None, None]:
        loader = DataLoader(
            _Worker(self.share),
            batch_size=None,
            num_workers=self.workers,
            collate_fn=_unchanged,
            pin_memory=self.pin_memory and torch.cuda.is_available(),
            worker_init_fn=_leave_signals_to_parent,
            # Its own generator: the global one belongs to the training loop.
            generator=torch.Generator().manual_seed(0),
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


@dataclass(frozen=True)
class TrainBatches:
    """Gives the training batches of one process."""

    sampler: EpochSampler
    share: Callable[[int, int, int, int], Iterator[Batch]]  # (epoch, start_step) and the arguments of `Share`
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
        return iter(EvalBatches(partial(self.share, epoch, start_step), self.workers, self.pin_memory))


def _read(
    source: Source,
    transform: Transform,
    batches: Callable[[int, int], Iterable[MicroBatch]],
    epoch: int,
    start_step: int,
    worker: int,
    workers: int,
) -> Iterator[Batch]:
    labels = labels_of(source)
    for one in islice(batches(epoch, start_step), worker, None, workers):
        images: Images = map(source.image, one.indices.tolist())
        if isinstance(source, ArraySource):
            images = source.images[one.indices]
        yield transform(images, one.epoch, one.start), torch.from_numpy(labels[one.indices])


def _in_order(images: range, batch_size: int, epoch: int, start_step: int) -> Iterator[MicroBatch]:
    for first in range(0, len(images), batch_size):
        yield MicroBatch(epoch, first, np.array(images[first : first + batch_size]))
