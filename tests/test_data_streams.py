from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from images_and_loaders import BATCH, PLAIN, assert_same, evaluation, labels_in, load, saved, tar_of, training
from PIL import Image

from famba.data import Augmentation, Splits, StreamSource
from famba.errors import ConfigError, DataError

pytest.importorskip("webdataset")
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*use of fork:DeprecationWarning", "ignore:unclosed file:ResourceWarning"
)
TIMM = replace(PLAIN, kind="timm", hflip=0.5)
WORKERS = pytest.mark.parametrize("workers", [0, 2])


@pytest.fixture(autouse=True)
def _collect() -> Iterator[None]:
    """Let the files that webdataset leaves open be closed where their warning is ignored."""
    yield
    gc.collect()


def write_shards(folder: Path, shards: list[list[tuple[str, bytes]]], test: str) -> None:
    """Write each image, (ending, content), with its number as its label, for training and for a test split."""
    number, parts = 0, {}
    for split in ("train", test):
        names, number = [f"{split}-{shard}.tar" for shard in range(len(shards))], 0
        for name, images in zip(names, shards, strict=True):
            files = {}
            for ending, content in images:
                files |= {f"{number:04}.{ending}": content, f"{number:04}.cls": str(number).encode()}
                number += 1
            (folder / name).write_bytes(tar_of(files))
        parts[split] = {"name": split, "filenames": names, "shard_lengths": [*map(len, shards)], "num_samples": number}
    (folder / "_info.json").write_text(json.dumps({"splits": parts}))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards of six images each; the label of an image is its number."""
    folder, drawn = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    shards = drawn.integers(0, 256, (4, 6, 10, 10, 3), dtype=np.uint8)
    write_shards(
        folder, [[("png", saved(Image.fromarray(image))) for image in shard] for shard in shards], "validation"
    )
    return folder


def streamed(root: Path, **changes: Any) -> Splits:
    return load("wds/", root, **{"num_classes": 24, **changes})


def epochs(root: Path, augmentation: Augmentation = BATCH, **changes: Any) -> Any:
    return training(streamed(root).train, augmentation, **{"seed": 1, "batch_size": 4, **changes})


def test_a_stream_knows_its_length_and_must_be_told_its_classes(root: Path) -> None:
    splits = streamed(root)
    assert isinstance(splits.train, StreamSource)
    assert (len(splits.train), len(splits.test), splits.validation) == (24, 24, None)
    with pytest.raises(ConfigError, match="set num_classes"):
        streamed(root, num_classes=None)
    for setting in ({"subset": 3}, {"val_fraction": 0.1}):
        with pytest.raises(ConfigError, match="no random access"):
            streamed(root, **setting)
    with pytest.raises(DataError, match="cannot be opened"):
        streamed(root / "absent")
    with pytest.raises(ConfigError, match="repeats must be 1"):
        epochs(root, repeats=3)


@WORKERS
def test_an_epoch_of_one_process_has_every_image_in_an_order_of_its_own(root: Path, workers: int) -> None:
    batches = epochs(root, workers=workers)
    assert batches.steps_per_epoch == 6
    first, second = labels_in(batches.epoch(0)), labels_in(batches.epoch(1))
    assert sorted(first) == list(range(24))
    assert first != second
    shares = [labels_in(epochs(root, rank=rank, world_size=2, workers=workers).epoch(0)) for rank in range(2)]
    assert [len(share) for share in shares] == [12, 12]
    assert first == labels_in(epochs(root, workers=workers).epoch(0))
    assert first != labels_in(epochs(root, workers=workers, seed=2).epoch(0))


@WORKERS
def test_a_stream_resumes_in_mid_epoch(root: Path, workers: int) -> None:
    options: dict[str, Any] = {"workers": workers, "accumulation": 2}
    whole = list(epochs(root, TIMM, **options).epoch(0))
    assert [images.shape for images, _ in whole] == [torch.Size([2, 3, 8, 8])] * 12
    assert_same(epochs(root, TIMM, **options).epoch(0, 2), whole[4:])


@pytest.mark.parametrize("world_size", [1, 3])
@WORKERS
def test_evaluation_of_a_stream_counts_each_image_once(root: Path, world_size: int, workers: int) -> None:
    seen = []
    for rank in range(world_size):
        options: dict[str, Any] = {"batch_size": 5, "rank": rank, "world_size": world_size, "workers": workers}
        batches = evaluation(streamed(root).test, BATCH, **options)
        seen += labels_in(batches)
        assert labels_in(batches) == labels_in(batches)
    assert sorted(seen) == list(range(24))


def test_more_workers_than_files_are_named(root: Path) -> None:
    with pytest.raises(DataError, match="every worker needs a file of its own"):
        list(epochs(root, rank=2, world_size=4, workers=2).epoch(0))


def test_streamed_images_are_read_as_those_in_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    corner = Image.new("RGB", (16, 8))
    corner.paste("white", (0, 0, 8, 8))
    clear = Image.new("RGBA", (8, 8))
    images = [
        ("png", saved(clear)),
        ("tif", saved(Image.fromarray(np.full((8, 8), 32_896, np.uint16)), "TIFF")),
        ("jpeg", saved(corner, "JPEG", exif=turned)),
        ("webp", saved(clear, "WEBP", lossless=True)),
    ]
    write_shards(tmp_path, [images], "valid")
    splits = streamed(tmp_path, num_classes=4, background="#ff0000")
    assert isinstance(splits.train, StreamSource)
    assert isinstance(splits.test, StreamSource)
    for given in (splits.test.images(), splits.train.images(is_training=True, batch_size=4)):
        found = {number: (image.size, image.getpixel((1, 1))) for image, number in given}
        assert found[0] == found[3] == ((8, 8), (255, 0, 0))
        assert found[1] == ((8, 8), (128, 128, 128))
        assert found[2] == ((8, 16), (255, 255, 255))
    assert "Ignoring" not in caplog.text


def test_a_streamed_image_or_label_that_cannot_be_is_named(root: Path, tmp_path: Path) -> None:
    write_shards(tmp_path, [[("tif", saved(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"))]], "valid")
    floats = streamed(tmp_path, num_classes=1)
    for said, batches in (
        ("split valid: an image: .*its pixels are floats", evaluation(floats.test, workers=1)),
        ("split train: an image: .*its pixels are floats", training(floats.train, batch_size=1).epoch(0)),
        (r"split validation: an image: label \d+ is not in 0\.\.2", evaluation(streamed(root, num_classes=3).test)),
    ):
        with pytest.raises(DataError, match=said):
            list(batches)
