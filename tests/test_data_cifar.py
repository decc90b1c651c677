from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import pickle
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets import utils as torchvision_utils

from famba.data import ArraySource, Splits, default_root, download, load_splits, num_classes_of
from famba.errors import ConfigError, DataError


def load(name: str, root: Path | None, **changes: Any) -> Splits:
    options: dict[str, Any] = {"subset": None, "val_fraction": 0.0, "num_classes": None}
    return load_splits(name, root, **{**options, **changes})


def in_memory(source: object) -> ArraySource:
    assert isinstance(source, ArraySource)
    return source


def pixels(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(
    path: Path, images: list[Any], labels: list[Any], image: str = "img", label: str = "fine_label"
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": encoded, "path": "x.png"} for encoded in images]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({image: pa.array(cells, kind), label: pa.array(labels, pa.int64())})
    pq.write_table(table, path)
    return path


def write_split(folder: Path, split: str, count: int, seed: int, **names: str) -> np.ndarray:
    images = pixels(count, seed)
    write_parquet(folder / f"{split}-00000-of-00001.parquet", [png(i) for i in images], list(range(count)), **names)
    return images


NAMES = [f"class {number}" for number in range(100)]


def write_pickle(path: Path, entry: dict[str, Any]) -> list[str]:
    """Write one official file and return [name, MD5]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(entry, protocol=2))
    return [path.name, hashlib.md5(path.read_bytes()).hexdigest()]


def batch(images: np.ndarray, labels: list[int], key: str) -> dict[str, Any]:
    return {"data": images.transpose(0, 3, 1, 2).reshape(len(images), -1), key: labels}


def publish(monkeypatch: pytest.MonkeyPatch, kind: type[CIFAR10], train: Any, test: Any, meta: list[str]) -> None:
    """Let files be those that were published."""
    monkeypatch.setattr(kind, "train_list", train)
    monkeypatch.setattr(kind, "test_list", test)
    monkeypatch.setattr(kind, "meta", {**kind.meta, "filename": meta[0], "md5": meta[1]})


@pytest.fixture
def official(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, np.ndarray]:
    """A small CIFAR-100 in the official form, and its training images."""
    folder, images = tmp_path / "source" / "cifar-100-python", pixels(6, 1)
    train = write_pickle(folder / "train", batch(images, [0, 1, 2, 3, 98, 99], "fine_labels"))
    test = write_pickle(folder / "test", batch(pixels(3, 2), [5, 6, 7], "fine_labels"))
    publish(monkeypatch, CIFAR100, [train], [test], write_pickle(folder / "meta", {"fine_label_names": NAMES}))
    return folder, images


@pytest.mark.parametrize("at_folder", [False, True])
def test_official_files_load_from_the_folder_or_the_one_above(
    official: tuple[Path, np.ndarray], at_folder: bool
) -> None:
    folder, images = official
    splits = load("cifar100", folder if at_folder else folder.parent)
    train = in_memory(splits.train)
    assert train.images.is_contiguous()
    assert train.images.permute(0, 2, 3, 1).numpy().tolist() == images.tolist()
    assert train.labels.tolist() == [0, 1, 2, 3, 98, 99]
    assert (splits.test.num_classes, len(splits.test), splits.classes) == (100, 3, tuple(NAMES))


def test_cifar10_is_read_from_several_batches_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    train = [write_pickle(folder / f"data_batch_{i}", batch(pixels(2, i), [i, i + 1], "labels")) for i in range(1, 4)]
    test = write_pickle(folder / "test_batch", batch(pixels(1, 9), [9], "labels"))
    publish(monkeypatch, CIFAR10, train, [test], write_pickle(folder / "batches.meta", {"label_names": NAMES[:10]}))
    found = in_memory(load("cifar10", tmp_path).train)
    assert found.labels.tolist() == [1, 2, 2, 3, 3, 4]
    assert np.array_equal(np.asarray(found.image(4)), pixels(2, 3)[0])


def test_an_incomplete_folder_names_what_is_missing(official: tuple[Path, np.ndarray]) -> None:
    folder, _ = official
    (folder / "test").unlink()
    with pytest.raises(DataError, match="cifar-100-python: test of cifar100 is missing"):
        load("cifar100", folder.parent)


class _Dangerous:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_a_file_that_was_not_published_is_named_and_its_code_does_not_run(
    tmp_path: Path, official: tuple[Path, np.ndarray]
) -> None:
    folder, _ = official
    for name in ("test", "meta"):
        before = (folder / name).read_bytes()
        write_pickle(folder / name, {"data": _Dangerous(tmp_path / "ran")})
        with pytest.raises(DataError, match=f"cifar-100-python: {name}: damaged or not the published file"):
            load("cifar100", folder)
        (folder / name).write_bytes(before)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("below", ["", "data", "cifar100"])
def test_parquet_is_found_and_decoded(tmp_path: Path, below: str) -> None:
    images = write_split(tmp_path / below, "train", 5, 1)
    write_split(tmp_path / below, "test", 2, 2)
    splits = load("cifar100", tmp_path)
    train = in_memory(splits.train)
    assert train.labels.tolist() == list(range(5))
    assert np.array_equal(train.images.permute(0, 2, 3, 1).numpy(), images)
    assert (len(splits.test), splits.validation) == (2, None)


def test_parquet_of_cifar10_may_call_its_columns_image_and_label(tmp_path: Path) -> None:
    images = write_split(tmp_path / "plain_text", "train", 3, 1, image="image", label="label")
    write_split(tmp_path / "plain_text", "test", 3, 2, image="image", label="label")
    assert np.array_equal(np.asarray(in_memory(load("cifar10", tmp_path).train).image(2)), images[2])


def test_parquet_shards_are_joined_in_order_and_must_be_complete(tmp_path: Path) -> None:
    write_split(tmp_path, "test", 1, 0)
    for shard in (1, 0):
        path = tmp_path / f"train-{shard:05}-of-00002.parquet"
        write_parquet(path, [png(i) for i in pixels(2, shard)], [10 * shard, 10 * shard + 1])
    train = in_memory(load("cifar100", tmp_path).train)
    assert [train.label(i) for i in range(4)] == [0, 1, 10, 11]
    (tmp_path / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(DataError, match="is one of 2 files, but 1 lie there"):
        load("cifar100", tmp_path)


@pytest.mark.parametrize(
    ("image", "label", "message"),
    [
        (b"no image", 3, "not a readable image"),
        (png(pixels(1, 1)[0])[:-400], 3, "not a readable image"),
        (None, 3, "holds no encoded image"),
        (png(np.zeros((8, 9, 3), np.uint8)), 3, "the image is 9 x 8 pixels, not 32 x 32"),
        (png(pixels(1, 1)[0]), 100, r"label 100 is not in 0\.\.99"),
        (png(pixels(1, 1)[0]), -1, r"label -1 is not in 0\.\.99"),
        (png(pixels(1, 1)[0]), None, "label None is not an integer"),
    ],
)
def test_a_bad_row_of_parquet_is_named(tmp_path: Path, image: Any, label: Any, message: str) -> None:
    good = [png(i) for i in pixels(2, 0)]
    write_split(tmp_path, "test", 1, 0)
    path = write_parquet(tmp_path / "train-00000-of-00001.parquet", [*good, image], [0, 1, label])
    with pytest.raises(DataError, match=f"{path.name}, row 2: .*{message}"):
        load("cifar100", tmp_path)


@pytest.mark.parametrize("keep", [0, 50, -1000])
def test_a_truncated_parquet_file_is_named(tmp_path: Path, keep: int) -> None:
    write_split(tmp_path, "test", 1, 0)
    write_split(tmp_path, "train", 3, 0)
    path = tmp_path / "train-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=f"{path.name}: not a readable parquet file"):
        load("cifar100", tmp_path)


def test_damage_inside_a_parquet_file_is_named(tmp_path: Path) -> None:
    write_split(tmp_path, "test", 1, 0)
    write_split(tmp_path, "train", 3, 0)
    path = tmp_path / "train-00000-of-00001.parquet"
    data = bytearray(path.read_bytes())
    data[4:2000] = b"\xff" * 1996
    path.write_bytes(data)
    with pytest.raises(DataError, match=path.name):
        load("cifar100", tmp_path)


def test_parquet_without_the_column_or_the_other_split_is_refused(tmp_path: Path) -> None:
    write_split(tmp_path, "train", 2, 0, label="something")
    with pytest.raises(DataError, match="holds parquet files, but no test-"):
        load("cifar100", tmp_path)
    write_split(tmp_path, "test", 2, 0)
    with pytest.raises(DataError, match="no column 'fine_label' or 'label' among img, something"):
        load("cifar100", tmp_path)


def _unwanted(*_: Any, **__: Any) -> None:
    pytest.fail("a download was started")


def _refuse(*_: Any, **__: Any) -> None:
    raise OSError("Network is unreachable")


def test_a_given_folder_without_data_is_never_downloaded_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision_utils, "download_url", lambda *_, **__: pytest.fail("got"))
    for root in (tmp_path, tmp_path / "absent"):
        with pytest.raises(DataError) as caught:
            load("cifar100", root)
        message = str(caught.value)
        for folder in ("cifar-100-python", "data", "cifar100"):
            assert str(root / folder) in message
        assert f"famba download cifar100 --root {root}" in message
    assert list(tmp_path.iterdir()) == []


def test_a_failed_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAMBA_DATA", str(tmp_path))
    monkeypatch.setattr(torchvision_utils, "download_url", _refuse)
    with pytest.raises(DataError, match=r"Network is unreachable.*famba download cifar100 .*data\.root"):
        load("cifar100", None)


@pytest.fixture
def counted_download(tmp_path: Path, official: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A download that unpacks a local archive; each call adds a line to the file that is returned."""
    folder, _ = official
    archive, calls = tmp_path / "archive.tar.gz", tmp_path / "calls"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, "cifar-100-python")

    def fake(url: str, root: str, filename: str, **_: Any) -> None:
        with calls.open("a") as file:
            file.write(f"{url}\n")
        shutil.copy(archive, Path(root) / filename)

    monkeypatch.setattr(torchvision_utils, "download_url", fake)
    monkeypatch.setenv("FAMBA_DATA", str(tmp_path / "cache"))
    return calls


def _load_and_report(start: Any, answers: Any) -> None:
    start.wait()
    answers.put(len(load("cifar100", None).train))


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_processes_that_need_the_same_data_download_it_once(counted_download: Path) -> None:
    context = multiprocessing.get_context("fork")  # the children must inherit the replaced download
    start, answers = context.Barrier(3), context.Queue()
    children = [context.Process(target=_load_and_report, args=(start, answers)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(timeout=60)
    assert [answers.get(timeout=5) for _ in children] == [6, 6, 6]
    assert counted_download.read_text().count("\n") == 1


def test_download_skips_what_is_there_and_mends_damage(counted_download: Path, tmp_path: Path) -> None:
    root = tmp_path / "chosen"
    assert download("cifar100", root) == root
    download("cifar100", str(root))
    assert counted_download.read_text().count("\n") == 1
    (root / "cifar-100-python" / "test").write_bytes(b"cut off")
    download("cifar100", root)
    assert counted_download.read_text().count("\n") == 2
    assert len(load("cifar100", root).test) == 3


def test_data_placed_in_the_default_folder_needs_no_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAMBA_DATA", str(tmp_path))
    monkeypatch.setattr(torchvision_utils, "download_url", _refuse)
    write_split(tmp_path / "cifar100", "train", 4, 0)
    write_split(tmp_path / "cifar100", "test", 4, 0)
    assert len(load("cifar100", None).train) == 4


def test_the_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FAMBA_DATA", str(tmp_path))
    assert default_root() == tmp_path
    monkeypatch.delenv("FAMBA_DATA")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_root() == tmp_path / ".cache" / "famba" / "data"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digits", "come with scikit-learn"),
        ("folder", "yours to provide"),
        ("cifar1000", "only cifar10, cifar100, did you mean 'cifar100'"),
    ],
)
def test_what_has_no_download_says_why(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        download(name, tmp_path)


def test_classes_known_by_name() -> None:
    names = ["cifar100", "cifar10", "digits", "folder", "torch/cifar10"]
    assert [num_classes_of(name) for name in names] == [100, 10, 10, None, None]
    with pytest.raises(ConfigError, match="num_classes is 10, but cifar100 has 100"):
        load("cifar100", None, num_classes=10)


def name_classes(path: Path, label: str, names: list[str]) -> None:
    features = {label: {"names": names, "_type": "ClassLabel"}}
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}), path)


def test_classes_have_their_names_in_parquet_of_the_hub(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_split(tmp_path, split, 5, 1, image="img", label="label")
    assert load("cifar10", tmp_path).classes is None
    names = [f"class {number}" for number in range(10)]
    name_classes(tmp_path / "train-00000-of-00001.parquet", "label", names)
    assert load("cifar10", tmp_path).classes == tuple(names)
    name_classes(tmp_path / "test-00000-of-00001.parquet", "label", names[::-1])
    with pytest.raises(DataError, match="test-00000-of-00001.parquet: names 10 classes, which are not the 10"):
        load("cifar10", tmp_path)


def test_transparent_images_of_parquet_have_a_background(tmp_path: Path) -> None:
    clear = png(np.zeros((32, 32, 4), np.uint8))
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}-00000-of-00001.parquet", [clear], [0])
    for options, value in (({}, 255), ({"background": "#404040"}, 64), ({"version": 1}, 0)):
        train = in_memory(load("cifar100", tmp_path, **options).train)  # type: ignore[arg-type]
        assert train.images.unique().tolist() == [value]
