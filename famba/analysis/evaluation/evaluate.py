"""Accuracy, throughput, memory and multiply-adds of one network that fuses in several ways, on the same images."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from famba import data
from famba.analysis.evaluation.intervals import Interval, of_accuracy, of_difference
from famba.analysis.evaluation.memory import inference_memory
from famba.analysis.evaluation.request import Request, check_classes
from famba.analysis.variants import Variant
from famba.errors import ConfigError, TrainingError, some
from famba.fusion import tokens_per_layer
from famba.training.devices import out_of_memory, synchronize
from famba.training.evaluation import Tally
from famba.training.measure import macs_per_image


@dataclass(frozen=True)
class Result:
    """What one way of fusing came to.

    top1, top5: percent. difference: of Top-1 to the first of the evaluation, in points; None for the first itself. Both
    have their 95 % intervals beside them. images_per_s: median over batches, None where none was timed. memory_mib:
    what the inference of a batch adds to weights and images, None where it is not known. macs_per_image: multiply-adds.
    """

    variant: Variant
    tokens_per_layer: tuple[int, ...]
    top1: float
    top1_interval: Interval
    difference: float | None
    difference_interval: Interval | None
    top5: float
    loss: float
    images_per_s: float | None
    memory_mib: float | None
    macs_per_image: int


@dataclass(frozen=True)
class Evaluation:
    """All results, on so many images; interrupted: whether they are but the first of those that were asked for."""

    request: Request
    results: tuple[Result, ...]
    images: int
    interrupted: bool


@dataclass
class _Contestant:
    variant: Variant
    tally: Tally
    times: list[tuple[int, float]] = field(default_factory=list)
    hits: int = 0
    gained: int = 0
    lost: int = 0

    def add(self, logits: Tensor, labels: Tensor, first: Tensor) -> None:
        """Count a batch. first: for each image whether the first contestant gets it right, (b,)."""
        self.tally.add(logits, labels)
        right = _right(logits, labels)
        self.hits += int(right.sum())
        self.gained += int((right & ~first).sum())
        self.lost += int((first & ~right).sum())

    def accuracy(self, images: int, is_first: bool) -> dict[str, Any]:
        """Return what `Result` has of accuracy and its intervals, by its names."""
        return {
            **self.tally.results(),
            "top1_interval": of_accuracy(self.hits, images),
            "difference": None if is_first else 100 * (self.gained - self.lost) / images,
            "difference_interval": None if is_first else of_difference(self.gained, self.lost, images),
        }

    def images_per_s(self) -> float | None:
        """Median over batches of full size: the last one may be smaller, and less of a load."""
        full = max((images for images, _ in self.times), default=0)
        return statistics.median([n / seconds for n, seconds in self.times if n == full]) if full else None


def evaluate(request: Request) -> Evaluation:
    """Evaluate as asked; a Ctrl-C keeps what is known by then.

    Raises:
        ConfigError, DataError: where the images turn out not to fit the network, or to be damaged.
        TrainingError: where memory runs out.
        KeyboardInterrupt: before the first batch is done.
    """
    source = _source(request)
    model = request.trained.model.to(request.device)
    contestants = [_Contestant(variant, Tally(request.device)) for variant in request.variants]
    try:
        with request.chosen_backend():
            done, interrupted = _race(request, contestants, source)
            macs = [_macs(request, one.variant) for one in contestants]
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise TrainingError(f"out of memory with {request.batch_size} images at once; less: --batch-size") from error
    if not done:
        raise KeyboardInterrupt
    unknown: Sequence[float | None] = [None] * len(contestants)
    memory = unknown if interrupted else inference_memory(request)
    results = (
        Result(
            one.variant,
            tokens_per_layer(one.variant.schedule, model.num_tokens),
            images_per_s=one.images_per_s(),
            memory_mib=mib,
            macs_per_image=count,
            **one.accuracy(done, is_first=one is contestants[0]),
        )
        for one, mib, count in zip(contestants, memory, macs, strict=True)
    )
    return Evaluation(request, tuple(results), done, interrupted)


def _race(
    request: Request, contestants: Sequence[_Contestant], source: data.Source | data.StreamSource
) -> tuple[int, bool]:
    """Let contestants take each batch in turn; return how many images all have had, and whether it was cut short."""
    done = 0
    try:
        with tqdm(total=len(source), unit="image", file=sys.stderr, leave=False, mininterval=1) as bar:
            for images, labels in _batches(request, source):
                if not done:
                    for one in contestants:  # what is compiled, tuned or allocated once
                        _infer(request, one, images)
                logits = [_timed(request, one, images) for one in contestants]
                first = _right(logits[0], labels)
                for one, own in zip(contestants, logits, strict=True):
                    one.add(own, labels, first)
                done += len(labels)
                bar.update(len(labels))
    except KeyboardInterrupt:
        return done, True
    return done, False


def _timed(request: Request, one: _Contestant, images: Tensor) -> Tensor:
    one.variant.put_into(request.trained.model)
    synchronize(request.device)
    began = time.perf_counter()
    logits = _infer(request, one, images)
    synchronize(request.device)
    one.times.append((len(images), time.perf_counter() - began))
    return logits


@torch.no_grad()
def _infer(request: Request, one: _Contestant, images: Tensor) -> Tensor:
    one.variant.put_into(request.trained.model)
    with request.autocasting():
        return request.trained.model(images)


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    """Which images have their label ranked first, as `Tally` ranks them, (b,)."""
    return logits.float().topk(min(5, logits.shape[1]), dim=1).indices[:, 0] == labels


def _macs(request: Request, variant: Variant) -> int:
    variant.put_into(request.trained.model)
    return macs_per_image(request.trained.model, request.trained.image_size)


def _source(request: Request) -> data.Source | data.StreamSource:
    wanted = request.images
    reading = request.trained.reading
    splits = data.load_splits(
        wanted.name,
        wanted.root,
        subset=None,
        val_fraction=0.0,
        num_classes=wanted.num_classes,
        background=reading.background,
        version=reading.version,
    )
    test = _numbered_as_trained(request, splits)
    if wanted.subset is None:
        return test
    if isinstance(test, data.StreamSource):
        raise ConfigError(f"--subset cannot be used with {test.name!r}: a stream has no random access")
    if wanted.subset > len(test):
        raise ConfigError(f"--subset is {wanted.subset}; allowed: 1 to {len(test)}, the test images of {wanted.name}")
    return data.sample(test, wanted.subset, reading.version)


def _numbered_as_trained(request: Request, splits: data.Splits) -> data.Source | data.StreamSource:
    """Return the test images with the class numbers of the network's training; by name where names are known.

    Raises ConfigError where they hold a class that the network does not tell apart.
    """
    test, wanted = splits.test, request.images
    known, found = request.trained.class_names, splits.classes
    if known is None or found is None:
        check_classes(request.trained, wanted, test.num_classes)
        return test
    if strange := [name for name in found if name not in set(known)]:
        raise ConfigError(
            f"{wanted.name} has classes that the network was not trained on: {some(strange)}; it knows {some(known)}. "
            "Evaluate it on images of its own classes, or train from its weights: python train.py init_from=WEIGHTS"
        )
    numbers = tuple(known.index(name) for name in found)
    if numbers == tuple(range(len(found))):
        return test
    if isinstance(test, data.StreamSource):
        raise ConfigError(f"{test.name!r} numbers its classes otherwise than the network does: {some(found)}")
    return data.renumber(test, numbers, request.trained.classes)


def _batches(request: Request, source: data.Source | data.StreamSource) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches on the device."""
    trained = request.trained
    batches = data.eval_batches(
        source,
        trained.scaling,
        image_size=trained.image_size,
        mean=trained.mean,
        std=trained.std,
        batch_size=request.batch_size,
        rank=0,
        world_size=1,
        workers=request.images.workers,
    )
    for images, labels in batches:
        yield images.to(request.device), labels.to(request.device)
