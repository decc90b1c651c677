from __future__ import annotations

import gc
import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from famba.data import Augmentation, Batch, Splits, StreamSource, eval_batches, load_splits, train_batches
from famba.errors import ConfigError, DataError

pytest.importorskip("webdataset")
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*use of fork:DeprecationWarning", "ignore:unclosed file:ResourceWarning"
)

SHARDS, PER_SHARD = 4, 6
CROP = Augmentation(
    kind="batch",
    crop_padding=2,
    hflip=0.5,
    auto_augment=None,
    color_jitter=0.0,
    random_erasing=0.0,
    erasing_mode="pixel",
    interpolation="bicubic",
    eval_crop=1.0,
)
TIMM = replace(CROP, kind="timm", crop_padding=0)
SIZES: dict[str, Any] = {"image_size": 8, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


@pytest.fixture(autouse=True)
def _collect() -> Iterator[None]:
    """Let the files that webdataset leaves open be closed where their warning is ignored."""
    yield
    gc.collect()


def write_shard(path: Path, first: int) -> None:
    with tarfile.open(path, "w") as tar:
        for number in range(first, first + PER_SHARD):
            buffer = io.BytesIO()
            noise = torch.randint(0, 256, (300,), generator=torch.Generator().manual_seed(number))
            Image.frombytes("RGB", (10, 10), bytes(noise.tolist())).save(buffer, "PNG")
            for ending, content in (("png", buffer.getvalue()), ("cls", str(number).encode())):
                info = tarfile.TarInfo(f"{number:04}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards of six images each; the label of an image is its number."""
    folder = tmp_path_factory.mktemp("shards")
    splits = {}
    for split in ("train", "validation"):
        names = [f"{split}-{shard}.tar" for shard in range(SHARDS)]
        for shard, name in enumerate(names):
            write_shard(folder / name, shard * PER_SHARD)
        splits[split] = {
            "name": split,
            "filenames": names,
            "shard_lengths": [PER_SHARD] * SHARDS,
            "num_samples": SHARDS * PER_SHARD,
        }
    (folder / "_info.json").write_text(json.dumps({"splits": splits}))
    return folder


def load(root: Path, **changes: Any) -> Splits:
    options: dict[str, Any] = {"subset": None, "val_fraction": 0.0, "num_classes": 24}
    return load_splits("wds/", root, **{**options, **changes})


def training(root: Path, augmentation: Augmentation = CROP, **changes: Any) -> Any:
    options: dict[str, Any] = {
        **SIZES,
        "seed": 1,
        "batch_size": 4,
        "accumulation": 1,
        "rank": 0,
        "world_size": 1,
        "workers": 0,
        "repeats": 1,
    }
    return train_batches(load(root).train, augmentation, **{**options, **changes})


def labels_of(batches: Iterable[Batch]) -> list[int]:
    return [int(label) for _, labels in batches for label in labels]


def test_a_stream_knows_its_length_and_must_be_told_its_classes(root: Path) -> None:
    splits = load(root)
    assert isinstance(splits.train, StreamSource)
    assert (len(splits.train), len(splits.test), splits.validation) == (24, 24, None)
    with pytest.raises(ConfigError, match="set num_classes"):
        load(root, num_classes=None)
    for setting in ({"subset": 3}, {"val_fraction": 0.1}):
        with pytest.raises(ConfigError, match="no random access"):
            load(root, **setting)
    with pytest.raises(DataError, match="cannot be opened"):
        load(root / "absent")


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_of_one_process_has_every_image_in_an_order_of_its_own(root: Path, workers: int) -> None:
    batches = training(root, workers=workers)
    assert batches.steps_per_epoch == 6
    first, second = labels_of(batches.epoch(0)), labels_of(batches.epoch(1))
    assert sorted(first) == list(range(24))
    assert first != second
    assert first == labels_of(training(root, workers=workers).epoch(0))
    assert first != labels_of(training(root, workers=workers, seed=2).epoch(0))


def test_processes_share_the_shards(root: Path) -> None:
    shares = [labels_of(training(root, rank=rank, world_size=2).epoch(0)) for rank in range(2)]
    assert [len(share) for share in shares] == [12, 12]
    assert sorted(shares[0] + shares[1]) == list(range(24))


@pytest.mark.parametrize("augmentation", [CROP, TIMM], ids=["batch", "timm"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_resumes_in_mid_epoch(root: Path, augmentation: Augmentation, workers: int) -> None:
    options: dict[str, Any] = {"workers": workers, "accumulation": 2}
    whole = list(training(root, augmentation, **options).epoch(0))
    assert [images.shape for images, _ in whole] == [torch.Size([2, 3, 8, 8])] * 12
    rest = list(training(root, augmentation, **options).epoch(0, 2))
    assert len(rest) == 8
    for (images, labels), (again, same) in zip(whole[4:], rest, strict=True):
        assert torch.equal(images, again)
        assert torch.equal(labels, same)


def test_streamed_images_are_augmented_each_on_its_own(root: Path) -> None:
    views: dict[int, set[bytes]] = {}
    batches = training(root)
    for epoch in range(3):
        for images, labels in batches.epoch(epoch):
            for image, label in zip(images, labels.tolist(), strict=True):
                views.setdefault(label, set()).add(image.numpy().tobytes())
    assert sum(len(found) > 1 for found in views.values()) > 20


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_of_a_stream_counts_each_image_once(root: Path, world_size: int, workers: int) -> None:
    seen = []
    for rank in range(world_size):
        batches = eval_batches(
            load(root).test, CROP, **SIZES, batch_size=5, rank=rank, world_size=world_size, workers=workers
        )
        seen += labels_of(batches)
        assert labels_of(batches) == labels_of(batches)
    assert sorted(seen) == list(range(24))


def test_more_workers_than_files_are_named(root: Path) -> None:
    with pytest.raises(DataError, match="every worker needs a file of its own"):
        list(training(root, rank=2, world_size=4, workers=2).epoch(0))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_label_out_of_range_is_named(root: Path, workers: int) -> None:
    small = load(root, num_classes=3)
    batches = eval_batches(small.test, CROP, **SIZES, batch_size=5, rank=0, world_size=1, workers=workers)
    with pytest.raises(DataError, match=r"split validation: label \d+ is not in 0\.\.2"):
        list(batches)


def test_a_stream_cannot_repeat_images(root: Path) -> None:
    with pytest.raises(ConfigError, match="repeats must be 1"):
        training(root, repeats=3)


def write_mixed(folder: Path, images: dict[str, bytes]) -> None:
    folder.mkdir()
    with tarfile.open(folder / "all.tar", "w") as tar:
        for number, (ending, content) in enumerate(images.items()):
            for suffix, held in ((ending, content), ("cls", str(number).encode())):
                info = tarfile.TarInfo(f"{number:04}.{suffix}")
                info.size = len(held)
                tar.addfile(info, io.BytesIO(held))
    split = {"filenames": ["all.tar"], "shard_lengths": [len(images)], "num_samples": len(images)}
    parts = {name: {"name": name, **split} for name in ("train", "valid")}
    (folder / "_info.json").write_text(json.dumps({"splits": parts}))


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_streamed_images_are_read_as_those_in_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    grey = Image.fromarray(np.full((8, 8), 32_896, np.uint16))
    corner = Image.new("RGB", (16, 8))
    corner.paste("white", (0, 0, 8, 8))
    images = {
        "png": saved(Image.new("RGBA", (8, 8)), "PNG"),
        "tif": saved(grey, "TIFF"),
        "jpeg": saved(corner, "JPEG", exif=turned),
        "webp": saved(Image.new("RGBA", (8, 8)), "WEBP", lossless=True),
    }
    write_mixed(tmp_path / "mixed", images)
    splits = load(tmp_path / "mixed", num_classes=4, background="#ff0000")
    assert isinstance(splits.test, StreamSource)
    for given in (
        splits.test.open_evaluation(),
        sorted(
            splits.train.open_training(seed=0, epoch=0, micro_batch=4, rank=0, world_size=1),  # type: ignore[union-attr]
            key=lambda sample: sample[1],
        ),
    ):
        found = {number: (image.size, image.getpixel((1, 1))) for image, number in given}
        assert found[0] == found[3] == ((8, 8), (255, 0, 0))
        assert found[1] == ((8, 8), (128, 128, 128))
        assert found[2] == ((8, 16), (255, 255, 255))
    assert "Ignoring" not in caplog.text


@pytest.mark.parametrize("workers", [0, 1])
def test_a_streamed_image_of_no_known_range_is_named(tmp_path: Path, workers: int) -> None:
    floats = saved(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF")
    write_mixed(tmp_path / "floats", {"tif": floats})
    splits = load(tmp_path / "floats", num_classes=1)
    batches = eval_batches(splits.test, CROP, **SIZES, batch_size=1, rank=0, world_size=1, workers=workers)
    with pytest.raises(DataError, match=r"split valid: an image: its pixels are floats"):
        list(batches)
    options: dict[str, Any] = {"seed": 1, "batch_size": 1, "accumulation": 1, "rank": 0, "world_size": 1, "repeats": 1}
    with pytest.raises(DataError, match=r"split train: an image: its pixels are floats"):
        list(train_batches(splits.train, CROP, **SIZES, **options, workers=workers).epoch(0))
