"""Every kind of image becomes the picture that a viewer shows, on a background where it is transparent."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from famba.data import open_image
from famba.data.images import decode_rgb, to_rgb
from famba.errors import ConfigError, DataError

ORIENTATION = 0x0112
# A red corner shows how an image is turned.
CORNER = np.zeros((4, 6, 3), np.uint8)
CORNER[0, 0] = 255, 0, 0
BEHIND = "#102030"
COLOUR = (16, 32, 48)


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[ORIENTATION] = orientation
    return found


def pixels(path: Path, background: str = "white") -> list[Any]:
    return np.asarray(open_image(path, background)).tolist()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, bits: int, colour: int, rows: list[bytes], transparent: bytes) -> bytes:
    """A PNG of any depth, with a transparent colour; Pillow writes few of them."""
    header = struct.pack(">IIBBBBB", width, len(rows), bits, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [chunk(b"IHDR", header), chunk(b"tRNS", transparent), chunk(b"IDAT", data), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("values", [[0, 257, 32_896, 65_535], [0, 128, 129, 65_535 - 129]])
@pytest.mark.parametrize("suffix", ["png", "tif", "pgm", "jp2"])
def test_16_bits_of_grey_are_scaled_by_their_range(tmp_path: Path, values: list[int], suffix: str) -> None:
    path = tmp_path / f"grey.{suffix}"
    Image.fromarray(np.array([values], np.uint16)).save(path)
    expected = [[round(value / 257)] * 3 for value in values]
    assert pixels(path) == [expected]


def test_bytes_of_a_big_endian_tiff_are_not_swapped(tmp_path: Path) -> None:
    path = tmp_path / "big.tif"
    Image.fromarray(np.array([[256, 65_280]], ">u2")).save(path)
    assert pixels(path) == [[[1] * 3, [254] * 3]]


@pytest.mark.parametrize(("zero", "expected"), [(1, [0, 255]), (0, [255, 0])])
def test_a_tiff_says_whether_zero_is_black(tmp_path: Path, zero: int, expected: list[int]) -> None:
    path = tmp_path / "grey.tif"
    Image.fromarray(np.array([[0, 65_535]], np.uint16)).save(path, tiffinfo={262: zero})
    assert pixels(path) == [[[value] * 3 for value in expected]]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.array([[0, 2**20]], np.int32), "integers"),
        (np.array([[-5, 5]], np.int32), "integers"),
        (np.array([[0.25, 1e4]], np.float32), "floats"),
    ],
)
def test_values_of_no_known_range_are_refused_by_name(tmp_path: Path, values: Any, said: str) -> None:
    path = tmp_path / "depth.tiff"
    Image.fromarray(values).save(path)
    with pytest.raises(
        DataError, match=rf"depth\.tiff: .*its pixels are {said} of no known range: scale them, and save"
    ):
        open_image(path)


def transparent(mode: str) -> Image.Image:
    """One transparent pixel, one half so, one opaque; all of them black."""
    image = Image.new("RGBA", (3, 1))
    for place, alpha in enumerate((0, 128, 255)):
        image.putpixel((place, 0), (0, 0, 0, alpha))
    return image.convert(mode)


@pytest.mark.parametrize(("mode", "suffix"), [("RGBA", "png"), ("LA", "png"), ("RGBA", "webp"), ("RGBA", "tif")])
@pytest.mark.parametrize(("background", "colour"), [("white", (255, 255, 255)), (BEHIND, COLOUR)])
def test_what_is_transparent_shows_the_background(
    tmp_path: Path, mode: str, suffix: str, background: str, colour: tuple[int, int, int]
) -> None:
    path = tmp_path / f"shape.{suffix}"
    image = transparent(mode)
    image.save(path, **({"lossless": True, "exact": True} if suffix == "webp" else {}))
    (row,) = pixels(path, background)
    assert row[0] == list(colour)
    assert row[1] == pytest.approx([value * 127 / 255 for value in colour], abs=1)
    assert row[2] == [0, 0, 0]


@pytest.mark.parametrize("mode", ["La", "PA", "RGBa"])
def test_rare_kinds_of_alpha_show_the_background(mode: str) -> None:
    image = Image.new(mode, (1, 1))
    assert to_rgb(image, COLOUR).getpixel((0, 0)) == COLOUR


def test_palettes_may_be_transparent(tmp_path: Path) -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([0, 0, 0, 10, 20, 30, 200, 100, 50])
    for place in range(3):
        image.putpixel((place, 0), place)
    image.save(tmp_path / "one.gif", transparency=1)
    image.save(tmp_path / "one.png", transparency=1)
    image.save(tmp_path / "several.png", transparency=b"\xff\x00\x80")
    for name in ("one.gif", "one.png"):
        assert pixels(tmp_path / name) == [[[0, 0, 0], [255, 255, 255], [200, 100, 50]]], name
    half = [round(value * 128 / 255 + 127) for value in (200, 100, 50)]
    assert pixels(tmp_path / "several.png")[0][:2] == [[0, 0, 0], [255, 255, 255]]
    assert pixels(tmp_path / "several.png")[0][2] == pytest.approx(half, abs=1)


@pytest.mark.parametrize(
    ("bits", "colour", "row", "clear", "opaque"),
    [
        (1, 0, b"\x40", struct.pack(">H", 0), [255] * 3),
        (2, 0, b"\x40", struct.pack(">H", 1), [0] * 3),
        (4, 0, b"\xf0", struct.pack(">H", 15), [0] * 3),
        (8, 0, b"\x07\x09", struct.pack(">H", 7), [9] * 3),
        (16, 0, b"\x01\x02\x80\x80", struct.pack(">H", 0x0102), [128] * 3),
        (8, 2, b"\x01\x02\x03\x04\x05\x06", struct.pack(">HHH", 1, 2, 3), [4, 5, 6]),
        (
            16,
            2,
            b"\x80\x01\x20\x02\x30\x03\x04\x00\x05\x00\x06\x00",
            struct.pack(">HHH", 0x8001, 0x2002, 0x3003),
            [4, 5, 6],
        ),
    ],
    ids=["1", "2", "4", "8", "16", "8 rgb", "16 rgb"],
)
def test_the_transparent_colour_of_a_png_is_found_at_every_depth(
    bits: int, colour: int, row: bytes, clear: bytes, opaque: list[int]
) -> None:
    image = decode_rgb(io.BytesIO(png(2, bits, colour, [row], clear)), COLOUR)
    assert np.asarray(image).tolist() == [[list(COLOUR), opaque]]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_stand_upright(tmp_path: Path, suffix: str, orientation: int) -> None:
    path = tmp_path / f"turned.{suffix}"
    big = np.kron(CORNER, np.ones((16, 16, 1), np.uint8))
    Image.fromarray(big).save(path, exif=exif(orientation))
    size, corner = {
        1: ((6, 4), (0, 0)),
        2: ((6, 4), (5, 0)),
        3: ((6, 4), (5, 3)),
        4: ((6, 4), (0, 3)),
        5: ((4, 6), (0, 0)),
        6: ((4, 6), (3, 0)),
        7: ((4, 6), (3, 5)),
        8: ((4, 6), (0, 5)),
    }[orientation]
    found = open_image(path)
    assert found.size == (size[0] * 16, size[1] * 16)
    reds = np.argwhere(np.asarray(found)[..., 0] > 128).mean(0) // 16
    assert reds[::-1].tolist() == list(corner)


def test_an_image_that_was_turned_is_not_turned_again(tmp_path: Path) -> None:
    path, again = tmp_path / "turned.jpg", tmp_path / "again.png"
    Image.fromarray(CORNER).save(path, exif=exif(6))
    once = open_image(path)
    once.save(again, exif=once.getexif())
    assert open_image(again).size == once.size == (4, 6)


def test_transparency_16_bits_and_orientation_come_together(tmp_path: Path) -> None:
    path = tmp_path / "all.png"
    Image.fromarray(np.array([[0, 65_535], [0, 257]], np.uint16)).save(path, exif=exif(6), transparency=0)
    assert pixels(path, BEHIND) == [[list(COLOUR), list(COLOUR)], [[1] * 3, [255] * 3]]


def test_damaged_exif_turns_nothing(tmp_path: Path) -> None:
    path = tmp_path / "odd.jpg"
    Image.fromarray(CORNER).save(path, exif=b"Exif\0\0not EXIF at all")
    assert open_image(path).size == (6, 4)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK"])
def test_other_kinds_are_converted(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGB", (2, 2), "white").convert(mode)
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    image.save(path)
    assert pixels(path) == [[[255, 255, 255]] * 2] * 2


def test_comments_do_not_matter(tmp_path: Path) -> None:
    info = PngInfo()
    info.add_text("Comment", "x" * 1000)
    Image.fromarray(CORNER).save(tmp_path / "said.png", pnginfo=info)
    assert pixels(tmp_path / "said.png") == CORNER.tolist()


@pytest.mark.parametrize("background", ["wihte", "#12345", "#11223344", "", "12"])
def test_a_background_that_is_no_colour_is_refused(tmp_path: Path, background: str) -> None:
    with pytest.raises(ConfigError, match="is no colour; allowed: a name such as white") as caught:
        open_image(tmp_path / "any.png", background)
    assert caught.value.argument == "background"


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    for name, said in (("text.png", "of no kind that Pillow knows"), ("absent.png", "No such file")):
        with pytest.raises(DataError, match=rf"{name}: not a readable image \(.*{said}"):
            open_image(tmp_path / name)
