"""Folders, however messy, give the same images and classes everywhere, or say what is wrong."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
from images_and_loaders import encoded, load, red, write

from famba.data import Splits, check_folder
from famba.data.folders import order
from famba.data.sources import LazySource
from famba.errors import ConfigError, DataError
from famba.training.run_folder import RunFolder

FOUR = ("cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png")


def there(splits: Splits, part: str = "train") -> list[tuple[str, str]]:
    """Paths in the part and names of classes, in order."""
    source = getattr(splits, part)
    assert isinstance(source, LazySource)
    assert splits.classes is not None
    return [(name, splits.classes[label]) for name, label in zip(source.keys, source.labels, strict=True)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes of two images, for training and for testing."""
    for part in ("train", "test"):
        write(tmp_path / part, FOUR)
    return tmp_path


def test_classes_and_images_have_one_order_everywhere(tmp_path: Path) -> None:
    names = ["b/1.png", "B/1.png", "a/1.png", "A/1.png", "01/x.png", "1/x.png", "10/x.png", "2/a.png", "2/A.png"]
    write(tmp_path / "train", names)
    write(tmp_path / "test", names[::-1])
    splits: Any = load("folder", tmp_path)
    assert splits.classes == ("01", "1", "2", "10", "A", "a", "B", "b")
    expected = ["01/x.png", "1/x.png", "2/A.png", "2/a.png", "10/x.png", "A/1.png", "a/1.png", "B/1.png", "b/1.png"]
    assert splits.train.keys == splits.test.keys == expected
    assert splits.train.labels.tolist() == splits.test.labels.tolist() == [0, 1, 2, 2, 3, 4, 5, 6, 7]
    # The red of an image is its place in `names`.
    splits = load("folder", tmp_path, subset=6, val_fraction=0.3)
    assert (red(splits.train), red(splits.validation)) == ([8, 6, 3, 2], [4, 5])


def test_the_class_is_the_folder_directly_below_the_part(tmp_path: Path) -> None:
    names = ("animal/crane/1.png", "machine/crane/1.png", "animal/s1/x.png", "machine/2.png")
    for part in ("train", "val"):
        write(tmp_path / part, names)
    splits = load("folder", tmp_path, num_classes=2)
    assert there(splits) == there(splits, "test") == [(name, name.split("/")[0]) for name in sorted(names, key=order)]
    assert (red(splits.train), splits.train.num_classes, splits.validation) == ([0, 2, 3, 1], 2, None)
    with pytest.raises(ConfigError, match=r"num_classes is 3, but .* 2 classes"):
        load("folder", tmp_path, num_classes=3)
    for part in ("train", "val"):
        write(tmp_path / "deep" / part, ("images/cat/1.png", "images/dog/1.png"))
    with pytest.raises(DataError, match="folders of 'images', so all are of one class.*move them up into"):
        load("folder", tmp_path / "deep")


