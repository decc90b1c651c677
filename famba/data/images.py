"""Pillow images: decoding with a useful error, scaling, and conversion to tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as vision

from famba.data.reading import Colour, Reading
from famba.errors import DataError

ImageOrBatch = TypeVar("ImageOrBatch", Image.Image, torch.Tensor)

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each EXIF orientation."""
_SIXTEEN_BITS = 65_535
_TIFF_BITS, _TIFF_PHOTOMETRIC = 258, 262  # numbers of tags
_MIN_IS_WHITE = 0


class _UnknownRangeError(ValueError):
    """Values of an image whose range its mode does not tell."""


@contextmanager
def naming(where: Callable[[], str]) -> Iterator[None]:
    """Turn whatever goes wrong while an image is read into a DataError that says where it was.

    `where` is called only then: some data sets must read an image to tell its name.
    """
    try:
        yield
    except DataError:
        raise
    except _UnknownRangeError as error:
        raise DataError(f"{where()}: {error}") from error
    except UnidentifiedImageError:  # whose own message names Python's file object
        raise DataError(
            f"{where()}: not a readable image (of no kind that Pillow knows). Replace or remove it."
        ) from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, zlib.error, ...
        reason = str(error) or type(error).__name__
        raise DataError(f"{where()}: not a readable image ({reason}). Replace or remove it.") from error


def open_image(path: str | Path, background: str = "white") -> Image.Image:
    """Read an image file as training and evaluation do: upright, in RGB, on a background where it is transparent.

    What else the file holds, such as EXIF and colour profiles, is left out.

    Args:
        path: a file of any kind that Pillow reads.
        background: a colour's name, as in CSS, or "#rrggbb".

    Raises:
        ConfigError: the background is no colour.
        DataError: the file cannot be read, or holds values of no known range.
    """
    return read_file(path, Reading(background=background).colour)


def read_file(path: str | Path, background: Colour | None) -> Image.Image:
    """Read one image file as RGB, background as in `to_rgb`. Raises DataError that names the file."""
    with naming(lambda: str(path)), open(path, "rb") as file:
        return decode_rgb(file, background)


def decode_rgb(file: IO[bytes], background: Colour | None) -> Image.Image:
    """Read one image as RGB; raises whatever Pillow does, so call it under `naming`.

    background: as in `to_rgb`.
    """
    with Image.open(file) as image:
        return to_rgb(image, background)


def to_rgb(image: Image.Image, background: Colour | None) -> Image.Image:
    """Return an image upright and in RGB; raises as `decode_rgb` does.

    EXIF orientation is undone, transparent pixels show the background, 16 bits of grey are scaled to 8. Integers and
    floats of no known range are refused.

    Args:
        image: as `Image.open` gives it.
        background: red, green and blue; None for what Famba 0.1 did, which is `image.convert("RGB")` alone.
    """
    if background is None:
        return image.convert("RGB")
    _scale_transparency(image)
    image.load()
    turn = _UPRIGHT.get(_orientation(image))
    grey = _eight_bits(image)
    upright = grey if turn is None else grey.transpose(turn)
    if upright.has_transparency_data:
        # Premultiplied grey converts to grey alone.
        layer = (upright.convert("LA") if upright.mode == "La" else upright).convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", layer.size, (*background, 255)), layer)
    rgb = upright.convert("RGB")
    rgb.info = {}  # whose EXIF would turn it once more
    return rgb


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 (upright) where there is none."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # EXIF that is damaged tells nothing, and the pixels are whole: every viewer shows them as stored
        return 1


def _scale_transparency(image: Image.Image) -> None:
    """Bring the transparent colour of a PNG to the 8 bits that its pixels will have; Pillow leaves it as stored."""
    given = image.info.get("transparency")
    if given is None or not isinstance(image, PngImageFile) or not image.tile:
        return
    stored = image.tile[0][3]
    if stored in ("L;2", "L;4"):
        image.info["transparency"] = given * (85 if stored == "L;2" else 17)
    elif stored == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in given)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale grey of more than 8 bits by its range, with alpha where a value is transparent; leave other images."""
    if not image.mode.startswith("I") and image.mode != "F":
        return image
    if not _range_is_known(image):
        raise _UnknownRangeError(
            f"its pixels are {'floats' if image.mode == 'F' else 'integers'} (mode {image.mode} in {image.format}) of "
            "no known range. Scale them, and save the image with 8 or 16 bits, as PNG."
        )
    tags = getattr(image, "tag_v2", {})
    top = 4095 if tags.get(_TIFF_BITS) == (12,) else _SIXTEEN_BITS
    values = np.asarray(image).astype(np.int64)
    scaled = (values * 255 + top // 2) // top
    if tags.get(_TIFF_PHOTOMETRIC) == _MIN_IS_WHITE:
        scaled = 255 - scaled
    grey = Image.fromarray(scaled.astype(np.uint8))
    if "transparency" not in image.info:
        return grey
    alpha = np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)
    return Image.merge("LA", (grey, Image.fromarray(alpha)))


def _range_is_known(image: Image.Image) -> bool:
    if image.mode == "I":  # 16 bits, which Pillow gives in 32: of PPM, and before Pillow 11 of PNG
        return image.format in ("PNG", "PPM")
    return image.mode.startswith("I;16") and image.format != "FITS"  # which shifts them by what its header says


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
