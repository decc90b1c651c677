from __future__ import annotations

import io
import struct
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import ImageFolder

from famba.data import LOADERS, ArraySource, Source, Splits, SubsetSource, labels_of, load_splits, named, sample, take
from famba.data.draws import Stream, permutation
from famba.errors import ConfigError, DataError

PIXELS, LABELS = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)


def load(name: str, root: Path | None = None, **changes: Any) -> Splits:
    options: dict[str, Any] = {"subset": None, "val_fraction": 0.0, "num_classes": None}
    return load_splits(name, root, **{**options, **changes})


def image(value: int) -> Image.Image:
    return Image.new("RGB", (10, 8), (value, 0, 0))


def write_folder(root: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 3) -> None:
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            image(100 * number + i).save(root / name / f"{i}.png")


def write_tar(path: Path, count: int = 2) -> None:
    with tarfile.open(path, "w") as tar:
        for number, name in enumerate(("cat", "dog")):
            for i in range(count):
                buffer = io.BytesIO()
                image(100 * number + i).save(buffer, "PNG")
                info = tarfile.TarInfo(f"{name}/{i}.png")
                info.size = len(buffer.getvalue())
                tar.addfile(info, io.BytesIO(buffer.getvalue()))


def red(source: Any) -> list[int]:
    return [source.image(i).getpixel((0, 0))[0] for i in range(len(source))]


def label(source: Any, index: int) -> int:
    return int(source.label(index))


def array_source(count: int = 20) -> ArraySource:
    images = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)
    return ArraySource(images, torch.arange(count), count)


def test_digits_are_real_images_with_a_fixed_split() -> None:
    first, second = load("digits"), load("digits")
    assert isinstance(first.train, ArraySource)
    assert isinstance(first.test, ArraySource)
    assert first.train.images.shape == (1437, 3, 32, 32)
    assert first.test.images.shape == (360, 3, 32, 32)
    assert first.train.images.dtype == torch.uint8
    assert first.train.images.max() == 255
    assert first.train.images.min() == 0
    assert set(first.test.labels.bincount().tolist()) <= set(range(33, 40))  # about 36 of each digit
    for one, other in ((first.train, second.train), (first.test, second.test)):
        assert isinstance(other, ArraySource)
        assert torch.equal(one.images, other.images)
    train = {image.numpy().tobytes() for image in first.train.images}
    shared = sum(image.numpy().tobytes() in train for image in first.test.images)
    assert shared == 0


def test_an_unknown_name_gets_a_near_miss() -> None:
    with pytest.raises(ConfigError, match="did you mean 'digits'"):
        load("digit")


def test_the_largest_subset_is_named() -> None:
    for wrong in (0, 1438):
        with pytest.raises(ConfigError, match="from 1 to the 1437"):
            load("digits", subset=wrong)


def counts(source: Any) -> list[int]:
    return np.bincount(labels_of(source), minlength=source.num_classes).tolist()


def write_mnist(root: Path, training: list[int]) -> None:
    """Write MNIST's files with these labels; the red of an image is its number."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, labels in (("train", training), ("t10k", [0, 1])):
        header = struct.pack(">IIII", 2051, len(labels), 28, 28)
        images = b"".join(bytes([number]) * 28 * 28 for number in range(len(labels)))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, len(labels)) + bytes(labels))


@pytest.fixture(params=["folder", "tar", "digits", "arrays", "torch/mnist"])
def uneven(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that loads a data set of each kind, with a class twice as large as the next."""
    kind = request.param
    sizes = {0: 40, 1: 20, 2: 10, 3: 10}
    labels = [number for number, size in sizes.items() for _ in range(size)]
    for part in ("train", "val"):
        for number, size in sizes.items():
            write_folder(tmp_path / part, (str(number),), size)
        with tarfile.open(tmp_path / f"{part}.tar", "w") as tar:
            tar.add(tmp_path / part, "")
    write_mnist(tmp_path, labels)
    images = torch.arange(80, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)
    source = ArraySource(images, torch.tensor(labels), 4)
    monkeypatch.setitem(LOADERS, "arrays", lambda root, num_classes: Splits(source, None, source))
    where = None if kind in ("digits", "arrays") else tmp_path
    return lambda **changes: load(kind, where, **changes)


def test_a_subset_has_every_class_in_proportion(uneven: Any) -> None:
    whole = np.array(counts(uneven().train))
    before: set[bytes] = set()
    for images in (8, 20, 40, 79):
        part = uneven(subset=images).train
        assert len(part) == images
        assert np.abs(counts(part) - whole * images / whole.sum()).max() <= 1
        chosen = {np.asarray(part.image(index)).tobytes() + bytes([part.label(index)]) for index in range(images)}
        assert before <= chosen, "a smaller subset lies in a larger one"
        before = chosen


def test_every_class_is_in_proportion_where_images_are_held_out(uneven: Any) -> None:
    whole = np.array(counts(uneven().train))
    splits = uneven(val_fraction=0.1)
    assert np.abs(counts(splits.validation) - whole * 0.1).max() <= 1
    assert (np.array(counts(splits.train)) + counts(splits.validation) == whole).all()


