"""Load batches for training and evaluation, in this process or in workers, with the same result and the same errors."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from famba.data.augment import Augmentation, Normalize, Transform, evaluation_transform, training_transform, unchanged
from famba.data.draws import Stream, derived_integer, permutation, sent
from famba.data.sources import ArraySource, Source
from famba.errors import ConfigError, FambaError

Batch: TypeAlias = tuple[Tensor, Tensor]
"""Images as the transform gives them, float32 (b, 3, s, s), and labels, int64 (b,)."""

_TIME_TO_SAVE_S = 60
_CPU = torch.device("cpu")


class MicroBatch(NamedTuple):
    """Names images that are loaded at once: `indices`, int64 (b,), at positions start .. start + b - 1."""

    epoch: int
    start: int
    indices: npt.NDArray[np.int64]


@dataclass(frozen=True)
class TrainBatches:
    """Gives the training batches of one process, in an order drawn for each epoch.

    Micro-batch m of process r in step s holds the positions from s * batch_size + (m * world_size + r) * micro_batch
    on. Images that do not fill a step are left out, others in each epoch. Raises ConfigError where numbers do not fit.
    """

    length: int  # number of training images
    seed: int  # of the order, non-negative
    batch_size: int  # images in one step of all processes
    accumulation: int  # micro-batches per step
    rank: int  # number of this process
    world_size: int  # number of processes
    # Times that an image comes up, in different processes with different augmentation (Hoffer et al. 2020, "Augment
    # your batch"), while an epoch stays as long as without; acts only where world_size is above 1, as in DeiT.
    repeats: int
    load: Callable[[list[MicroBatch]], Batches] | None = None  # None where the numbers alone are asked for

    def __post_init__(self) -> None:
        names = ("batch_size", "accumulation", "world_size", "repeats")
        check_numbers(**{name: getattr(self, name) for name in names})
        if not 0 <= self.seed < 2**64:
            raise ConfigError(f"seed is {self.seed}, but must be at least 0 and below 2**64.")
        unit = self.world_size * self.accumulation
        fits = f"a multiple of {unit}, processes {self.world_size} times accumulation {self.accumulation}"
        if self.batch_size % unit:
            raise ConfigError(f"batch_size is {self.batch_size}, but must be {fits}.", "batch_size")
        if self.batch_size > self.length or self.steps_per_epoch == 0:
            largest = min(self.length, self._own_images * self.world_size)
            said = f"batch_size {self.batch_size} does not fit into the {self.length} training images"
            raise ConfigError(f"{said}: at most {largest}, and {fits}.", "batch_size")

    @property
    def micro_batch(self) -> int:
        """Return the number of images that one process loads at once."""
        return self.batch_size // (self.world_size * self.accumulation)

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of whole steps in every epoch."""
        return self._own_images // (self.micro_batch * self.accumulation)

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[Batch, None, None]:
        """Yield the micro-batches of an epoch from a step on, `accumulation` for each step.

        Workers end with the generator, also when it is closed early. Raises ConfigError where there is no such step;
        DataError on the way, where an image cannot be read.
        """
        if epoch < 0 or not 0 <= start_step <= self.steps_per_epoch:
            there = f"epochs count from 0, each has {self.steps_per_epoch} steps"
            raise ConfigError(f"there is no step {start_step} in epoch {epoch}: {there}.")
        indices, size, parts = self._indices(epoch), self.micro_batch, []
        for number in range(start_step * self.accumulation, self.steps_per_epoch * self.accumulation):
            start = (number * self.world_size + self.rank) * size
            parts.append(MicroBatch(epoch, start, indices[number * size : (number + 1) * size]))
        assert self.load is not None
        return iter(self.load(parts))

    @cached_property
    def _repeating(self) -> RepeatAugSampler | None:
        if self.repeats == 1 or self.world_size == 1:
            return None
        return RepeatAugSampler(range(self.length), self.world_size, self.rank, num_repeats=self.repeats)

    @property
    def _own_images(self) -> int:
        repeating = self._repeating
        return self.length // self.world_size if repeating is None else repeating.num_selected_samples

    def _indices(self, epoch: int) -> npt.NDArray[np.int64]:
        if self._repeating is None:
            used = permutation(Stream.ORDER, self.seed, epoch, self.length)[: self.steps_per_epoch * self.batch_size]
            return used.reshape(-1, self.world_size, self.micro_batch)[:, self.rank].reshape(-1)
        # The sampler seeds its order with the epoch alone; this makes it depend on the run's seed too.
        self._repeating.set_epoch(derived_integer(Stream.REPEATED_ORDER, self.seed, epoch))
        return np.fromiter(self._repeating, dtype=np.int64)


def check_numbers(least: int = 1, **numbers: int) -> None:
    """Raise ConfigError for a number that is too small."""
    for name, number in numbers.items():
        if number < least:
            raise ConfigError(f"{name} is {number}, but must be at least {least}.", name)


@dataclass(frozen=True)
class Loading:
    """Says how one process loads images. Raises ConfigError where the numbers do not fit."""

    image_size: int  # side in pixels that the model takes
    mean: tuple[float, float, float]  # of the colours, in 0..1
    std: tuple[float, float, float]
    rank: int = 0
    world_size: int = 1
    workers: int = 0  # processes that read, beside this one; images in memory that come in whole batches need none
    device: torch.device = _CPU  # where batches are wanted
    finish_on: torch.device = _CPU  # where whole batches are augmented, a CPU or `device`; images may lie there

    def __post_init__(self) -> None:
        check_numbers(0, workers=self.workers)
        check_numbers(image_size=self.image_size)
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(f"rank is {self.rank}, but must be from 0 to world_size - 1 = {self.world_size - 1}.")


