"""Make small images, data sets and loaders for the tests of data."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from famba.data import ArraySource, Augmentation, Batch, Loading, Splits, eval_batches, load_splits, train_batches

BATCH = Augmentation(
    kind="batch",
    crop_padding=2,
    hflip=0.5,
    auto_augment=None,
    color_jitter=0.0,
    random_erasing=0.0,
    erasing_mode="pixel",
    interpolation="bicubic",
    eval_crop=1.0,
)
PLAIN = replace(BATCH, crop_padding=0, hflip=0.0)
TIMM = replace(PLAIN, kind="timm", hflip=0.5, auto_augment="rand-m9-mstd0.5-inc1", random_erasing=0.5)
POLICY = replace(TIMM, kind="batch", crop_padding=None)


def load(name: str, root: Path | None = None, **changes: Any) -> Splits:
    return load_splits(name, root, **{"subset": None, "val_fraction": 0.0, "num_classes": None, **changes})


def training(source: Any, augmentation: Augmentation = BATCH, **changes: Any) -> Any:
    usual = {"seed": 3, "batch_size": 8, "accumulation": 1, "repeats": 1}
    numbers = {name: changes.pop(name, number) for name, number in usual.items()}
    return train_batches(source, augmentation, _loading(**changes), **numbers)


def evaluation(source: Any, augmentation: Augmentation = PLAIN, batch_size: int = 4, **loading: Any) -> Any:
    return eval_batches(source, augmentation, _loading(**loading), batch_size)


def _loading(**changes: Any) -> Loading:
    return Loading(**{"image_size": 8, "mean": (0.0,) * 3, "std": (1.0,) * 3, **changes})


def labels_in(batches: Iterable[Batch]) -> list[int]:
    return [int(label) for _, labels in batches for label in labels]


def assert_same(one: Iterable[Batch], other: Iterable[Batch]) -> None:
    one = list(one)
    assert one
    torch.testing.assert_close(one, list(other), rtol=0, atol=0)


def arrays(count: int = 26, side: int = 8) -> ArraySource:
    """Return random images without black; the label of each is its number."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(1, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
    return ArraySource(images, torch.arange(count), count)


def red(source: Any) -> list[int]:
    """Return the red of each image's corner."""
    return [source.image(index).getpixel((0, 0))[0] for index in range(len(source))]


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def encoded(value: int = 0, kind: str = "PNG") -> bytes:
    return saved(Image.new("RGB", (8, 8), (value, 0, 0)), kind)


def write(root: Path, names: Iterable[str], content: bytes | None = None) -> None:
    """Write files; without content the red of each image is its number."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(number) if content is None else content)