def test_every_format_that_pillow_reads_counts(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    kinds = {"a.webp": "WEBP", "b.tif": "TIFF", "c.JPG": "JPEG", "d.bmp": "BMP", "e.Gif": "GIF", "f.jp2": "JPEG2000"}
    for name, kind in kinds.items():
        write(root / "train", [f"bird/{name}"], encoded(kind=kind))
    write(root / "test", ["bird/a.webp"], encoded(kind="WEBP"))
    splits = load("folder", root)
    assert [name for name, label in there(splits) if label == "bird"] == [f"bird/{name}" for name in kinds]
    assert len(red(splits.train)) == 10
    assert not caplog.records


def test_what_is_skipped_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    odd = os.fsdecode(b"\xff.png")  # a name that is no text
    others = ["cat/Thumbs.db", "cat/notes.txt", f"dog/{odd}.bak", "dog/b.h5", "labels.csv"]
    hidden = ["cat/.ipynb_checkpoints/1.png", "__MACOSX/cat/1.png", "dog/._1.png", "@eaDir/x.png", ".git/x.png"]
    write(tmp_path / "train", [*FOUR, f"dog/{odd}", *others, *hidden])
    write(tmp_path / "test", FOUR)
    os.mkfifo(tmp_path / "train" / "dog" / "pipe.png")  # reading it would never end
    with caplog.at_level(logging.INFO):
        splits = load("folder", tmp_path)
    assert (splits.classes, red(splits.train)) == (("cat", "dog"), [0, 1, 2, 3, 4])
    skipped = "cat/notes.txt, cat/Thumbs.db, dog/b.h5, dog/pipe.png, dog/\ufffd.png.bak and 1 more"
    assert f"train: skipped files of kinds that Pillow does not read: {skipped}" in caplog.text
    assert "train: skipped hidden names: .git, " in caplog.text


def test_links_lead_to_images_that_lie_elsewhere(root: Path) -> None:
    write(root / "elsewhere", ("3.png", "deep/4.png"))
    (root / "train" / "cat" / "more").symlink_to(root / "elsewhere")
    (root / "train" / "dog" / "5.png").symlink_to(root / "elsewhere" / "3.png")
    names = [name for name, _ in there(load("folder", root))]
    assert names == [*FOUR[:2], "cat/more/3.png", "cat/more/deep/4.png", *FOUR[2:], "dog/5.png"]


@pytest.mark.parametrize(
    ("written", "links", "said"),
    [
        (["bird/a.heic", "empty/b.heic"], {}, r"classes without images: bird, empty\..*Pillow .* bird/a\.heic"),
        (["stray.webp"], {}, r"one folder for each class, but not so stray\.webp"),
        ([], {"bird": "dog"}, r"(bird|dog): this is .* once more, by a link"),
        *(([], {"cat/again": target}, r"train/cat/again.*: this is .* once more, by a link") for target in ("..", "/")),
        ([], {"cat/lost.png": "nowhere"}, r"cat/lost\.png: this link leads nowhere"),
        ([], {"bird": "../test/cat"}, r"test/cat: this is .*bird once more, by a link"),
    ],
)
def test_a_part_that_cannot_be_meant_so_is_refused(
    root: Path, written: list[str], links: dict[str, str], said: str
) -> None:
    write(root / "train", written)
    for name, target in links.items():
        (root / "train" / name).symlink_to(target)
    with pytest.raises(DataError, match=said):
        load("folder", root)


def test_a_name_that_is_no_text_becomes_text(root: Path) -> None:
    for part in ("train", "test"):
        write(root / part, [os.fsdecode(b"Caf\xe9/1.png")])
    assert load("folder", root).classes == ("Caf\N{REPLACEMENT CHARACTER}", "cat", "dog")
    with RunFolder(root / "run", writes=True) as folder:  # the error that ends a run may name such a file
        assert folder.write_summary({"status": "failed", "error": os.fsdecode(b"Caf\xe9")})["error"] == "Caf?"


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_a_validation_part_is_known_by_three_names(root: Path, name: str) -> None:
    assert [len(part) for part in (load("folder", root, val_fraction=0.5).train, load("folder", root).test)] == [2, 4]
    write(root / name, ("cat/v.png", "dog/v.png"))
    splits = load("folder", root)
    assert splits.validation is not None
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [4, 2, 4]
    assert there(splits, "validation") == [("cat/v.png", "cat"), ("dog/v.png", "dog")]
    with pytest.raises(ConfigError, match="comes with a validation set"):
        load("folder", root, val_fraction=0.1)


def test_missing_and_unclear_parts_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs data\.root"):
        load("folder")
    with pytest.raises(DataError, match=rf"no {tmp_path / 'train'}: it holds one folder"):
        load("folder", tmp_path)
    write(tmp_path / "train", FOUR)
    with pytest.raises(DataError, match=f"{tmp_path / 'test'} or {tmp_path / 'val'} or .*"):
        load("folder", tmp_path)
    (tmp_path / "val").mkdir()
    with pytest.raises(DataError, match="val: no images in class folders"):
        load("folder", tmp_path)
    write(tmp_path / "val", ("cat/1.png", "fox/1.png"))
    with pytest.raises(DataError, match=r"are not those of .*train: without dog, with fox"):
        load("folder", tmp_path)
    write(tmp_path / "valid", FOUR)
    for read in (load, check_folder):
        with pytest.raises(DataError, match="val and .*valid: one of them may hold the validation images"):
            read("folder", tmp_path)
