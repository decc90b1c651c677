"""Measure accuracy, speed, memory and multiply-adds of one network that fuses in several ways, on the same images."""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any

import torch
from scipy.stats import binomtest, norm
from torch import Tensor
from tqdm import tqdm

from famba import data
from famba.analysis import options as shared
from famba.analysis.benchmark.timing import return_freed_memory
from famba.analysis.variants import Variant, label_variants, own, unfused, variants
from famba.errors import BackendError, ConfigError, FambaError, TrainingError, check_choice, named, some
from famba.fusion import tokens_per_layer
from famba.ops.registry import AUTO, resolve
from famba.training.compose import compose, groups
from famba.training.devices import choose_precision, out_of_memory, peak_memory_mib, reset_peak_memory, synchronize
from famba.training.evaluation import Tally
from famba.training.measure import macs_per_image
from famba.training.weights import Trained, load_trained

_PRECISIONS = ("auto", "fp32", "bf16", "fp16")
_USUAL_BATCH, _USUAL_WORKERS = 100, 2
_OPTIONS = {"name": "--data", "root": "--data-root", "num_classes": "data.num_classes"}
Source = data.Source


@dataclass(frozen=True)
class Images:
    """Name test images as `famba.data.load_splits` does; own: whether they are of the data that trained the network."""

    name: str
    root: str | None
    num_classes: int | None
    own: bool


@dataclass(frozen=True)
class Request:
    """Hold an evaluation that can begin. path: what the network is loaded from, also in another process.

    variants: first the one that the network was trained with, to which the others are compared. subset: None for all.
    """

    path: str
    trained: Trained
    variants: tuple[Variant, ...]
    images: Images
    subset: int | None
    batch_size: int
    device: torch.device
    autocast: torch.dtype | None
    backend: str

    @torch.no_grad()
    def infer(self, variant: Variant, images: Tensor) -> Tensor:
        """Return the logits (b, classes) of images (b, 3, s, s) on the device, in the precision that was asked for."""
        variant.put_into(self.trained.model)
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            return self.trained.model(images)


@dataclass(frozen=True)
class Evaluation:
    """Hold a row for each variant, as evaluate.json has them, of so many images.

    Top-1, Top-5 in percent; difference of Top-1 to the first row in points, None in the first itself; both with the
    ends of their 95 % intervals. images_per_s: median over batches. memory_mib: what the inference of a batch adds to
    weights and images, None where it is not known. interrupted: whether images are but the first of those asked for.
    """

    request: Request
    rows: list[dict[str, Any]]
    images: int
    interrupted: bool


def check(options: argparse.Namespace) -> Request:
    """Load the network, and check all that is asked of it. Raises FambaError for what cannot work; reads no image."""
    asked = shared.read_fusion(options)
    device = shared.device(options.device)
    shared.at_least_one(options, "subset", "batch-size")
    if options.precision is not None:
        check_choice("--precision", options.precision, _PRECISIONS)
    trained = load_trained(options.checkpoint)
    first, found = own(trained), variants(trained, asked)
    if any(one != first for one in found):
        found = [unfused(trained), *found]
    precision, backend, batch = "auto", AUTO, _USUAL_BATCH
    if (config := trained.config) is not None:
        precision, backend = config.trainer.precision, config.ops.backend
        batch = config.trainer.batch_size // config.trainer.accumulation
    try:
        autocast = choose_precision(options.precision or precision, device)
    except FambaError as error:
        raise ConfigError(str(error).replace("trainer.precision=", "--precision ")) from error
    request = Request(
        str(options.checkpoint),
        trained,
        tuple(dict.fromkeys([first, *found])),
        _images(options.data, options.data_root, trained),
        options.subset,
        options.batch_size or batch,
        device,
        autocast,
        options.backend or backend,
    )
    try:
        with shared.chosen_backend(request.backend):
            resolve(device.type, autocast or torch.float32)
    except BackendError as error:
        raise BackendError(f"--backend: {error}") from error
    return request


def _images(name: str | None, root: str | None, trained: Trained) -> Images:
    """Return the test images to take: those of the training, unless --data names others."""
    config, classes, is_own, from_run = trained.config, None, name is None, root is None
    if name is None:
        if config is None:
            raise ConfigError(f"{trained.source} says no data set to evaluate it on; name one by --data")
        name = config.data.name
    elif name in groups()["data"]:
        chosen = compose([f"data={name}"]).data
        name, classes = chosen.name, chosen.num_classes
    if config is not None and name == config.data.name:
        is_own = is_own or name in data.PUBLISHED or root in (None, config.data.root)
        if is_own:
            root, classes = root or config.data.root, config.data.num_classes
    images = Images(name, root, classes, is_own)
    root_name = "the run's data.root (--data-root names another)" if from_run and is_own else "--data-root"
    with named({**_OPTIONS, "root": root_name}):
        data.check_request(name, root, subset=None, val_fraction=0.0, num_classes=classes)
        if (known := classes or data.num_classes_of(name)) is not None:
            _check_classes(trained, images, known)
        data.check_folder(name, root, trained.reading.version)
    return images