def train_batches(
    source: Source,
    augmentation: Augmentation,
    loading: Loading,
    *,
    seed: int,
    batch_size: int,
    accumulation: int,
    repeats: int,
) -> TrainBatches:
    """Return the training batches of one process.

    A step depends on (seed, epoch, step) and the numbers below, never on what ran before, nor on `workers`; with
    `repeats` 1 the processes together see the same images and augmentation however many they are.

    seed: of order and augmentation. seed to repeats: as in `TrainBatches`. Raises ConfigError where they do not fit.
    """
    transform = training_transform(augmentation, loading.image_size, Normalize(loading.mean, loading.std), seed)
    numbers = (len(source), seed, batch_size, accumulation, loading.rank, loading.world_size, repeats)
    return TrainBatches(*numbers, partial(Batches, source, transform, loading))


def eval_batches(source: Source, augmentation: Augmentation, loading: Loading, batch_size: int) -> Batches:
    """Return one process's share of the images, in order: each once over all processes, without padding.

    So the last batch may be smaller, and processes may have different numbers of batches, or none. `eval_crop` and
    `interpolation` are used of the augmentation; batch_size is that of this process.
    """
    check_numbers(batch_size=batch_size)
    transform = evaluation_transform(augmentation, loading.image_size, Normalize(loading.mean, loading.std))
    first, last = (len(source) * rank // loading.world_size for rank in (loading.rank, loading.rank + 1))
    images = np.arange(first, last)
    parts = [MicroBatch(0, start, images[start : start + batch_size]) for start in range(0, len(images), batch_size)]
    return Batches(source, transform, loading, parts)


@dataclass(frozen=True)
class Batches:
    """Gives parts of a source, as often as it is iterated; workers end with the iterator."""

    source: Source
    transform: Transform
    loading: Loading
    parts: list[MicroBatch]

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Generator[Batch, None, None]:
        batches, device = self._load(), self.loading.device
        return ahead(batches, device) if device.type == "cuda" else batches

    def _load(self) -> Generator[Batch, None, None]:
        if not (parts := self.parts):
            return
        source, finish, labels = self.source, self.transform.whole, torch.as_tensor(self.source.labels)
        # The order of the epoch, where the images are: it is sent there once.
        order = sent(torch.from_numpy(np.concatenate([part.indices for part in parts])), labels.device)
        rows = order.split([len(part.indices) for part in parts])
        if isinstance(source, ArraySource) and finish is not None:
            read = (source.images.index_select(0, one) for one in rows)
        else:
            on_host = self.loading.finish_on.type == "cpu"
            finish = unchanged if on_host else self.transform.finish
            read = self._by_workers(_Reader(source, self.transform, on_host, parts))
        with closing(read):
            for pixels, one, (epoch, start, _) in zip(read, rows, parts, strict=True):
                images = finish(sent(pixels, self.loading.finish_on), epoch, start)
                yield sent(images, self.loading.device), sent(labels.index_select(0, one), self.loading.device)

    def _by_workers(self, reader: _Reader) -> Generator[Tensor, None, None]:
        loader = DataLoader(
            reader,
            batch_size=None,
            num_workers=self.loading.workers,
            pin_memory=self.loading.device.type == "cuda",
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


@dataclass(frozen=True, eq=False)
class _Reader(IterableDataset[Any]):
    """Reads a worker's share; torch takes from the workers in turn, so all of them together yield every batch."""

    source: Source
    transform: Transform
    finishes: bool  # does all that there is to do
    parts: list[MicroBatch]

    def __iter__(self) -> Iterator[Tensor | FambaError]:
        info = get_worker_info()
        try:
            for epoch, start, indices in self.parts[info.id :: info.num_workers] if info else self.parts:
                images = self.transform.read(map(self.source.image, indices.tolist()), epoch, start)
                yield self.transform.finish(images, epoch, start) if self.finishes else images
        except FambaError as error:
            yield error  # as a value: raised in a worker it would arrive wrapped in a traceback


def _leave_signals_to_parent(_: int) -> None:
    # Sent to the whole group by Ctrl-C or Slurm, they are for the training process, which ends its workers.
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # By this one Python ends workers too, should one be left at its exit: not at once, but all the same.
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_TIME_TO_SAVE_S))


def ahead(batches: Generator[Batch, None, None], device: torch.device) -> Generator[Batch, None, None]:
    """Yield batches of a GPU, and prepare the next on a second stream while a step runs on the current one."""
    side, current = _second_stream(device), torch.cuda.current_stream(device)
    side.wait_stream(current)

    def prepare() -> tuple[Batch, torch.cuda.Event] | None:
        with torch.cuda.stream(side):
            batch = next(batches, None)
            return None if batch is None else (batch, side.record_event())

    with closing(batches):
        following = prepare()
        while following is not None:
            (batch, ready), following = following, prepare()
            current.wait_event(ready)
            for part in batch:
                part.record_stream(current)  # its memory is the current stream's until that is done with it
            yield batch


@cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # one for all epochs: memory stays with the stream that it was given to
