"""Deal the images of an epoch out to steps, micro-batches and processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from timm.data.distributed_sampler import RepeatAugSampler

from famba.data.draws import Stream, derived_integer, permutation
from famba.errors import ConfigError


class MicroBatch(NamedTuple):
    """Names images that are loaded at once: `indices`, int64 (b,), at positions start .. start + b - 1."""

    epoch: int
    start: int
    indices: npt.NDArray[np.int64]


@dataclass(frozen=True)
class EpochSampler:
    """Draws the order of each epoch, and says which images this process loads at which step.

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

    def __post_init__(self) -> None:
        names = ("batch_size", "accumulation", "world_size", "repeats")
        check_numbers(**{name: getattr(self, name) for name in names})
        if not 0 <= self.seed < 2**64:
            raise ConfigError(f"seed is {self.seed}, but must be at least 0 and below 2**64.")
        check_rank(self.rank, self.world_size)
        unit = self.world_size * self.accumulation
        fits = f"a multiple of {unit}, world_size {self.world_size} times accumulation {self.accumulation}"
        if self.batch_size % unit:
            raise ConfigError(f"batch_size is {self.batch_size}, but must be {fits}.", "batch_size")
        if self.batch_size > self.length or self.steps_per_epoch == 0:
            largest = min(self.length, self._images_per_process() * self.world_size)
            said = f"batch_size {self.batch_size} does not fit into the {self.length} training images"
            raise ConfigError(f"{said}: at most {largest}, and {fits}.", "batch_size")

    @property
    def micro_batch(self) -> int:
        """Return the number of images that one process loads at once."""
        return self.batch_size // (self.world_size * self.accumulation)

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of whole steps in an epoch."""
        return self._images_per_process() // (self.micro_batch * self.accumulation)

    def micro_batches(self, epoch: int, start_step: int) -> Iterator[MicroBatch]:
        """Yield this process's micro-batches of an epoch from a step on."""
        indices, size = self._indices(epoch), self.micro_batch
        for number in range(start_step * self.accumulation, self.steps_per_epoch * self.accumulation):
            start = (number * self.world_size + self.rank) * size
            yield MicroBatch(epoch, start, indices[number * size : (number + 1) * size])

    def check_place(self, epoch: int, start_step: int) -> None:
        """Raise ConfigError where there is no such place in the training."""
        if epoch < 0 or not 0 <= start_step <= self.steps_per_epoch:
            there = f"epochs count from 0, each has {self.steps_per_epoch} steps"
            raise ConfigError(f"there is no step {start_step} in epoch {epoch}: {there}.")

    @cached_property
    def _repeating(self) -> RepeatAugSampler | None:
        if self.repeats == 1 or self.world_size == 1:
            return None
        return RepeatAugSampler(range(self.length), self.world_size, self.rank, num_repeats=self.repeats)

    def _images_per_process(self) -> int:
        repeating = self._repeating
        return self.length // self.world_size if repeating is None else repeating.num_selected_samples

    def _indices(self, epoch: int) -> npt.NDArray[np.int64]:
        if self._repeating is None:
            used = permutation(Stream.ORDER, self.seed, epoch, self.length)[: self.steps_per_epoch * self.batch_size]
            return used.reshape(-1, self.world_size, self.micro_batch)[:, self.rank].reshape(-1)
        # The sampler seeds its order with the epoch alone; this makes it depend on the run's seed too.
        self._repeating.set_epoch(derived_integer(Stream.REPEATED_ORDER, self.seed, epoch))
        return np.fromiter(self._repeating, dtype=np.int64)


def check_rank(rank: int, world_size: int) -> None:
    """Raise ConfigError unless 0 <= rank < world_size."""
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank is {rank}, but must be from 0 to world_size - 1 = {world_size - 1}.")


def check_numbers(least: int = 1, **numbers: int) -> None:
    """Raise ConfigError for a number that is too small."""
    for name, number in numbers.items():
        if number < least:
            raise ConfigError(f"{name} is {number}, but must be at least {least}.", name)
