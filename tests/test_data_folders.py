"""Folders and tar files, however messy, give the same images and classes everywhere, or say what is wrong."""

from __future__ import annotations

import bz2
import gzip
import json
import logging
import lzma
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from images_and_loaders import encoded, load, red, tar_of, write
from PIL import Image
from timm.data.readers import create_reader

from famba.data import Splits, check_folder
from famba.data.folders import FileSource, in_order
from famba.errors import ConfigError, DataError

KINDS = pytest.mark.parametrize("kind", ["folder", "tar"])
FOUR = ("cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png")


def write_both(root: Path, parts: dict[str, Any]) -> None:
    """Write parts as folders and as tar files; the red of each image is its number."""
    for part, names in parts.items():
        write(root / part, names)
        (root / f"{part}.tar").write_bytes(tar_of(names))


def there(splits: Splits, part: str = "train") -> list[tuple[str, str]]:
    """Paths in the part and names of classes, in order."""
    source = getattr(splits, part)
    assert isinstance(source, FileSource)
    assert splits.classes is not None
    return [(name, splits.classes[label]) for name, label in zip(source.names, source.labels, strict=True)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes of two images, for training and for testing."""
    write_both(tmp_path, {"train": FOUR, "test": FOUR})
    return tmp_path


NAMES = ["b/1.png", "B/1.png", "a/1.png", "A/1.png", "01/x.png", "1/x.png", "10/x.png", "2/a.png", "2/A.png"]
_SAY = """
import json, sys
from famba.data import load_splits
for name in ("folder", "tar"):
    splits = load_splits(name, sys.argv[1], subset=6, val_fraction=0.3, num_classes=None)
    train = splits.train.source
    print(json.dumps([splits.classes, train.source.names, train.source.labels.tolist(), train.indices.tolist(),
                      splits.train.indices.tolist(), splits.test.names, splits.test.labels.tolist()]))
"""


def test_classes_and_images_have_one_order_in_every_process(tmp_path: Path) -> None:
    write_both(tmp_path, {"train": NAMES, "test": NAMES[::-1]})
    started = [
        subprocess.Popen(
            [sys.executable, "-c", _SAY, str(tmp_path)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        for seed in ("0", "1", "3")
    ]
    said = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0] * 3
    assert len(set(said)) == 1
    for line in said[0].splitlines():
        classes, names, labels, *_, test_names, test_labels = json.loads(line)
        assert classes == ["01", "1", "2", "10", "A", "a", "B", "b"]
        expected = ["01/x.png", "1/x.png", "2/A.png", "2/a.png", "10/x.png", "A/1.png", "a/1.png", "B/1.png", "b/1.png"]
        assert names == test_names == expected
        assert labels == test_labels == [0, 1, 2, 2, 3, 4, 5, 6, 7]


def test_any_name_has_its_place() -> None:
    names = ["x²", "x2", "²", "٣", "10", "9", "Été", "a b", "a", "_", "", "1" * 300]
    assert sorted(in_order(names)) == sorted(names)
    assert in_order(names) == in_order(reversed(names))
    assert in_order(["10", "9", "a10", "a9", "A9"]) == ["9", "10", "A9", "a9", "a10"]


@KINDS
def test_the_class_is_the_folder_directly_below_the_part(tmp_path: Path, kind: str) -> None:
    names = ("animal/crane/1.png", "machine/crane/1.png", "animal/s1/x.png", "machine/2.png")
    write_both(tmp_path, {"train": names, "val": names})
    splits = load(kind, tmp_path, num_classes=2)
    assert there(splits) == there(splits, "test") == [(name, name.split("/")[0]) for name in in_order(names)]
    assert (red(splits.train), splits.train.num_classes) == ([0, 2, 3, 1], 2)
    assert splits.validation is None
    with pytest.raises(ConfigError, match=r"num_classes is 3, but .* 2 classes"):
        load(kind, tmp_path, num_classes=3)


def test_every_format_that_pillow_reads_counts(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    kinds = {"a.webp": "WEBP", "b.tif": "TIFF", "c.JPG": "JPEG", "d.bmp": "BMP", "e.Gif": "GIF", "f.jp2": "JPEG2000"}
    for name, kind in kinds.items():
        write(root / "train", [f"bird/{name}"], encoded(kind=kind))
    write(root / "test", ["bird/a.webp"], encoded(kind="WEBP"))
    splits = load("folder", root)
    assert [name for name, label in there(splits) if label == "bird"] == [f"bird/{name}" for name in kinds]
    assert all(splits.train.image(index).size == (8, 8) for index in range(len(splits.train)))  # type: ignore[union-attr]
    assert not caplog.records


@KINDS
def test_what_is_skipped_is_counted_and_named(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    odd = os.fsdecode(b"\xff.png")  # a name that is no text
    others = ["cat/Thumbs.db", "cat/notes.txt", f"dog/{odd}.bak", "dog/b.h5", "labels.csv"]
    hidden = ["cat/.ipynb_checkpoints/1.png", "__MACOSX/cat/1.png", "dog/._1.png", "@eaDir/x.png", ".git/x.png"]
    write_both(tmp_path, {"train": [*FOUR, f"dog/{odd}", *others, *hidden], "test": FOUR})
    if kind == "folder":
        os.mkfifo(tmp_path / "train" / "dog" / "pipe.png")  # reading it would never end
    (tmp_path / "Val").mkdir()
    with caplog.at_level(logging.INFO):
        splits = load(kind, tmp_path)
    assert splits.classes == ("cat", "dog")
    assert red(splits.train) == [0, 1, 2, 3, 4]
    where, count = (tmp_path / "train", 6) if kind == "folder" else (tmp_path / "train.tar", 5)
    assert f"{where}: skipped {count} files (cat/notes.txt, cat/Thumbs.db, dog/b.h5, ...) of kinds" in caplog.text
    assert " hidden names (.git" in caplog.text
    beside = "left alone 1 folder (Val); the parts are train, val, valid, validation and test"
    assert (beside in caplog.text) == (kind == "folder")


def test_links_are_followed_once(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(root / "elsewhere", ("3.png", "deep/4.png"))
    (root / "train" / "cat" / "more").symlink_to(root / "elsewhere")
    (root / "train" / "cat" / "again").symlink_to("../../elsewhere")
    (root / "train" / "cat" / "5.png").symlink_to(root / "elsewhere" / "3.png")
    with caplog.at_level(logging.INFO):
        names = [name for name, label in there(load("folder", root)) if label == "cat"]
    assert "train: skipped 2 links (cat/5.png, cat/more) to what was read already" in caplog.text
    assert names == ["cat/1.png", "cat/2.png", "cat/again/3.png", "cat/again/deep/4.png"]


@pytest.mark.parametrize(
    ("written", "links", "said"),
    [
        (["bird/a.heic", "empty/b.heic"], {}, r"2 classes \(bird, empty\) without any image .* 2 files \(bird/a.heic"),
        (["stray.webp"], {}, r"some lie outside: 1 image \(stray.webp\)"),
        ([], {"bird": "dog"}, r"(bird|dog): this is the folder .* once more, by a link, in two classes"),
        ([], {"dog/9.png": "../cat/1.png"}, r"dog/9\.png: this is the image .*cat/1\.png once more, by a link"),
        *(
            ([], {"cat/again": target}, r"train/cat/again: this link leads to .*, which contains it\. Remove it")
            for target in ("..", ".", "../..", "/", "../cat")
        ),
        *(([], {"cat/lost.png": name}, r"cat/lost\.png: this link leads nowhere") for name in ("nowhere", "lost.png")),
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


@KINDS
@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("images/cat/1.png", "images/dog/1.png"), r"folders of 'images', .* one class. If 2 folders \(cat, dog\)"),
        (("data/pets/cat/1.png", "data/pets/dog/a/1.png"), r"folders of 'data/pets', .* If 2 folders \(cat, dog\)"),
        (("cat/1.png", "dog/1.heic"), r"1 class \(dog\) without any image that Pillow reads, but 1 file \(dog/1.heic"),
        (("cat/1.heic",), r"holds no readable images in class folders; it holds 1 file \(cat/1.heic\)"),
    ],
)
def test_images_that_tell_no_classes_are_refused(tmp_path: Path, kind: str, names: tuple[str, ...], said: str) -> None:
    write_both(tmp_path, {"train": names, "test": names})
    with pytest.raises(DataError, match=said):
        load(kind, tmp_path)


@pytest.mark.parametrize(("part", "target"), [("val", "test"), ("val", "train"), ("test", "train")])
def test_parts_that_are_the_same_by_a_link_are_refused(root: Path, part: str, target: str) -> None:
    shutil.rmtree(root / part, ignore_errors=True)
    (root / part).symlink_to(target)
    with pytest.raises(DataError, match="hold the same images, by a link"):
        load("folder", root)


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
@KINDS
def test_a_validation_part_is_known_by_three_names(root: Path, name: str, kind: str) -> None:
    assert [len(part) for part in (load(kind, root, val_fraction=0.5).train, load(kind, root).test)] == [2, 4]
    write_both(root, {name: ("cat/v.png", "dog/v.png")})
    splits = load(kind, root)
    assert splits.validation is not None
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [4, 2, 4]
    assert there(splits, "validation") == [("cat/v.png", "cat"), ("dog/v.png", "dog")]
    with pytest.raises(ConfigError, match="comes with a validation set"):
        load(kind, root, val_fraction=0.1)


def test_two_validation_parts_are_refused(root: Path) -> None:
    write_both(root, {"valid": FOUR, "val": FOUR})
    for read, name in ((load, "folder"), (check_folder, "folder"), (check_folder, "torch/folder")):
        with pytest.raises(DataError, match="val and .*valid: one of them may hold the validation images"):
            read(name, root)


def test_the_image_folder_of_torchvision_is_read_alike(root: Path) -> None:
    write(root / "train", ["cat/3.webp"], encoded(kind="WEBP"))
    write(root / "valid", ("cat/.x.png", "cat/1.png", "dog/1.png"))
    one, other = load("folder", root), load("torch/image_folder", root)
    for part in ("train", "validation", "test"):
        assert there(one, part) == there(other, part)


def test_missing_parts_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs data\.root"):
        load("folder")
    for name in ("folder", "torch/image_folder"):  # torchvision's own would take the whole root for the test set
        with pytest.raises(DataError, match=rf"no {tmp_path / 'train'}: it holds one folder"):
            load(name, tmp_path)
    write(tmp_path / "train", FOUR)
    with pytest.raises(DataError, match=f"{tmp_path / 'val'} or .* or {tmp_path / 'test'}"):
        load("folder", tmp_path)
    (tmp_path / "val").mkdir()
    with pytest.raises(DataError, match="holds no readable images"):
        load("folder", tmp_path)
    write(tmp_path / "val", ("cat/1.png", "fox/1.png"))
    with pytest.raises(DataError, match=r"without 1 class \(dog\), with 1 class \(fox\)"):
        load("folder", tmp_path)


@pytest.mark.parametrize("damage", [b"", b"no image at all", encoded()[:40]])
def test_a_corrupt_image_is_named_and_not_skipped(root: Path, damage: bytes) -> None:
    (root / "train" / "cat" / "1.png").write_bytes(damage)
    train: Any = load("folder", root).train
    assert train.labels[0] == 0
    with pytest.raises(DataError, match=r"cat/1\.png: not a readable image"):
        red(train)


@pytest.mark.parametrize("top", ["", "val/"], ids=["alone", "below the part's name"])
def test_a_tar_file_may_hold_one_for_each_class(tmp_path: Path, top: str) -> None:
    inner = {"n2.tar": tar_of(["b.png", "a.PNG"]), "n10.tar": tar_of(["./deep/c.png", "a.png"])}
    (tmp_path / "train.tar").write_bytes(tar_of(inner))
    (tmp_path / "val.tar").write_bytes(tar_of({f"{top}{name}": content for name, content in inner.items()}))
    splits = load("tar", tmp_path)
    expected = [("n2/a.PNG", "n2"), ("n2/b.png", "n2"), ("n10/a.png", "n10"), ("n10/deep/c.png", "n10")]
    assert there(splits) == there(splits, "test") == expected
    assert red(splits.train) == [1, 0, 1, 0]


def test_a_tar_source_travels_to_other_processes(root: Path) -> None:
    again = pickle.loads(pickle.dumps(load("tar", root).train))
    assert red(again) == [0, 1, 2, 3]
    path = root / "train.tar"
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(DataError, match=r"train\.tar, cat/2\.png: not a readable image"):
        again.image(1)


def test_links_in_a_tar_file_are_images_too(root: Path) -> None:
    files = {"all/1.png": encoded(1), "cat/2.png": encoded(2), "dog/0.png": encoded(0)}
    links = {
        "dog/3.png": (tarfile.LNKTYPE, "cat/2.png"),
        "dog/4.png": (tarfile.SYMTYPE, "../all/1.png"),
        "dog/5.png": (tarfile.SYMTYPE, "4.png"),
    }
    for part in ("train", "test"):
        (root / f"{part}.tar").write_bytes(tar_of(files, links))
    assert red(load("tar", root).train) == [1, 2, 0, 2, 1, 1]
    for target, said in (
        ("../../outside.png", "lies outside of the tar file"),
        ("6.png", r"dog/6\.png: this link leads to dog/6\.png, which is no image"),
        ("7.png", r"dog/6\.png: this link leads to dog/7\.png, which is no image"),
    ):
        (root / "train.tar").write_bytes(tar_of(files, {"dog/6.png": (tarfile.SYMTYPE, target)}))
        with pytest.raises(DataError, match=said):
            load("tar", root)


def test_a_name_that_comes_again_replaces_the_earlier_one(root: Path) -> None:
    (root / "new.png").write_bytes(encoded(200))
    with tarfile.open(root / "train.tar", "a") as tar:
        tar.add(root / "new.png", "cat/1.png")
    assert red(load("tar", root).train) == [200, 1, 2, 3]


def _cut(content: bytes) -> bytes:
    return content[: len(tar_of(["cat/1.png"]).rstrip(b"\0")) + 600]


def _without_end(content: bytes) -> bytes:
    return content[: -(-len(content.rstrip(b"\0")) // 512) * 512]


def _spoiled(content: bytes) -> bytes:
    place = content.index(b"dog/1.png")
    return content[: place + 100] + b"\xff" * 60 + content[place + 160 :]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda content: b"nothing", "damaged, compressed or no tar file"),
        (lambda content: b"", "damaged, compressed or no tar file"),
        (_cut, "damaged, compressed or no tar file"),
        (_without_end, "without the mark of a tar file's end"),
        (_spoiled, "no header at byte"),
        (lambda content: content + content, "joined by cat"),
        (gzip.compress, "compressed or no tar file.*gunzip"),
        (bz2.compress, "compressed or no tar file.*bunzip2"),
        (lzma.compress, "compressed or no tar file.*unxz"),
    ],
)
@pytest.mark.parametrize("nested", [False, True], ids=["outer", "inner"])
def test_a_damaged_tar_file_is_refused(root: Path, damage: Callable[[bytes], bytes], said: str, nested: bool) -> None:
    bad = damage(tar_of(["cat/1.png", "dog/1.png"]))
    around = {"bird/1.png": encoded(), "inner.tar": bad, "wolf/1.png": encoded()}
    (root / "train.tar").write_bytes(tar_of(around) if nested else bad)
    with pytest.raises(DataError, match=rf"train\.tar: .*{said}"):
        load("tar", root)


VERSION_1 = [
    *("cat/s1/x.png", "dog/s1/y.png", "dog/.hidden/z.JPEG", "dog/img10.jpg", "dog/img9.jpg"),
    *("Bird 2/a.png", "bird 10/a.png", "bird 10/a.webp"),
]


def test_version_1_reads_folders_as_timm_does(tmp_path: Path) -> None:
    for part in ("train", "val"):
        write(tmp_path / part, VERSION_1)
        (tmp_path / part / "empty").mkdir()
        (tmp_path / part / "cat" / "link").symlink_to(tmp_path / "train" / "dog")
    write(tmp_path / "valid", ["other/x.png"])
    splits = load("folder", tmp_path, version=1)
    reader = create_reader("", str(tmp_path / "train"))
    assert splits.classes == tuple(reader.class_to_idx)
    assert splits.validation is None
    train: Any = splits.train
    found = [(str(train.path / name), label) for name, label in zip(train.names, train.labels.tolist(), strict=True)]
    assert found == reader.samples


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # timm keeps its tar files open
def test_version_1_reads_tar_files_as_timm_does(tmp_path: Path) -> None:
    inner = {"n2.tar": tar_of(["b.png", "A.png", "sub/a.png"]), "x/n1.tar": tar_of(["a.png", "b.png"])}
    more = {name: encoded(50) for name in VERSION_1}
    for part in ("train", "val"):
        (tmp_path / f"{part}.tar").write_bytes(tar_of({"z/last.png": encoded(99), **inner, **more}))
    splits = load("tar", tmp_path, version=1)
    reader = create_reader("", str(tmp_path / "train.tar"))
    assert splits.classes == tuple(reader.class_name_to_idx)
    train: Any = splits.train
    assert train.labels.tolist() == reader.targets.tolist()
    assert train.names == [reader.filename(index) for index in range(len(reader))]
    assert red(train) == [Image.open(reader[index][0]).getpixel((0, 0))[0] for index in range(len(reader))]  # type: ignore[index]
