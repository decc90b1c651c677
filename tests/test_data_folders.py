"""Folders and tar files, however messy, give the same images and classes everywhere, or say what is wrong."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
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


def write_tar(path: Path, *given: Any) -> None:
    path.write_bytes(tar_of(*given))


def tar_folders(root: Path, parts: tuple[str, ...], name: str = "") -> None:
    """Pack folders, as "tar -C part .", or with a name before the paths."""
    for part in parts:
        with tarfile.open(root / f"{part}.tar", "w") as tar:
            tar.add(root / part, name and part)


def there(splits: Splits, part: str = "train") -> list[tuple[str, str]]:
    """Paths in the part and names of classes, in order."""
    source = getattr(splits, part)
    assert isinstance(source, FileSource)
    assert splits.classes is not None
    return [(name, splits.classes[int(source.labels[index])]) for index, name in enumerate(source.names)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes of two images, for training and for testing."""
    for part in ("train", "test"):
        write(tmp_path / part, FOUR)
    return tmp_path


# Order


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
    for part, names in (("train", NAMES), ("test", NAMES[::-1])):
        write(tmp_path / part, names)
        write_tar(tmp_path / f"{part}.tar", names)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", _SAY, str(tmp_path)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        for seed in ("0", "1", "3", "4")
    ]
    said = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0] * 4
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


# Classes and files