def test_subset_and_held_out_images_of_version_1_are_those_that_they_were() -> None:
    whole, splits = load("digits").train, load("digits", subset=100, val_fraction=0.2, version=1)
    assert isinstance(whole, ArraySource)
    held = permutation(Stream.SPLIT, 0, 0, 100)[:20]
    assert isinstance(splits.validation, ArraySource)
    assert torch.equal(splits.validation.images, whole.images[torch.from_numpy(np.sort(held))])


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_val_fraction_has_limits(fraction: float) -> None:
    with pytest.raises(ConfigError, match="val_fraction"):
        load("digits", val_fraction=fraction)


def test_val_fraction_holds_out_the_same_images_of_the_subset_in_every_run() -> None:
    def parts() -> list[ArraySource]:
        splits = load("digits", subset=200, val_fraction=0.25)
        assert isinstance(splits.train, ArraySource)
        assert isinstance(splits.validation, ArraySource)
        return [splits.train, splits.validation]

    whole = load("digits", subset=200).train
    assert isinstance(whole, ArraySource)
    train, validation = parts()
    assert (len(train), len(validation)) == (150, 50)
    both = sorted(image.numpy().tobytes() for image in torch.cat([train.images, validation.images]))
    assert both == sorted(image.numpy().tobytes() for image in whole.images)
    assert [p.labels.tolist() for p in parts()] == [train.labels.tolist(), validation.labels.tolist()]
    assert not torch.equal(validation.images, whole.images[-50:])  # drawn, not cut off


def test_without_val_fraction_nothing_is_held_out() -> None:
    assert load("digits").validation is None


@given(st.lists(st.integers(0, 19), min_size=1))
def test_a_subset_has_the_images_it_was_asked_for(indices: list[int]) -> None:
    chosen = np.array(indices)
    in_memory = take(array_source(), chosen)
    assert isinstance(in_memory, ArraySource)
    behind = SubsetSource(array_source(), chosen, 20)
    for subset in (in_memory, behind):
        assert isinstance(subset, Source)
        assert [subset.label(i) for i in range(len(subset))] == indices
        assert red(subset) == indices
        assert subset.num_classes == 20


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 3, 4, 4), LABELS, "images must be uint8"),
        (
            torch.zeros(2, 1, 4, 4, dtype=torch.uint8),
            torch.zeros(2, dtype=torch.int64),
            "images must be uint8",
        ),
        (
            torch.zeros(2, 3, 4, 4, dtype=torch.uint8),
            torch.zeros(3, dtype=torch.int64),
            "labels must be int64",
        ),
        (PIXELS, torch.tensor([0, 5]), "image 1: label 5"),
    ],
)
def test_arrays_of_another_kind_are_refused(images: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ArraySource(images, labels, 5)


def test_a_folder_has_sorted_classes_and_one_test_set(tmp_path: Path) -> None:
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "val", count=1)
    splits = load("folder", tmp_path)
    assert splits.train.num_classes == 2
    assert [label(splits.train, i) for i in range(6)] == [0, 0, 0, 1, 1, 1]
    assert red(splits.train) == [0, 1, 2, 100, 101, 102]
    assert (len(splits.test), splits.validation) == (2, None)


def test_a_folder_with_val_and_test_has_both(tmp_path: Path) -> None:
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "validation", count=1)
    write_folder(tmp_path / "test", count=2)
    splits = load("folder", tmp_path)
    assert splits.validation is not None
    assert (len(splits.validation), len(splits.test)) == (2, 4)
    with pytest.raises(ConfigError, match="comes with a validation set"):
        load("folder", tmp_path, val_fraction=0.1)


def test_subset_and_val_fraction_of_a_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "val", count=1)
    splits = load("folder", tmp_path, subset=4, val_fraction=0.5)
    assert counts(splits.train) == counts(splits.validation) == [1, 1]
    assert sorted(red(splits.train) + red(splits.validation)) == red(load("folder", tmp_path, subset=4).train)


@pytest.mark.parametrize("damage", [b"", b"no image at all", None])
def test_a_corrupt_image_is_named_and_not_skipped(tmp_path: Path, damage: bytes | None) -> None:
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "val")
    path = tmp_path / "train" / "cat" / "1.png"
    path.write_bytes(path.read_bytes()[:40] if damage is None else damage)
    train = load("folder", tmp_path).train
    with pytest.raises(DataError, match=r"cat/1\.png: not a readable image"):
        red(train)
    assert label(train, 1) == 0


def test_what_is_missing_from_a_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs data\.root"):
        load("folder")
    with pytest.raises(DataError, match=str(tmp_path / "train")):
        load("folder", tmp_path)
    write_folder(tmp_path / "train")
    with pytest.raises(DataError, match=f"{tmp_path / 'val'} or .* or {tmp_path / 'test'}"):
        load("folder", tmp_path)
    (tmp_path / "val").mkdir()
    with pytest.raises(DataError, match="holds no readable images"):
        load("folder", tmp_path)


