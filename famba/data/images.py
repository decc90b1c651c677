"""Read images: upright, in RGB, on a background where they are transparent; or as Famba 0.1 did."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeAlias

import numpy as np
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from famba.errors import ConfigError, DataError, near_miss

Colour: TypeAlias = tuple[int, int, int]  # red, green and blue in 0..255
_TIFF_BITS, _TIFF_PHOTOMETRIC, _MIN_IS_WHITE = 258, 262, 0  # two tags, and a value of the second


@dataclass(frozen=True)
class Reading:
    """Says how folders and images are read.

    version: 2; or 1 for what Famba 0.1 did: innermost folders are classes, `.png`, `.jpg` and `.jpeg` alone are images,
    transparency and orientation are dropped, 16 bits are cut off. background: the colour behind transparent images, a
    name as in CSS or "#rrggbb"; version 1 has none. Raises ConfigError for anything else.
    """

    version: int = 2
    background: str = "white"

    def __post_init__(self) -> None:
        if self.version not in (1, 2):
            raise ConfigError(f"version is {self.version}; allowed: 2, or 1 to read as Famba 0.1 did.", "version")
        if _colour(self.background) != (255, 255, 255) and self.version == 1:
            said = f"background is {self.background!r}, but version 1 drops transparency"
            raise ConfigError(f"{said}; leave it out, or use version 2.", "background")

    @property
    def colour(self) -> Colour | None:
        """Return the background as `to_rgb` takes it: None for version 1."""
        return None if self.version == 1 else _colour(self.background)


def _colour(name: str) -> Colour:
    with suppress(ValueError):
        colour = ImageColor.getrgb(name)
        if len(colour) == 3:  # a fourth value is transparency
            return colour
    hint = near_miss(name, ImageColor.colormap)
    said = f'background {name!r} is no colour; allowed: a name such as white or black, or "#rrggbb"{hint}'
    raise ConfigError(said, "background")


@contextmanager
def naming(where: Callable[[], str]) -> Iterator[None]:
    """Turn every error of reading an image into a DataError that says which image it was; `where` is called then."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, zlib.error, ...
        reason = str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):  # whose own message names Python's file object
            reason = "of no kind that Pillow knows"
        raise DataError(f"{where()}: not a readable image ({reason}). Replace or remove it.") from error


def open_image(path: str | Path, background: str = "white") -> Image.Image:
    """Read an image file as training and evaluation do: upright, in RGB, on a background where it is transparent.

    background: a colour's name, as in CSS, or "#rrggbb". Raises ConfigError where it is no colour; DataError where the
    file cannot be read, or its values have no known range.
    """
    return read_file(path, Reading(background=background).colour)


def read_file(path: str | Path, background: Colour | None) -> Image.Image:
    """Read one image file as `to_rgb` does. Raises DataError that names the file."""
    with naming(lambda: str(path)), open(path, "rb") as file:
        return decode_rgb(file, background)


def decode_rgb(file: IO[bytes], background: Colour | None) -> Image.Image:
    """Read one image as `to_rgb` does; raises whatever Pillow does, so call it under `naming`."""
    with Image.open(file) as image:
        return to_rgb(image, background)


def to_rgb(image: Image.Image, background: Colour | None) -> Image.Image:
    """Return an image, as `Image.open` gives it, upright and in RGB; raises as `decode_rgb` does.

    EXIF orientation is undone, transparent pixels show the background, more than 8 bits of grey are scaled to 8.
    Without a background it is `image.convert("RGB")` alone, as in Famba 0.1.
    """
    if background is None:
        return image.convert("RGB")
    image.load()
    with suppress(Exception):  # damaged EXIF says nothing; the pixels are whole, and viewers show them as stored
        ImageOps.exif_transpose(image, in_place=True)
    upright = _eight_bits(image)
    if upright.has_transparency_data:
        # Premultiplied grey converts to grey alone.
        layer = (upright.convert("LA") if upright.mode == "La" else upright).convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", layer.size, (*background, 255)), layer)
    rgb = upright.convert("RGB")
    rgb.info = {}  # EXIF and colour profiles are of the file, not of these pixels
    return rgb


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale grey of more than 8 bits by its range; leave other images."""
    if image.mode[0] not in "IF":
        return image
    # 16 bits, which Pillow gives in 32 for PPM, and before Pillow 11 for PNG. FITS shifts them by what its header says.
    known = image.format in ("PNG", "PPM") if image.mode == "I" else image.mode != "F" and image.format != "FITS"
    if not known:
        kind = "floats" if image.mode == "F" else "integers"
        raise ValueError(f"its pixels are {kind} of no known range: scale them, and save it with 8 or 16 bits, as PNG")
    tags = getattr(image, "tag_v2", {})
    top = 4095 if tags.get(_TIFF_BITS) == (12,) else 65_535
    scaled = (np.asarray(image).astype(np.int64) * 255 + top // 2) // top
    return Image.fromarray((255 - scaled if tags.get(_TIFF_PHOTOMETRIC) == _MIN_IS_WHITE else scaled).astype(np.uint8))
