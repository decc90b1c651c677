"""Pictures show what the model did: borders where the trace has them, mean colours, and similarities as measured."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from runs import run

from famba.analysis import pictures
from famba.analysis.pictures import PRUNED, Column, Grid, Row, borders, draw_patches, edges, mean_colours, tagged
from famba.analysis.visualize import distinct, shown_layers
from famba.cli import main as famba
from famba.fusion.rules import cosines, mean_cosine
from famba.models import Vim

Printed = pytest.CaptureFixture[str]
VIM: dict[str, Any] = {"img_size": 32, "patch_size": 8, "num_classes": 3, "embed_dim": 16, "depth": 3}


@pytest.fixture(scope="module")
def upper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("upper")
    chosen = ("fusion=upper", "fusion.budget=12", "model.depth=3", "model.patch_size=8")
    run(folder, *chosen, "model.cls_position=middle", "trainer.max_steps=1")
    return folder


def grid(text: str) -> Grid:
    return np.array([[ord(letter) for letter in line] for line in text.split()], dtype=np.int64)


def lines_of(held: Grid) -> set[Any]:
    found = [tuple(map(tuple, line)) for line in borders(held).tolist()]
    assert len(set(found)) == len(found)
    return set(found)


def test_borders_lie_around_tokens_that_hold_several_patches() -> None:
    # A holds three patches in an angle, the others stand alone.
    across = [((0, 0), (1, 0)), ((1, 0), (2, 0)), ((1, 1), (2, 1)), ((0, 2), (1, 2))]
    down = [((2, 0), (2, 1)), ((1, 1), (1, 2)), ((0, 0), (0, 1)), ((0, 1), (0, 2))]
    assert lines_of(grid("AAb Acd")) == {*across, *down}
    assert lines_of(grid("abc def")) == set()
    assert len(lines_of(grid("AA AA"))) == 8, "a token has no border inside"


def test_borders_are_where_the_trace_changes() -> None:
    torch.manual_seed(0)
    model = Vim(**VIM | {"patch_size": 4}, fusion=(20, 10, 10)).eval()
    held = model.trace(torch.randn(1, 3, 32, 32))[-1].reshape(8, 8).numpy()
    found, several = lines_of(held), {token for token in held.flatten() if (held == token).sum() > 1}
    for row in range(8):
        for column in range(7):
            left, right = held[row, column], held[row, column + 1]
            expected = left != right and bool({left, right} & several)
            assert (((column + 1, row), (column + 1, row + 1)) in found) == expected
            above, below = held[column, row], held[column + 1, row]
            expected = above != below and bool({above, below} & several)
            assert (((row, column + 1), (row + 1, column + 1)) in found) == expected


def test_patches_of_a_token_have_their_mean_colour_and_lone_ones_their_pixels() -> None:
    image = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    filled = mean_colours(image, grid("AbA cAd"))
    of_a = np.concatenate([image[:2, :2].reshape(-1, 3), image[:2, 4:].reshape(-1, 3), image[2:, 2:4].reshape(-1, 3)])
    for rows, columns in ((slice(0, 2), slice(0, 2)), (slice(0, 2), slice(4, 6)), (slice(2, 4), slice(2, 4))):
        assert (filled[rows, columns] == np.floor(of_a.mean(axis=0) + 0.5)).all()
    for rows, columns in ((slice(0, 2), slice(2, 4)), (slice(2, 4), slice(0, 2)), (slice(2, 4), slice(4, 6))):
        assert (filled[rows, columns] == image[rows, columns]).all()
    assert filled.dtype == np.uint8


def test_tokens_whose_patches_lie_apart_are_marked_in_each_part() -> None:
    held = grid("BBAcA BBAdA AcBBB")
    found = [places for _, places in tagged(held)]
    # B first, which holds the most; then A, then c, in the order of their first patches.
    assert [[chr(held[place]) for place in token] for token in found] == [["B", "B"], ["A", "A", "A"], ["c", "c"]]
    assert found[0][1] == (2, 3), "the middle of a row of three"
    assert found[2] == [(0, 3), (2, 1)]
    assert tagged(grid("aabb ccbb")) == []


def test_every_token_in_several_parts_has_a_tag_of_its_own_in_the_picture() -> None:
    held = (np.random.default_rng(0).permutation(196) % 72).reshape(14, 14)  # most in parts that do not touch
    found = tagged(held)
    assert len({tag for tag, _ in found}) == len({(tag.sign, tag.is_letter) for tag, _ in found}) == len(found) > 60
    assert all(len({held[place] for place in places}) == 1 for _, places in found)
    # Marks for the largest, then letters, then numbers.
    assert [tag.is_letter for tag, _ in found[:9]] == [*[False] * 8, True]
    assert [found[8][0].sign, found[60][0].sign] == ["a", "1"]
    axes = Figure().add_subplot()
    pictures.draw_tags(axes, held, pixels=16, points=10.0)
    marked = sum(len(points.get_offsets()) for points in axes.collections)  # type: ignore[arg-type]
    assert marked == sum(len(places) for tag, places in found if not tag.is_letter)
    assert [text.get_text() for text in axes.texts] == [t.sign for t, places in found if t.is_letter for _ in places]
    (row, column), at = found[8][1][0], axes.texts[0].get_position()
    assert at == (16 * (column + 0.5) - 0.5, 16 * (row + 0.5) - 0.5), "on a patch's middle"


def test_finer_grids_get_larger_panels() -> None:
    def width(side: int) -> float:
        row = Row("none", [side * side], [np.arange(side * side).reshape(side, side)])
        return float(draw_patches(np.zeros((side * 4, side * 4, 3), dtype=np.uint8), [0], [row]).get_figwidth())

    assert width(8) < width(14) < width(28)


@pytest.mark.parametrize(
    ("depth", "schedules", "count", "expected"),
    [
        (3, [(1, 1, 1)], 8, [0, 1, 2]),
        (24, [(0,) * 6 + (9,) * 18], 4, [6, 12, 17, 23]),
        (24, [(0,) * 6 + (9,) * 18, (7,) * 24], 3, [0, 12, 23]),
        (24, [(0,) * 24], 2, [0, 23]),
        (24, [(7,) * 24], 1, [23]),
        (24, [(0,) * 23 + (4,)], 5, [23]),
    ],
)
def test_layers_are_chosen_from_the_first_that_fuses_to_the_last(
    depth: int, schedules: list[tuple[int, ...]], count: int, expected: list[int]
) -> None:
    assert shown_layers(depth, schedules, count) == expected


def test_the_mean_cosine_is_that_of_all_pairs_that_may_fuse() -> None:
    metric = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))
    every = cosines(metric)
    for protected in (None, 2, torch.tensor([0, 3, 6])):
        for image in range(3):
            place = None if protected is None else int(torch.as_tensor(protected).expand(3)[image])
            free = [token for token in range(7) if token != place]
            pairs = [every[image, a, b] for a in free for b in free if a != b]
            torch.testing.assert_close(mean_cosine(metric, protected)[image], torch.stack(pairs).mean())
    torch.testing.assert_close(mean_cosine(torch.ones(2, 4, 3), 0), torch.ones(2))


@pytest.mark.parametrize("position", ["head", "middle", "none"])
@pytest.mark.parametrize("place", ["before_mixer", "after_scan"])
def test_similarities_are_those_of_each_layer_as_it_fuses(position: str, place: str) -> None:
    torch.manual_seed(0)
    model = Vim(**VIM, cls_position=position, fusion_place=place, fusion=(4, 0, 6)).eval()
    images = torch.randn(2, 3, 32, 32)
    found, before = model.similarities(images), model(images)
    assert [one.closest.shape for one in found] == [(2, 8), (2, 6), (2, 6)]
    assert all((one.closest <= 1 + 1e-5).all() and (one.mean.abs() <= 1).all() for one in found)
    model.similarities(images)
    torch.testing.assert_close(model(images), before, rtol=0, atol=0)
    # Patches that are alike stay alike through a norm: without positions their cosines are 1 in the first layer.
    with torch.no_grad():
        model.pos_embed.zero_()
    if place == "before_mixer":
        alike = model.similarities(torch.ones(1, 3, 32, 32))[0]
        torch.testing.assert_close(alike.closest, torch.ones(1, 8))
        torch.testing.assert_close(alike.mean, torch.ones(1))


def test_shares_add_up_whatever_lies_outside() -> None:
    values = np.array([1.0000001, 0.99, 0.5, 0.31, -0.9])
    columns = [Column("a", [values, values[:2]], [0.4, 0.35], [1, 0])]
    bins = edges(columns)
    assert bins[0] <= 0.3
    assert bins[-1] == 1
    np.testing.assert_allclose(pictures.shares(columns[0], bins).sum(axis=0), 100)
    np.testing.assert_allclose(edges([Column("a", [values[:2]], [0.95], [0])]), [0.9, 0.95, 1.0])


def test_names_of_files_are_distinct_and_plain() -> None:
    given = ["cat", "cat", "cat", "a b/c", "", "x" * 300]
    assert distinct(given) == ["cat", "cat_2", "cat_3", "a_b_c", "image", "x" * 80]
    assert distinct(["cat_2", "cat", "cat"]) == ["cat_2", "cat", "cat_3"]


def test_images_of_any_kind_and_size_become_pictures(upper: Path, tmp_path: Path, capsys: Printed) -> None:
    files = []
    for name, mode, size in (("tall.png", "RGBA", (20, 70)), ("grey.jpg", "L", (50, 40)), ("one.png", "P", (1, 1))):
        pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(tmp_path / name)
        files.append(str(tmp_path / name))
    options = ["--fusion", "none,upper,all", "--budget", "0.5", "--layers-shown", "2", "--out", str(tmp_path / "out")]
    assert famba(["visualize", str(upper), *files, *options]) == 0
    printed = [Path(line) for line in capsys.readouterr().out.splitlines()]
    names = ["tokens_tall.png", "tokens_grey.png", "tokens_one.png", "similarity.png", "similarity.svg"]
    assert [file.name for file in printed] == names
    with Image.open(printed[0]) as picture:
        assert picture.width > 500
    first = [file.read_bytes() for file in printed]
    assert famba(["visualize", str(upper), *files, *options]) == 0
    assert [file.read_bytes() for file in printed] == first, "equal pictures are equal bytes"


def test_without_images_the_samples_are_drawn_and_their_authors_named(
    upper: Path, tmp_path: Path, capsys: Printed
) -> None:
    assert famba(["visualize", str(upper), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("tokens_china.png", "danielbuechele", "CC BY 2.0"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("absent.png", "absent.png is not there"),
        (".", "is a folder; give the image files in it"),
        ("broken.png", "broken.png: not a readable image"),
        ("text.png", "text.png is no image of a kind that Pillow knows"),
        ("--fusion uper", "did you mean 'upper'"),
        ("--fusion all --budget 17", "--budget"),
        ("--fusion adaptive", "no fixed schedule"),
        ("--layers-shown 0", "--layers-shown is 0"),
        ("--device tpu", "unknown --device"),
    ],
)
def test_what_cannot_be_drawn_is_said_before_any_folder_is_made(
    upper: Path, arguments: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.png").write_text("no image")
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(whole, "png")
    Path("broken.png").write_bytes(whole.getvalue()[:3000])
    assert famba(["visualize", str(upper), *arguments.split(), "--out", "out"]) == 2
    assert said in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.parametrize("text", ["{", "model: [1,\n\n\nfusion: 3\n"])
def test_a_broken_configuration_beside_weights_is_said_on_one_line(
    upper: Path, tmp_path: Path, text: str, capsys: Printed
) -> None:
    copied = shutil.copytree(upper, tmp_path / "run")
    (copied / "config.yaml").write_text(text)
    assert famba(["visualize", str(copied), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {copied / 'config.yaml'} cannot be read (")
    assert "restore it or remove it" in error
    assert error.count("\n") == 1


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
