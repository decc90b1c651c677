"""Pictures show what the model did: borders where the trace has them, and mean colours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from famba.analysis.visualize import PRUNED, Grid, Row, draw_patches, mean_colours
from famba.cli import main as famba

Printed = pytest.CaptureFixture[str]
Trained = tuple[Path, dict[str, Any]]


def grid(text: str) -> Grid:
    return np.array([[ord(letter) for letter in line] for line in text.split()], dtype=np.int64)


def test_patches_of_a_token_have_their_mean_colour_and_lone_ones_their_pixels() -> None:
    image = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    filled = mean_colours(image, grid("AbA cAd"))
    of_a = np.concatenate([image[:2, :2].reshape(-1, 3), image[:2, 4:].reshape(-1, 3), image[2:, 2:4].reshape(-1, 3)])
    for rows, columns in ((slice(0, 2), slice(0, 2)), (slice(0, 2), slice(4, 6)), (slice(2, 4), slice(2, 4))):
        assert (filled[rows, columns] == np.floor(of_a.mean(axis=0) + 0.5)).all()
    for rows, columns in ((slice(0, 2), slice(2, 4)), (slice(2, 4), slice(0, 2)), (slice(2, 4), slice(4, 6))):
        assert (filled[rows, columns] == image[rows, columns]).all()
    assert filled.dtype == np.uint8


def test_images_of_any_kind_and_size_become_pictures(upper: Trained, tmp_path: Path, capsys: Printed) -> None:
    images = []
    for name, mode, size in (("tall (1).png", "RGBA", (20, 70)), ("grey.jpg", "L", (50, 40)), ("one.png", "P", (1, 1))):
        pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(tmp_path / name)
        images.append(str(tmp_path / name))
    (tmp_path / "folder").mkdir()
    Image.open(images[2]).save(tmp_path / "folder" / "one.png")
    options = ["--fusion", "none,upper", "--budget", "0.5", "--out", str(tmp_path / "out")]
    assert famba(["visualize", str(upper[0]), *images, str(tmp_path / "folder"), *options]) == 0
    printed = [Path(line) for line in capsys.readouterr().out.splitlines()]
    names = ("tall_1_", "grey", "one", "one_2")
    assert [file.name for file in printed] == [f"tokens_{name}.png" for name in names]
    with Image.open(printed[0]) as picture:
        assert picture.width > 500
    first = printed[0].read_bytes()
    assert famba(["visualize", str(upper[0]), images[0], *options]) == 0
    assert printed[0].read_bytes() == first, "equal pictures are equal bytes"
    capsys.readouterr()
    assert famba(["visualize", str(upper[0]), "--out", str(tmp_path)]) == 0
    samples = capsys.readouterr().out
    assert all(word in samples for word in ("tokens_china.png", "danielbuechele", "CC BY 2.0")), "with their authors"


def test_pruned_patches_are_grey_and_the_others_as_they_are() -> None:
    image = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    rows = [Row("fuse", [2], [np.array([[0, 0], [1, 2]])]), Row("prune", [2], [np.array([[PRUNED, 0], [1, PRUNED]])])]
    figure = draw_patches(image, [0], rows)
    shown = np.asarray(figure.axes[3].images[0].get_array())
    assert (shown[:4, :4] == shown[0, 0]).all()
    assert (shown[4:, 4:] == shown[0, 0]).all()
    assert (shown[:4, 4:] == image[:4, 4:]).all()
    assert "Grey: pruned." in figure.get_suptitle()
    assert "Grey" not in draw_patches(image, [0], rows[:1]).get_suptitle()
