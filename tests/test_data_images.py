"""Every kind of image becomes the picture that a viewer shows, on a background where it is transparent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from famba.data import open_image
from famba.data.images import to_rgb
from famba.errors import DataError

BEHIND, COLOUR = "#102030", (16, 32, 48)


def pixels(path: Path, background: str = "white") -> list[Any]:
    return np.asarray(open_image(path, background)).tolist()


BITS_16 = [0, 128, 129, 257, 32_896, 65_535 - 129, 65_535]
EIGHT = [0, 0, 1, 1, 128, 254, 255]


@pytest.mark.parametrize(
    ("suffix", "kind", "options", "expected"),
    [
        *((suffix, np.uint16, {}, EIGHT) for suffix in ("png", "tif", "pgm", "jp2")),
        ("tif", ">u2", {}, EIGHT),  # big-endian, whose bytes are not swapped
        ("tif", np.uint16, {"tiffinfo": {262: 1}}, EIGHT),
        ("tif", np.uint16, {"tiffinfo": {262: 0}}, [255 - value for value in EIGHT]),  # whose zero is white
    ],
)
def test_16_bits_of_grey_are_scaled_by_their_range(
    tmp_path: Path, suffix: str, kind: Any, options: dict[str, Any], expected: list[int]
) -> None:
    path = tmp_path / f"grey.{suffix}"
    Image.fromarray(np.array([BITS_16]).astype(kind)).save(path, **options)
    assert pixels(path) == [[[value] * 3 for value in expected]]


@pytest.mark.parametrize(("kind", "said"), [(np.int32, "integers"), (np.float32, "floats")])
def test_values_of_no_known_range_are_refused_by_name(tmp_path: Path, kind: Any, said: str) -> None:
    Image.fromarray(np.array([[0, 2**20]], kind)).save(tmp_path / "depth.tiff")
    with pytest.raises(DataError, match=rf"depth\.tiff: .*pixels are {said} of no known range: scale them, and save"):
        open_image(tmp_path / "depth.tiff")


@pytest.mark.parametrize(
    ("mode", "suffix", "options"),
    [("RGBA", "png", {}), ("LA", "png", {}), ("RGBA", "webp", {"lossless": True, "exact": True}), ("RGBA", "tif", {})],
)
@pytest.mark.parametrize(("background", "colour"), [("white", (255, 255, 255)), (BEHIND, COLOUR)])
def test_what_is_transparent_shows_the_background(
    tmp_path: Path, mode: str, suffix: str, options: dict[str, Any], background: str, colour: tuple[int, int, int]
) -> None:
    path = tmp_path / f"shape.{suffix}"
    black = np.zeros((1, 3, 4), np.uint8)
    black[0, :, 3] = 0, 128, 255
    Image.fromarray(black).convert(mode).save(path, **options)
    ((clear, half, opaque),) = pixels(path, background)
    assert (clear, opaque) == (list(colour), [0, 0, 0])
    assert half == pytest.approx([value * 127 / 255 for value in colour], abs=1)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_images_stand_upright(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"turned.{suffix}"
    image = Image.new("RGB", (96, 64))
    image.paste((255, 0, 0), (0, 0, 16, 16))  # a red corner shows how it is turned
    corners = [(0, 0), (5, 0), (5, 3), (0, 3), (0, 0), (3, 0), (3, 5), (0, 5)]  # (x, y) of each orientation
    for orientation, corner in enumerate(corners, 1):
        image.getexif()[0x0112] = orientation
        image.save(path, exif=image.getexif())
        found = open_image(path)
        assert found.size == ((96, 64) if orientation < 5 else (64, 96))
        reds = np.argwhere(np.asarray(found)[..., 0] > 128).mean(0) // 16
        assert tuple(reds[::-1]) == corner, orientation


@pytest.mark.parametrize("mode", ["La", "PA", "RGBa", "1", "L", "P", "RGB", "CMYK"])
def test_rare_kinds_are_converted_and_their_alpha_shows_the_background(mode: str) -> None:
    found = to_rgb(Image.new(mode, (1, 1), 0 if mode != "CMYK" else (255, 255, 255, 255)), COLOUR)
    assert found.getpixel((0, 0)) == (COLOUR if mode in ("La", "PA", "RGBa") else (0, 0, 0))