def _check_classes(trained: Trained, images: Images, found: int) -> None:
    """Raise ConfigError where images of so many classes are not what the network tells apart."""
    if found != trained.classes and not (images.own and found < trained.classes):
        raise ConfigError(
            f"{images.name} has {found} classes, the network tells {trained.classes} apart; evaluate it on data of its "
            "own classes by --data, or train from its weights on this data: python train.py init_from=WEIGHTS data=..."
        )


def evaluate(request: Request) -> Evaluation:
    """Evaluate as asked; a Ctrl-C keeps what is known by then.

    Raises:
        ConfigError, DataError: where the images turn out not to fit the network, or to be damaged.
        TrainingError: where memory runs out.
        KeyboardInterrupt: before the first batch is done.
    """
    source = _source(request)
    model, size = request.trained.model.to(request.device), request.trained.image_size
    contestants = [_Contestant(variant, Tally(request.device)) for variant in request.variants]
    macs = []
    try:
        with shared.chosen_backend(request.backend):
            interrupted = _race(request, contestants, source)
            for variant in request.variants:
                variant.put_into(model)
                macs.append(macs_per_image(model, size))
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise TrainingError(f"out of memory with {request.batch_size} images at once; less: --batch-size") from error
    if not contestants[-1].right:
        raise KeyboardInterrupt
    # The last may lack a batch that others have, where the interruption came between them.
    first = torch.cat(contestants[0].right)[: len(torch.cat(contestants[-1].right))]
    memory = [None] * len(macs) if interrupted else inference_memory(request)
    rows = [
        {
            "label": label,
            **asdict(replace(one.variant.fusion, budget=one.variant.removed)),
            "schedule": one.variant.schedule,
            "own": one.variant.own,
            "removed": one.variant.removed,
            "tokens_per_layer": tokens_per_layer(one.variant.schedule, model.num_tokens),
            **one.accuracy(first),
            "images_per_s": one.images_per_s(),
            "memory_mib": mib,
            "macs_per_image": count,
        }
        for label, one, mib, count in zip(label_variants(request.variants), contestants, memory, macs, strict=True)
    ]
    return Evaluation(request, rows, len(first), interrupted)


@dataclass
class _Contestant:
    """Collect the results of one variant. right: for each batch which images have their label ranked first (b,)."""

    variant: Variant
    tally: Tally
    times: list[tuple[int, float]] = field(default_factory=list)
    right: list[Tensor] = field(default_factory=list)

    def accuracy(self, first: Tensor) -> dict[str, Any]:
        """Return the columns of accuracy; first: what the variant that was trained gets right (n,)."""
        right, known = torch.cat(self.right)[: len(first)], self.tally.results()
        low, high = binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
        found: dict[str, Any] = {"top1": known["top1"], "top1_low95": 100 * low, "top1_high95": 100 * high}
        difference: tuple[float | None, ...] = (None,) * 3
        if not self.variant.own:
            gained, lost = int((right & ~first).sum()), int((first & ~right).sum())
            difference = 100 * (gained - lost) / len(right), *of_difference(gained, lost, len(right))
        names = ("difference", "difference_low95", "difference_high95")
        return found | dict(zip(names, difference, strict=True)) | {"top5": known["top5"], "loss": known["loss"]}

    def images_per_s(self) -> float | None:
        """Return the median over batches of full size: the last one may be smaller, and less of a load."""
        full = max(images for images, _ in self.times)
        return statistics.median(n / seconds for n, seconds in self.times if n == full)


def of_difference(gained: int, lost: int, images: int) -> tuple[float, float]:
    """Return the 95 % interval of a paired difference in Top-1, in points, over test images of the same kind.

    By Agresti and Min (Statistics in Medicine 24, 2005): Wald's interval after half an image more in each of the four
    cells, so that two networks that never differ are not said to be equal beyond doubt.

    Args:
        gained: images that this network gets right and the other does not.
        lost: images that the other gets right and this one does not.
        images: all of them.
    """
    gained_more, lost_more, total = gained + 0.5, lost + 0.5, images + 2
    middle = (gained_more - lost_more) / total
    half = norm.ppf(0.975) * (gained_more + lost_more - (gained_more - lost_more) ** 2 / total) ** 0.5 / total
    return 100 * max(-1.0, middle - half), 100 * min(1.0, middle + half)


