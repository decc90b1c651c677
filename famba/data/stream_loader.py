"""Batches of streamed data sets.

A stream has no order that could be produced from the middle: its shuffling comes from (seed, epoch, rank,
worker), and a start in mid-epoch reads what lies before and drops it. So a run repeats and resumes exactly
with the same number of processes and workers, and not with another.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from famba.data.augment import Augmentation, Normalize, Scaling, images_transform
from famba.data.draws import Stream, derived_integer
from famba.data.plan import Plan
from famba.data.sources import check_label
from famba.data.streams import StreamSource
from famba.data.workers import Batch, iterate
from famba.errors import ConfigError, DataError, FambaError


@dataclass(frozen=True)
class StreamBatches:
    """Training batches of a stream; see `TrainBatches`."""

    source: StreamSource
    augmentation: Augmentation
    image_size: int
    normalize: Normalize
    plan: Plan
    workers: int
    pin_memory: bool

    def __post_init__(self) -> None:
        if self.plan.repeats > 1:
            raise ConfigError(f"repeats must be 1 with {self.source.name!r}: a stream cannot repeat images.", "repeats")

    @property
    def steps_per_epoch(self) -> int:
        """Steps in every epoch."""
        return self.plan.steps_per_epoch

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[Batch, None, None]:
        """Yield micro-batches, see `TrainBatches.epoch`; what lies before is read and dropped."""
        self.plan.check_place(epoch, start_step)
        return self._epoch(epoch, start_step * self.plan.accumulation)

    def _epoch(self, epoch: int, skipped: int) -> Generator[Batch, None, None]:
        wanted = self.plan.steps_per_epoch * self.plan.accumulation
        seed = derived_integer(Stream.STREAMED_ORDER, self.plan.seed, epoch, self.plan.rank)
        dataset = _TrainingStream(self, epoch, skipped, wanted)
        given = 0
        for batch in iterate(dataset, self.workers, pin_memory=self.pin_memory, worker_seed=seed):
            given += 1
            if batch is not None:
                yield batch
        if given < wanted:
            raise DataError(
                f"{self.source.name!r} gave {given} of {wanted} micro-batches: every worker needs a file of "
                f"its own, so use at most (files / {self.plan.world_size} processes) workers."
            )


class _TrainingStream(IterableDataset[Any]):
    """Yields a worker's share of an epoch's micro-batches: a Batch, None for a skipped one, or an error."""

    def __init__(self, batches: StreamBatches, epoch: int, skipped: int, wanted: int) -> None:
        self.batches, self.epoch, self.skipped, self.wanted = batches, epoch, skipped, wanted

    def __iter__(self) -> Iterator[Batch | FambaError | None]:
        plan, source = self.batches.plan, self.batches.source
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        transform = images_transform(
            self.batches.augmentation,
            self.batches.image_size,
            self.batches.normalize,
            Stream.STREAMED_AUGMENTATION,
            (plan.seed, plan.rank, worker),
        )
        samples = iter(
            source.open_training(
                seed=plan.seed,
                epoch=self.epoch,
                micro_batch=plan.micro_batch,
                rank=plan.rank,
                world_size=plan.world_size,
            )
        )
        # Torch takes from the workers in turn, so micro-batch i of all is one of worker i % workers.
        for turn, number in enumerate(range(worker, self.wanted, workers)):
            try:
                chunk = list(islice(samples, plan.micro_batch))
                if len(chunk) < plan.micro_batch:
                    return
                if number < self.skipped:
                    yield None
                    continue
                labels = _labels(chunk, source)
                yield transform((image for image, _ in chunk), self.epoch, turn * plan.micro_batch), labels
            except FambaError as error:
                yield error
                return


@dataclass(frozen=True)
class StreamEvaluation:
    """One process's share of a stream, each image once over all processes.

    Every process reads the whole stream and keeps every `world_size`-th image: the readers' own way of
    sharing repeats some images or leaves some out.
    """

    source: StreamSource
    scaling: Scaling
    normalize: Normalize
    batch_size: int
    rank: int
    world_size: int
    workers: int
    pin_memory: bool

    def __iter__(self) -> Iterator[Batch]:
        return iterate(_EvaluationStream(self), self.workers, pin_memory=self.pin_memory, worker_seed=0)


class _EvaluationStream(IterableDataset[Any]):
    def __init__(self, evaluation: StreamEvaluation) -> None:
        self.evaluation = evaluation

    def __iter__(self) -> Iterator[Batch | FambaError]:
        own = self.evaluation
        samples = islice(own.source.open_evaluation(), own.rank, None, own.world_size)
        while True:
            try:
                chunk = list(islice(samples, own.batch_size))
                labels = _labels(chunk, own.source)
            except FambaError as error:
                yield error
                return
            if not chunk:
                return
            images = torch.stack([own.scaling.image(image) for image, _ in chunk])
            yield own.normalize(images), labels


def _labels(chunk: list[tuple[Any, Any]], source: StreamSource) -> torch.Tensor:
    def where() -> str:
        return f"{source.name!r} in {source.root}, split {source.split}"

    return torch.tensor([check_label(int(label), source.num_classes, where) for _, label in chunk])
