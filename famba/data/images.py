"""Pillow images: decoding with a useful error, scaling, and conversion to tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, TypeVar

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as vision

from famba.errors import DataError

ImageOrBatch = TypeVar("ImageOrBatch", Image.Image, torch.Tensor)


@contextmanager
def naming(where: Callable[[], str]) -> Iterator[None]:
    """Turn whatever goes wrong while an image is read into a DataError that says where it was.

    `where` is called only then: some data sets must read an image to tell its name.
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, zlib.error, ...
        reason = str(error) or type(error).__name__
        raise DataError(f"{where()}: not a readable image ({reason}). Replace or remove it.") from error


def decode_rgb(file: IO[bytes]) -> Image.Image:
    """Read one image as RGB; raises whatever Pillow does, so call it under `naming`."""
    with Image.open(file) as image:
        return image.convert("RGB")


def fit(image: ImageOrBatch, side: int, crop: int, interpolation: str) -> ImageOrBatch:
    """Scale the shorter side to `side` pixels, keeping the shape, and cut out the central `crop` pixels.

    Args:
        image: an RGB image, or a float tensor (b, 3, h, w) with values in 0..255; a tensor keeps that range.
        side: pixels, at least `crop`.
        crop: pixels of the square that is returned.
        interpolation: "bilinear" or "bicubic", antialiased.
    """
    scaled = vision.resize(image, side, InterpolationMode(interpolation), antialias=True)
    if isinstance(scaled, torch.Tensor) and scaled is not image:
        scaled = scaled.clamp(0, 255)  # bicubic weights overshoot at edges
    return vision.center_crop(scaled, [crop, crop])


def to_tensor(image: Image.Image) -> torch.Tensor:
    """Return uint8 (3, h, w)."""
    return vision.pil_to_tensor(image)
