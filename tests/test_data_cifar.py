from __future__ import annotations

import hashlib
import multiprocessing
import pickle
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from images_and_loaders import load, saved
from PIL import Image
from runs import Hostile
from torchvision.datasets import CIFAR100
from torchvision.datasets import utils as torchvision_utils

from famba.data import download
from famba.errors import ConfigError, DataError

NAMES = [f"class {number}" for number in range(100)]
COLUMNS = ("img", "fine_label")


def pixels(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def write_parquet(
    path: Path, columns: tuple[str, str] = COLUMNS, seed: int = 1, labels: Sequence[int] = range(5)
) -> None:
    """Write random images with these labels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": saved(Image.fromarray(image)), "path": "x.png"} for image in pixels(len(labels), seed)]
    pq.write_table(pa.table({columns[0]: images, columns[1]: list(labels)}), path)


def write_splits(folder: Path, columns: tuple[str, str] = COLUMNS, parts: tuple[str, ...] = ("train", "test")) -> None:
    for part in parts:
        write_parquet(folder / f"{part}-00000-of-00001.parquet", columns)


def write_pickle(path: Path, entry: dict[str, Any]) -> list[str]:
    """Write one official file and return [name, MD5]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(entry, protocol=2))
    return [path.name, hashlib.md5(path.read_bytes()).hexdigest()]


def batch(images: np.ndarray, labels: list[int], key: str) -> dict[str, Any]:
    return {"data": images.transpose(0, 3, 1, 2).reshape(len(images), -1), key: labels}


@pytest.fixture
def official(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a small CIFAR-100 in the official form, with `pixels(6, 1)` as training images."""
    folder = tmp_path / "source" / "cifar-100-python"
    train = write_pickle(folder / "train", batch(pixels(6, 1), [0, 1, 2, 3, 98, 99], "fine_labels"))
    test = write_pickle(folder / "test", batch(pixels(3, 2), [5, 6, 7], "fine_labels"))
    name, digest = write_pickle(folder / "meta", {"fine_label_names": NAMES})
    monkeypatch.setattr(CIFAR100, "train_list", [train])
    monkeypatch.setattr(CIFAR100, "test_list", [test])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "filename": name, "md5": digest})
    return folder


def test_official_files_load_from_the_folder_or_the_one_above(official: Path) -> None:
    for root in (official, official.parent):
        splits: Any = load("cifar100", root)
        assert np.array_equal(splits.train.images.permute(0, 2, 3, 1), pixels(6, 1))
        assert splits.train.labels.tolist() == [0, 1, 2, 3, 98, 99]
        assert (splits.test.num_classes, len(splits.test), splits.classes) == (100, 3, tuple(NAMES))
    with pytest.raises(ConfigError, match="num_classes is 10, but cifar100 has 100"):
        load("cifar100", official, num_classes=10)
    (official / "test").unlink()
    with pytest.raises(DataError, match=r"no official files \(not in the first: test\) nor .* in .*cifar-100-python"):
        load("cifar100", official.parent)


@pytest.mark.parametrize("name", ["test", "meta"])
def test_a_file_that_was_not_published_is_named_and_its_code_does_not_run(
    tmp_path: Path, official: Path, name: str
) -> None:
    write_pickle(official / name, {"data": Hostile(tmp_path / "ran")})
    with pytest.raises(DataError, match=f"cifar-100-python: {name}: damaged or not the published file"):
        load("cifar100", official)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "below", "columns"),
    [("cifar100", "", COLUMNS), ("cifar100", "cifar100", COLUMNS), ("cifar10", "plain_text", ("image", "label"))],
)
def test_parquet_is_found_and_decoded(tmp_path: Path, name: str, below: str, columns: tuple[str, str]) -> None:
    write_splits(tmp_path / below, columns)
    splits: Any = load(name, tmp_path)
    assert splits.train.labels.tolist() == list(range(5))
    assert np.array_equal(splits.train.images.permute(0, 2, 3, 1), pixels(5, 1))
    assert (len(splits.test), splits.validation) == (5, None)


def test_parquet_shards_are_joined_in_order_and_must_be_complete(tmp_path: Path) -> None:
    write_splits(tmp_path, parts=("test",))
    for shard in (1, 0):
        path = tmp_path / f"train-{shard:05}-of-00002.parquet"
        write_parquet(path, seed=shard, labels=[10 * shard, 10 * shard + 1])
    train: Any = load("cifar100", tmp_path).train
    assert train.labels.tolist() == [0, 1, 10, 11]
    (tmp_path / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(DataError, match="is one of 2 files, but 1 lie there"):
        load("cifar100", tmp_path)


def test_parquet_without_the_column_or_the_other_split_is_refused(tmp_path: Path) -> None:
    write_splits(tmp_path, ("img", "something"), ("train",))
    with pytest.raises(DataError, match="nor train-.* To fetch cifar100: famba download"):
        load("cifar100", tmp_path)
    write_splits(tmp_path, parts=("test",))
    with pytest.raises(DataError, match=r"images \(img or image\) or labels \(fine_label\) among img, something"):
        load("cifar100", tmp_path)


def test_where_no_data_is_it_says_what_to_do_and_downloads_into_its_own_folder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse = Mock(side_effect=OSError("Network is unreachable"))
    monkeypatch.setattr(torchvision_utils, "download_url", refuse)
    for root in (tmp_path, tmp_path / "absent"):
        with pytest.raises(DataError, match=f"famba download cifar100 --root {root}") as caught:
            load("cifar100", root)
        assert all(str(root / folder) in str(caught.value) for folder in ("cifar-100-python", "data", "cifar100"))
    refuse.assert_not_called()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("FAMBA_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"Network is unreachable.*famba download cifar100 .*data\.root"):
        load("cifar100", None)
    write_splits(tmp_path / "cifar100")
    assert len(load("cifar100", None).train) == 5


@pytest.fixture
def counted_download(tmp_path: Path, official: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A download that unpacks a local archive; each call adds a line to the file that is returned."""
    archive, calls = tmp_path / "archive.tar.gz", tmp_path / "calls"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(official, "cifar-100-python")

    def fake(url: str, root: str, filename: str, **_: Any) -> None:
        with calls.open("a") as file:
            file.write(f"{url}\n")
        shutil.copy(archive, Path(root) / filename)

    monkeypatch.setattr(torchvision_utils, "download_url", fake)
    monkeypatch.setenv("FAMBA_DATA", str(tmp_path / "cache"))
    return calls


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_processes_that_need_the_same_data_download_it_once(counted_download: Path) -> None:
    context = multiprocessing.get_context("fork")  # the children must inherit the replaced download
    start, answers = context.Barrier(3), context.Queue()

    def load_and_report() -> None:
        start.wait()
        answers.put(len(load("cifar100", None).train))

    children = [context.Process(target=load_and_report) for _ in range(3)]
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
    with pytest.raises(ConfigError, match="only cifar10 and cifar100, did you mean 'cifar100'.* yours to provide"):
        download("cifar1000", tmp_path)
