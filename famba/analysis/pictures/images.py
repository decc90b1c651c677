"""Images for pictures: from files as evaluation would see them, or two photos that come with scikit-learn."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from famba.data.augment import Normalize, evaluation_scaling
from famba.data.images import Colour, decode_rgb, naming
from famba.errors import DataError
from famba.training.weights import Trained

SAMPLES_NOTE = (
    "Photos: china.jpg by flickr.com/photos/danielbuechele, flower.jpg by flickr.com/photos/vultilion, both CC BY 2.0 "
    "(creativecommons.org/licenses/by/2.0), cropped and scaled; they come with scikit-learn."
)
_LONGEST_NAME = 80
_UNUSUAL = re.compile(r"[^\w.+-]+")


@dataclass(frozen=True)
class Shown:
    """An image under the name that its picture gets. pixels: uint8 (3, s, s), square and of the network's size."""

    name: str
    pixels: Tensor


def read_images(trained: Trained, files: Sequence[str]) -> list[Shown]:
    """Read image files, decoded, scaled and cropped as evaluation does; the samples where none are given.

    Raises DataError naming the file that is missing or is no image.
    """
    background = trained.reading.colour
    found = [(Path(file).stem, _read(Path(file), background)) for file in files] if files else list(_samples())
    scaling = evaluation_scaling(trained.scaling, trained.image_size)
    names = _distinct(name for name, _ in found)
    return [Shown(name, scaling.image(image)) for name, (_, image) in zip(names, found, strict=True)]


def normalized(trained: Trained, images: Sequence[Shown]) -> Tensor:
    """What the network takes, float32 (n, 3, s, s)."""
    return Normalize(trained.mean, trained.std)(torch.stack([image.pixels for image in images]))


def _read(file: Path, background: Colour | None) -> Image.Image:
    if not file.is_file():
        what = "is a folder; give the image files in it" if file.is_dir() else "is not there; give image files"
        raise DataError(f"{file} {what}")
    with naming(lambda: str(file)), open(file, "rb") as opened:
        try:
            return decode_rgb(opened, background)
        except UnidentifiedImageError:  # whose own message names Python's file object
            raise DataError(f"{file} is no image of a kind that Pillow knows; give PNG, JPEG or the like") from None


def _samples() -> Iterable[tuple[str, Image.Image]]:
    from sklearn.datasets import load_sample_images  # takes a second, and only these images need it

    found = load_sample_images()
    for file, image in zip(found.filenames, found.images, strict=True):
        yield Path(file).stem, Image.fromarray(image)


def _distinct(names: Iterable[str]) -> list[str]:
    """Names for files, without what shells and systems stumble over; equal ones get a number."""
    found: list[str] = []
    for name in names:
        plain = _UNUSUAL.sub("_", name)[:_LONGEST_NAME] or "image"
        candidates = [plain, *(f"{plain}_{number}" for number in range(2, len(found) + 3))]
        found.append(next(name for name in candidates if name not in found))
    return found
