"""What is evaluated on what, checked before any image is read."""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from famba import data, ops
from famba.analysis.fusion_options import read_options
from famba.analysis.variants import Asked, Variant, own, unfused, variants
from famba.errors import BackendError, ConfigError, FambaError, named
from famba.ops.registry import AUTO, resolve
from famba.training.compose import compose, groups
from famba.training.devices import choose_device, choose_precision, make_current
from famba.training.weights import Trained, load_trained

_PRECISIONS = ("auto", "fp32", "bf16", "fp16")
_USUAL_BATCH, _USUAL_WORKERS = 100, 2
_OPTIONS = {"name": "--data", "root": "--data-root"}


@dataclass(frozen=True)
class Images:
    """Test images by name, as in `famba.data.load_splits`; own: whether they are of the data that trained the model."""

    name: str
    root: str | None
    num_classes: int | None
    own: bool
    subset: int | None
    workers: int


@dataclass(frozen=True)
class Request:
    """An evaluation that can begin. path: what the network is loaded from, also in another process.

    variants: first the one that the network was trained with, to which the others are compared.
    """

    path: str
    trained: Trained
    variants: tuple[Variant, ...]
    images: Images
    batch_size: int
    device: torch.device
    autocast: torch.dtype | None
    backend: str

    def chosen_backend(self) -> AbstractContextManager[None]:
        """Let ops inside the block be computed by the backend that was asked for."""
        return nullcontext() if self.backend == AUTO else ops.use_backend(self.backend)

    def autocasting(self) -> torch.autocast:
        """Let the network inside the block compute in the precision that was asked for."""
        return torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None)


def check(options: argparse.Namespace) -> Request:
    """Load the network, and check everything that is asked of it.

    Raises FambaError for what cannot work; no image is read.
    """
    asked = read_options(options)
    device = _device(options.device)
    for name in ("subset", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; allowed: 1 or more")
    if options.precision is not None and options.precision not in _PRECISIONS:
        raise ConfigError(f"--precision is {options.precision!r}; allowed: {', '.join(_PRECISIONS)}")
    trained = load_trained(options.checkpoint)
    config = trained.config
    compared = _compared(trained, asked)
    precision = options.precision or ("auto" if config is None else config.trainer.precision)
    autocast = _precision(precision, device)
    backend = options.backend or (AUTO if config is None else config.ops.backend)
    batch_size = options.batch_size or (
        _USUAL_BATCH if config is None else config.trainer.batch_size // config.trainer.accumulation
    )
    request = Request(
        str(options.checkpoint),
        trained,
        compared,
        _images(options, trained),
        batch_size,
        device,
        autocast,
        backend,
    )
    try:
        with request.chosen_backend():
            resolve(device.type, autocast or torch.float32)
    except BackendError as error:
        raise BackendError(f"--backend: {error}") from error
    return request


def _compared(trained: Trained, asked: Asked) -> tuple[Variant, ...]:
    """What is evaluated: the network as trained, what was asked for, and beside that the network without fusion."""
    first, found = own(trained), variants(trained, asked)
    if any(one != first for one in found):
        found = [unfused(trained), *found]
    return tuple(dict.fromkeys([first, *found]))


def _images(options: argparse.Namespace, trained: Trained) -> Images:
    config = trained.config
    name, root, classes = options.data, options.data_root, None
    if name is None:
        if config is None:
            raise ConfigError(f"{trained.source} says no data set to evaluate it on; name one by --data")
        name, classes, is_own = config.data.name, config.data.num_classes, True
        root = root or config.data.root
    else:
        if name in groups()["data"]:
            chosen = compose([f"data={name}"]).data
            name, classes = chosen.name, chosen.num_classes
        is_own = (
            config is not None
            and name == config.data.name
            and (name in data.PUBLISHED or root in (None, config.data.root))
        )
        if is_own and config is not None:
            root, classes = root or config.data.root, config.data.num_classes
    images = Images(
        name, root, classes, is_own, options.subset, _USUAL_WORKERS if config is None else config.data.workers
    )
    with named({name: _OPTIONS.get(name, f"data.{name}") for name in ("name", "root", "num_classes")}):
        data.check_request(name, root, subset=None, val_fraction=0.0, num_classes=classes)
        known = classes or data.num_classes_of(name)
        if known is not None:
            check_classes(trained, images, known)
        data.check_folder(name, root, trained.reading.version)
    return images


def check_classes(trained: Trained, images: Images, found: int) -> None:
    """Raise ConfigError where images of so many classes are not what the network tells apart."""
    if found == trained.classes or (images.own and found < trained.classes):
        return
    raise ConfigError(
        f"{images.name} has {found} classes, the network tells {trained.classes} apart; evaluate it on data of its own "
        "classes by --data, or train from its weights on this data: python train.py init_from=WEIGHTS data=..."
    )


def _device(name: str) -> torch.device:
    try:
        device = choose_device(name)
    except ConfigError as error:
        raise ConfigError(str(error).replace("trainer.device", "--device")) from error
    make_current(device)
    return device


def _precision(name: str, device: torch.device) -> torch.dtype | None:
    try:
        return choose_precision(name, device)
    except FambaError as error:
        raise ConfigError(str(error).replace("trainer.precision=", "--precision ")) from error