def _race(request: Request, contestants: Sequence[_Contestant], source: Source) -> bool:
    """Let contestants take each batch in turn; return whether it was cut short."""
    device = request.device
    try:
        with tqdm(total=len(source), unit="image", file=sys.stderr, leave=False, mininterval=1) as bar:
            for number, (images, labels) in enumerate(_batches(request, source)):
                for one in contestants if number == 0 else ():  # what is compiled, tuned or allocated once
                    request.infer(one.variant, images)
                found = []
                for one in contestants:
                    synchronize(device)
                    began = time.perf_counter()
                    logits = request.infer(one.variant, images)
                    synchronize(device)
                    found.append((logits, time.perf_counter() - began))
                for one, (logits, seconds) in zip(contestants, found, strict=True):
                    one.tally.add(logits, labels)
                    one.times.append((len(labels), seconds))
                    # Ranked as Tally does.
                    best = logits.float().topk(min(5, logits.shape[1]), dim=1).indices[:, 0]
                    one.right.append((best == labels).cpu())
                bar.update(len(labels))
    except KeyboardInterrupt:
        return True
    return False


def _batches(request: Request, source: Source) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images (b, 3, s, s) and labels (b,) on the device."""
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
        workers=_USUAL_WORKERS if trained.config is None else trained.config.data.workers,
    )
    for images, labels in batches:
        yield images.to(request.device), labels.to(request.device)


def _source(request: Request) -> Source:
    """Return the test images, with the class numbers of the network's training."""
    wanted, subset, reading = request.images, request.subset, request.trained.reading
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
    if subset is None:
        return test
    if subset > len(test):
        raise ConfigError(f"--subset is {subset}; allowed: 1 to {len(test)}, the test images of {wanted.name}")
    return data.sample(test, subset, reading.version)


def _numbered_as_trained(request: Request, splits: data.Splits) -> Source:
    """Return the test images with the class numbers of the network's training; by name where names are known.

    Raises ConfigError where they hold a class that the network does not tell apart.
    """
    test, known, found = splits.test, request.trained.class_names, splits.classes
    if known is None or found is None:
        _check_classes(request.trained, request.images, test.num_classes)
        return test
    if strange := [name for name in found if name not in set(known)]:
        raise ConfigError(
            f"{request.images.name} has classes that the network was not trained on: {some(strange)}; it knows "
            f"{some(known)}. Evaluate it on images of its own classes, or train from its weights: "
            "python train.py init_from=WEIGHTS"
        )
    numbers = tuple(known.index(name) for name in found)
    if numbers == tuple(range(len(found))):
        return test
    return data.renumber(test, numbers, request.trained.classes)


def inference_memory(request: Request) -> list[float | None]:
    """Return the MiB that the inference of a batch adds to weights and images, for each variant.

    On CUDA what torch's allocator gives out at most. On Linux' CPUs the resident memory of a process of its own, where
    nothing is left over from other work. None elsewhere, and where memory runs out.
    """
    unknown: list[float | None] = [None] * len(request.variants)
    if request.device.type == "cuda":
        return _added(request)
    if request.device.type != "cpu" or platform.system() != "Linux":
        return unknown
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    order = replace(request, trained=None)  # type: ignore[arg-type]  # loaded again there
    process = context.Process(target=_answer, args=(sender, order, torch.get_num_threads()), daemon=True)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except (EOFError, KeyboardInterrupt):
        return unknown
    finally:
        process.kill()
        process.join()


def _answer(sender: Connection, order: Request, threads: int) -> None:
    # Ctrl-C reaches every process of the terminal; the parent ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    return_freed_memory()
    sender.send(_added(replace(order, trained=load_trained(order.path))))


def _added(request: Request) -> list[float | None]:
    size, found = request.trained.image_size, list[float | None]()
    images = torch.randn(request.batch_size, 3, size, size, generator=torch.Generator().manual_seed(0))
    images = images.to(request.device)
    with shared.chosen_backend(request.backend):
        for variant in request.variants:
            request.infer(variant, images)  # what the kernels allocate once
            reset_peak_memory(request.device)
            before = peak_memory_mib(request.device)
            request.infer(variant, images)
            found.append(peak_memory_mib(request.device) - before)
    return found