def test_the_class_is_the_folder_directly_below_the_part(tmp_path: Path) -> None:
    names = ("animal/crane/1.png", "machine/crane/1.png", "animal/s1/x.png", "machine/2.png")
    for part in ("train", "val"):
        write(tmp_path / part, names)
        write_tar(tmp_path / f"{part}.tar", names)
    for kind in ("folder", "tar"):
        splits = load(kind, tmp_path)
        assert splits.classes == ("animal", "machine")
        assert there(splits) == there(splits, "test") == [(name, name.split("/")[0]) for name in in_order(names)]


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
def test_what_is_skipped_is_counted_and_named(root: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    others = ["cat/Thumbs.db", "cat/notes.txt", "dog/a.heic.bak", "dog/b.h5", "labels.csv"]
    hidden = ["cat/.ipynb_checkpoints/1.png", "__MACOSX/cat/1.png", "dog/._1.png", "@eaDir/x.png", ".git/x.png"]
    write(root / "train", [*others, *hidden])
    tar_folders(root, ("train", "test"))
    with caplog.at_level(logging.INFO):
        splits = load(kind, root)
    assert splits.classes == ("cat", "dog")
    assert len(splits.train) == 4
    (line,) = (record.getMessage() for record in caplog.records)
    where = root / ("train" if kind == "folder" else "train.tar")
    assert line.startswith(f"{where}: skipped 5 files (cat/notes.txt, cat/Thumbs.db, dog/a.heic.bak, ...) of kinds")
    assert " hidden names (.git" in line


@KINDS
def test_a_class_without_images_is_an_error(root: Path, kind: str) -> None:
    write(root / "train", ["bird/a.heic", "bird/b.heic"])
    (root / "train" / "empty").mkdir()
    tar_folders(root, ("train", "test"), "with the part's name")
    with pytest.raises(DataError, match=r"2 classes \(bird, empty\) without any image .* but 2 files \(bird/a.heic"):
        load(kind, root)


def test_images_in_folders_of_one_folder_are_no_single_class(tmp_path: Path) -> None:
    for part in ("train", "test"):
        write(tmp_path / part, ("images/cat/1.png", "images/dog/1.png"))
        write_tar(tmp_path / f"{part}.tar", ("data/x/cat/1.png", "data/y/1.png"))
    with pytest.raises(DataError, match=r"folders of 'images', so all are of one class. If 2 folders \(cat, dog\)"):
        load("folder", tmp_path)
    with pytest.raises(DataError, match=r"folders of 'data', so all are of one class"):
        load("tar", tmp_path)


def test_classes_that_lie_several_folders_too_deep_are_named(tmp_path: Path) -> None:
    for part in ("train", "test"):
        write(tmp_path / part, ("data/pets/cat/1.png", "data/pets/dog/a/1.png"))
    with pytest.raises(DataError, match=r"folders of 'data/pets', so all are of one class. If 2 folders \(cat, dog\)"):
        load("folder", tmp_path)


def test_images_outside_of_classes_are_named(root: Path) -> None:
    write(root / "train", ["stray.webp"])
    with pytest.raises(DataError, match=r"some lie outside: 1 image \(stray.webp\)"):
        load("folder", root)


def test_names_that_are_no_text_are_read_and_said(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    odd = os.fsdecode(b"\xff.txt")
    write(root / "train", [f"cat/{odd}", f"cat/{odd}.png"])
    splits = load("folder", root)
    assert len(splits.train) == 5
    assert "cat/\ufffd.txt" in caplog.text


# Links


def test_links_are_followed_once(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(root / "elsewhere", ("3.png", "deep/4.png"))
    (root / "train" / "cat" / "more").symlink_to(root / "elsewhere")
    (root / "train" / "cat" / "again").symlink_to("../../elsewhere")
    (root / "train" / "cat" / "5.png").symlink_to(root / "elsewhere" / "3.png")
    (root / "train" / "bird").symlink_to(root / "elsewhere" / "deep")
    (root / "test" / "bird").symlink_to(root / "elsewhere")
    with pytest.raises(DataError, match=r"bird/?: this is the folder .*|cat/.*deep: this is the folder .*two classes"):
        load("folder", root)
    (root / "train" / "bird").unlink()
    (root / "test" / "bird").unlink()
    with caplog.at_level(logging.INFO):
        names = [name for name, label in there(load("folder", root)) if label == "cat"]
    assert "train: skipped 2 links (cat/5.png, cat/more) to what was read already" in caplog.text
    assert names == ["cat/1.png", "cat/2.png", "cat/again/3.png", "cat/again/deep/4.png"]


def test_a_link_to_an_image_of_another_class_is_refused(root: Path) -> None:
    (root / "train" / "dog" / "9.png").symlink_to("../cat/1.png")
    with pytest.raises(DataError, match=r"dog/9\.png: this is the image .*cat/1\.png once more, by a link"):
        load("folder", root)


@pytest.mark.parametrize(("part", "target"), [("val", "test"), ("val", "train"), ("test", "train")])
def test_parts_that_are_the_same_by_a_link_are_refused(root: Path, part: str, target: str) -> None:
    if (root / part).exists():
        shutil.rmtree(root / part)
    (root / part).symlink_to(target)
    with pytest.raises(DataError, match="hold the same images, by a link"):
        load("folder", root)


def test_folders_that_are_no_parts_are_named(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / "Val").mkdir()
    load("folder", root)
    assert "left alone 1 folder (Val); the parts are train, val, valid, validation and test" in caplog.text


@pytest.mark.parametrize("target", ["..", ".", "../..", "/", "../cat"])
def test_a_link_to_a_folder_that_holds_it_is_refused(root: Path, target: str) -> None:
    (root / "train" / "cat" / "again").symlink_to(target)
    with pytest.raises(DataError, match=r"train/cat/again: this link leads to .*, which contains it\. Remove it"):
        load("folder", root)


@pytest.mark.parametrize("target", ["nowhere", "lost.png"])
def test_a_link_that_leads_nowhere_is_refused(root: Path, target: str) -> None:
    (root / "train" / "cat" / "lost.png").symlink_to(target)  # the second one leads to itself
    with pytest.raises(DataError, match=r"cat/lost\.png: this link leads nowhere"):
        load("folder", root)


def test_what_is_no_file_is_not_opened(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    os.mkfifo(root / "train" / "cat" / "pipe.png")
    assert len(load("folder", root).train) == 4
    assert "cat/pipe.png" in caplog.text


# Parts


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
@KINDS
def test_a_validation_part_is_known_by_three_names(root: Path, name: str, kind: str) -> None:
    write(root / name, ("cat/v.png", "dog/v.png"))
    tar_folders(root, ("train", "test", name))
    splits = load(kind, root)
    assert splits.validation is not None
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [4, 2, 4]
    assert there(splits, "validation") == [("cat/v.png", "cat"), ("dog/v.png", "dog")]


def test_two_validation_parts_are_refused(root: Path) -> None:
    for name in ("valid", "val"):
        write(root / name, ("cat/v.png", "dog/v.png"))
    for read, name in ((load, "folder"), (check_folder, "folder"), (check_folder, "torch/folder")):
        with pytest.raises(DataError, match="val and .*valid: one of them may hold the validation images"):
            read(name, root)


def test_the_image_folder_of_torchvision_is_read_alike(root: Path) -> None:
    write(root / "train", ["cat/3.webp"], encoded(kind="WEBP"))
    write(root / "valid", ("cat/.x.png", "cat/1.png", "dog/1.png"))
    one, other = load("folder", root), load("torch/image_folder", root)
    for part in ("train", "validation", "test"):
        assert there(one, part) == there(other, part)


def test_the_whole_root_is_never_the_test_set_of_torchvisions_folder(tmp_path: Path) -> None:
    write(tmp_path, ("cat/1.png", "dog/1.png"))
    with pytest.raises(DataError, match=r"no .*/train: it holds one folder"):
        load("torch/image_folder", tmp_path)


def test_a_part_beside_training_is_the_test_set(tmp_path: Path) -> None:
    write(tmp_path / "train", FOUR)
    write(tmp_path / "val", ("cat/1.png", "dog/1.png"))
    for kind in ("folder", "tar"):
        tar_folders(tmp_path, ("train", "val"))
        splits = load(kind, tmp_path, num_classes=2)
        assert red(splits.train) == [0, 1, 2, 3]
        assert splits.train.labels.tolist() == [0, 0, 1, 1]  # type: ignore[union-attr]
        assert (splits.train.num_classes, len(splits.test), splits.validation) == (2, 2, None)
        with pytest.raises(ConfigError, match=r"num_classes is 3, but .* 2 classes"):
            load(kind, tmp_path, num_classes=3)


def test_images_are_held_out_where_no_validation_part_is(root: Path) -> None:
    splits = load("folder", root, subset=4, val_fraction=0.5)
    assert sorted(red(splits.train) + red(splits.validation)) == [0, 1, 2, 3]
    write(root / "val", ("cat/v.png", "dog/v.png"))
    with pytest.raises(ConfigError, match="comes with a validation set"):
        load("folder", root, val_fraction=0.1)


def test_missing_parts_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs data\.root"):
        load("folder")
    with pytest.raises(DataError, match=str(tmp_path / "train")):
        load("folder", tmp_path)
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
    for name in ("folder", "torch/image_folder"):
        train: Any = load(name, root).train
        with pytest.raises(DataError, match=r"cat/1\.png: not a readable image"):
            red(train)
        assert train.labels[0] == 0


# Tar files


def test_a_tar_file_may_hold_one_for_each_class(tmp_path: Path) -> None:
    inner = {"n2.tar": tar_of(["b.png", "a.PNG"]), "n10.tar": tar_of(["./deep/c.png", "a.png"])}
    write_tar(tmp_path / "train.tar", inner)
    write_tar(tmp_path / "val.tar", {f"val/{name}": content for name, content in inner.items()})
    splits = load("tar", tmp_path)
    expected = [("n2/a.PNG", "n2"), ("n2/b.png", "n2"), ("n10/a.png", "n10"), ("n10/deep/c.png", "n10")]
    assert there(splits) == there(splits, "test") == expected
    assert red(splits.train) == [1, 0, 1, 0]


def test_a_tar_source_travels_to_other_processes(tmp_path: Path) -> None:
    for part in ("train", "val"):
        write_tar(tmp_path / f"{part}.tar", {"cat/1.png": encoded(7), "dog/1.png": encoded(9)})
    train = load("tar", tmp_path).train
    again = pickle.loads(pickle.dumps(train))
    assert again.image(1).getpixel((0, 0)) == (9, 0, 0)
    path = tmp_path / "train.tar"
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(DataError, match=r"train\.tar, dog/1\.png: not a readable image"):
        again.image(1)


def test_links_in_a_tar_file_are_images_too(tmp_path: Path) -> None:
    files = {"all/1.png": encoded(1), "cat/2.png": encoded(2)}
    links = {
        "dog/3.png": (tarfile.LNKTYPE, "cat/2.png"),
        "dog/4.png": (tarfile.SYMTYPE, "../all/1.png"),
        "dog/5.png": (tarfile.SYMTYPE, "4.png"),
    }
    for part in ("train", "val"):
        write_tar(tmp_path / f"{part}.tar", files, links)
    train = load("tar", tmp_path).train
    assert red(train) == [1, 2, 2, 1, 1]
    write_tar(tmp_path / "train.tar", files, {"dog/6.png": (tarfile.SYMTYPE, "../../outside.png")})
    with pytest.raises(DataError, match=r"lies outside of the tar file"):
        load("tar", tmp_path)
    write_tar(tmp_path / "train.tar", files, {"dog/6.png": (tarfile.SYMTYPE, "6.png")})
    with pytest.raises(DataError, match=r"dog/6\.png: this link leads to dog/6\.png, which is no image"):
        load("tar", tmp_path)


def test_a_name_that_comes_again_replaces_the_earlier_one(tmp_path: Path) -> None:
    write_tar(tmp_path / "val.tar", {"cat/1.png": encoded(), "dog/1.png": encoded()})
    path = tmp_path / "train.tar"
    write_tar(path, {"cat/1.png": encoded(1), "dog/1.png": encoded()})
    with tarfile.open(path, "a") as tar:
        (tmp_path / "new.png").write_bytes(encoded(200))
        tar.add(tmp_path / "new.png", "cat/1.png")
    train = load("tar", tmp_path).train
    assert red(train) == [200, 0]


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
        (lambda content: __import__("gzip").compress(content), "compressed or no tar file.*gunzip"),
        (lambda content: __import__("bz2").compress(content), "compressed or no tar file.*bunzip2"),
        (lambda content: __import__("lzma").compress(content), "compressed or no tar file.*unxz"),
    ],
)
@pytest.mark.parametrize("nested", [False, True], ids=["outer", "inner"])
def test_a_damaged_tar_file_is_refused(tmp_path: Path, damage: Any, said: str, nested: bool) -> None:
    good = tar_of(["cat/1.png", "dog/1.png"])
    (tmp_path / "val.tar").write_bytes(good)
    bad = damage(good)
    (tmp_path / "train.tar").write_bytes(bad)
    if nested:
        write_tar(tmp_path / "train.tar", {"bird/1.png": encoded(), "inner.tar": bad, "wolf/1.png": encoded()})
    with pytest.raises(DataError, match=rf"train\.tar: .*{said}"):
        load("tar", tmp_path)


# As version 0.1 read them

VERSION_1 = [
    "cat/s1/x.png",
    "dog/s1/y.png",
    "dog/.hidden/z.JPEG",
    "dog/img10.jpg",
    "dog/img9.jpg",
    "Bird 2/a.png",
    "bird 10/a.png",
    "bird 10/a.webp",
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
    train = splits.train
    assert isinstance(train, FileSource)
    found = [(str(train.path / name), label) for name, label in zip(train.names, train.labels.tolist(), strict=True)]
    assert found == reader.samples


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # timm keeps its tar files open
def test_version_1_reads_tar_files_as_timm_does(tmp_path: Path) -> None:
    inner = {"n2.tar": tar_of(["b.png", "A.png", "sub/a.png"]), "x/n1.tar": tar_of(["a.png", "b.png"])}
    more = {name: encoded(50) for name in VERSION_1}
    for part in ("train", "val"):
        write_tar(tmp_path / f"{part}.tar", {"z/last.png": encoded(99), **inner, **more})
    splits = load("tar", tmp_path, version=1)
    reader = create_reader("", str(tmp_path / "train.tar"))
    assert splits.classes == tuple(reader.class_name_to_idx)
    train = splits.train
    assert isinstance(train, FileSource)
    assert train.labels.tolist() == reader.targets.tolist()
    assert train.names == [reader.filename(index) for index in range(len(reader))]
    for index in range(len(reader)):
        assert train.image(index).getpixel((0, 0)) == Image.open(reader[index][0]).getpixel((0, 0))