def test_classes_of_a_folder_must_agree(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", ("cat", "dog"))
    write_folder(tmp_path / "val", ("cat", "fox"))
    with pytest.raises(DataError, match="without dog, with the unknown fox"):
        load("folder", tmp_path)
    image(1).save(tmp_path / "train" / "stray.png")
    with pytest.raises(DataError, match="some lie outside"):
        load("folder", tmp_path)


def test_the_number_of_classes_must_be_that_of_the_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "val")
    assert load("folder", tmp_path, num_classes=2).train.num_classes == 2
    with pytest.raises(ConfigError, match=r"num_classes is 3, but .* 2 classes"):
        load("folder", tmp_path, num_classes=3)


def test_tar_files_are_read_like_folders(tmp_path: Path) -> None:
    write_tar(tmp_path / "train.tar")
    write_tar(tmp_path / "val.tar", count=1)
    splits = load("tar", tmp_path)
    assert red(splits.train) == [0, 1, 100, 101]
    assert [label(splits.train, i) for i in range(4)] == [0, 0, 1, 1]
    assert len(splits.test) == 2


def test_a_tar_file_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.tar").write_bytes(b"nothing")
    write_tar(tmp_path / "val.tar", count=1)
    with pytest.raises(DataError, match=r"train\.tar: holds no readable images"):
        load("tar", tmp_path)


def test_names_of_timm_with_random_access(tmp_path: Path) -> None:
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "val", count=1)
    splits = load("torch/image_folder", tmp_path)
    assert red(splits.train) == [0, 1, 2, 100, 101, 102]
    assert [label(splits.test, i) for i in range(2)] == [0, 1]
    (tmp_path / "train" / "dog" / "0.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"dog/0\.png: not a readable image"):
        red(splits.train)
    with pytest.raises(ConfigError, match="num_classes is 7"):
        load("torch/image_folder", tmp_path, num_classes=7)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("torhc/cifar10", ConfigError, "did you mean 'torch'"),
        ("torch/cifar10", DataError, "not found or corrupted"),
        ("torch/nothing", DataError, "Unknown torchvision dataset"),
    ],
)
def test_names_that_timm_cannot_open(tmp_path: Path, name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load(name, tmp_path)


def test_torchvision_needs_a_folder() -> None:
    with pytest.raises(ConfigError, match=r"needs data\.root"):
        load("torch/cifar10")


def test_data_sets_of_torchvision_tell_their_classes_and_are_read_upright(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_mnist(tmp_path, [0, 1])
    assert load("torch/mnist", tmp_path).classes is not None
    write_folder(tmp_path / "images", ("cat", "dog"), 1)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGBA", (10, 8)).save(tmp_path / "images" / "dog" / "0.png", exif=exif)
    # Stands for torch/imagenet, which is a folder too, and gives several names for a class.
    found = ImageFolder(str(tmp_path / "images"))
    found.classes = [("cat", "tom"), ("dog",)]
    monkeypatch.setattr(named, "create_dataset", lambda *arguments, **options: found)
    splits = load("torch/imagenet", tmp_path, background="#0000ff")
    assert splits.classes == ("cat, tom", "dog")
    dog = splits.train.image(1)  # type: ignore[union-attr]
    assert (dog.size, dog.getpixel((0, 0))) == ((8, 10), (0, 0, 255))
    (tmp_path / "images" / "dog" / "0.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"dog/0\.png: not a readable image"):
        splits.train.image(1)  # type: ignore[union-attr]


def test_parts_of_a_named_data_set_with_other_class_numbers_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def create(name: str, root: str, split: str, **options: Any) -> Any:
        numbers = {"cat": 0, "dog": 1} if split == "train" else {"dog": 0, "cat": 1}
        return SimpleNamespace(reader=SimpleNamespace(class_to_idx=numbers))

    monkeypatch.setattr(named, "create_dataset", create)
    with pytest.raises(DataError, match="class 0 is 'cat' in training and 'dog' in 'validation'"):
        load("hfds/somebody/pets", tmp_path)


def test_the_split_that_is_tested_on_is_said_where_others_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def create(name: str, root: str, split: str, **options: Any) -> Any:
        if split not in ("train", "valid"):
            raise ValueError(f"no {split}")
        return SimpleNamespace(reader=SimpleNamespace(class_to_idx={"cat": 0, "dog": 1}))

    monkeypatch.setattr(named, "create_dataset", create)
    load("hfds/somebody/pets", tmp_path)
    assert "split 'valid' is the test set, since others cannot be opened: validation: no validation" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"background": "wite"}, "background 'wite' is no colour.*did you mean 'white'"),
        ({"background": "black", "version": 1}, "version 1 drops transparency"),
        ({"version": 3}, "version is 3; allowed: 2, or 1"),
    ],
)
def test_ways_of_reading_that_do_not_exist_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load("digits", **options)


def test_a_sample_does_not_follow_the_order_of_the_images() -> None:
    images = torch.arange(100, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)
    in_turn = ArraySource(images, torch.arange(100) % 10, 10)
    assert counts(sample(in_turn, 20, version=2)) == [2] * 10
    assert red(sample(in_turn, 20, version=1)) == list(range(0, 100, 5))
