from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from images_and_loaders import load, red, write

from famba.data import LOADERS, ArraySource, Splits, labels_of, published, sample
from famba.errors import ConfigError, DataError


def numbered(labels: list[int], num_classes: int) -> ArraySource:
    """Images in memory whose red is their number."""
    images = torch.arange(len(labels), dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)
    return ArraySource(images, torch.tensor(labels), num_classes)


def counts(source: Any) -> list[int]:
    return np.bincount(labels_of(source), minlength=source.num_classes).tolist()


def test_digits_are_real_images_with_a_fixed_split() -> None:
    first, second = load("digits"), load("digits")
    assert first.classes == tuple("0123456789")
    seen: set[bytes] = set()
    for part, count in (("train", 1437), ("test", 360)):
        source, again = getattr(first, part), getattr(second, part)
        assert (source.images.shape, source.images.dtype) == ((count, 3, 32, 32), torch.uint8)
        assert (source.images.min(), source.images.max()) == (0, 255)
        assert torch.equal(source.images, again.images)
        found = {image.numpy().tobytes() for image in source.images}
        assert not found & seen
        seen |= found
    assert set(counts(first.test)) <= set(range(33, 40))  # about 36 of each digit


@pytest.fixture(params=["folder", "digits", "arrays"])
def uneven(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that loads a data set of each kind, with a class twice as large as the next."""
    kind = request.param
    labels = [number for number, size in enumerate((40, 20, 10, 10)) for _ in range(size)]
    if kind == "folder":
        for part in ("train", "val"):
            write(tmp_path / part, [f"{label}/{number}.png" for number, label in enumerate(labels)])
    source = numbered(labels, 4)
    monkeypatch.setitem(LOADERS, "arrays", lambda root, num_classes: Splits(source, None, source))
    return lambda **changes: load(kind, tmp_path if kind == "folder" else None, **changes)


def test_a_subset_and_what_is_held_out_have_every_class_in_proportion(uneven: Any) -> None:
    whole = np.array(counts(uneven().train))
    before: set[bytes] = set()
    for images in (8, 20, 40, 79):
        part = uneven(subset=images).train
        assert len(part) == images
        assert np.abs(counts(part) - whole * images / whole.sum()).max() <= 1
        chosen = {np.asarray(part.image(index)).tobytes() + bytes([part.labels[index]]) for index in range(images)}
        assert before <= chosen, "a smaller subset lies in a larger one"
        before = chosen
    assert uneven().validation is None
    splits = uneven(val_fraction=0.1)
    assert np.abs(counts(splits.validation) - whole * 0.1).max() <= 1
    assert (np.array(counts(splits.train)) + counts(splits.validation) == whole).all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("digits", {"subset": 1438}, "from 1 to the 1437"),
        ("digits", {"val_fraction": 1.0}, "val_fraction"),
        ("digits", {"background": "wite"}, "background 'wite' is no colour.*did you mean 'white'"),
        ("digits", {"background": "#11223344"}, "background '#11223344' is no colour; allowed: a name such as white"),
        ("digits", {"background": ""}, "background '' is no colour; allowed: a name such as white"),
        ("digits", {"background": "black", "version": 1}, "version 1 drops transparency"),
        ("digits", {"version": 3}, "version is 3; allowed: 2, or 1"),
        ("digits", {"root": Path("digits")}, "leave out data.root"),
        ("digit", {}, "did you mean 'digits'.*Known are cifar10, .*, folder,.* hfds/NAME"),
    ],
)
def test_names_and_options_that_do_not_exist_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(name, **options)


def test_arrays_of_another_kind_are_refused() -> None:
    with pytest.raises(DataError, match="images must be uint8"):
        ArraySource(torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64), 5)
    with pytest.raises(DataError, match="image 1: label 5"):
        ArraySource(torch.zeros(2, 3, 4, 4).byte(), torch.tensor([0, 5]), 5)


def test_a_sample_does_not_follow_the_order_of_the_images() -> None:
    in_turn = numbered([number % 10 for number in range(100)], 10)
    assert counts(sample(in_turn, 20, version=2)) == [2] * 10
    assert red(sample(in_turn, 20, version=1)) == list(range(0, 100, 5))


class Hub:
    """Stands for timm's reader of hfds/; three images in files."""

    label_key = "label"

    def __init__(self, folder: Path, classes: dict[str, int], labels: list[int]) -> None:
        self.folder, self.class_to_idx, self.dataset = folder, classes, {"label": labels}

    def __getitem__(self, index: int) -> Any:
        return open(self.folder / f"{index}.png", "rb"), self.dataset["label"][index]

    def filename(self, index: int, absolute: bool) -> str:
        return f"hub/{index}.png"


PETS = {"cat": 0, "dog": 1}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ""),
        ({"splits": ()}, "cannot be opened"),
        ({"test": {"dog": 0, "cat": 1}}, "cat, dog in training, and dog, cat in the test set"),
        ({"labels": [0, 1, 2]}, r"row 2 \(hub/2\.png\): label 2 is not in 0\.\.1"),
        ({"labels": ["ant", "bee"]}, "split train: labels in 'label' are <U3; allowed: numbers of classes"),
        ({"num_classes": 7}, "num_classes is 7, but 'hfds/somebody/pets' has 2"),
    ],
)
def test_a_data_set_of_the_hub_is_read_from_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, changes: Any, said: str
) -> None:
    write(tmp_path, ("0.png", "1.png", "2.png"))
    (tmp_path / "1.png").write_bytes(b"broken")

    def create(name: str, root: str, split: str, **options: Any) -> Any:
        if split not in changes.get("splits", ("train", "valid")):
            raise ValueError(f"no {split}")
        classes = PETS if split == "train" else changes.get("test", PETS)
        return SimpleNamespace(reader=Hub(tmp_path, classes, changes.get("labels", [0, 0, 0])))

    monkeypatch.setattr(published, "create_dataset", create)
    if said:
        with pytest.raises((ConfigError, DataError), match=said):
            load("hfds/somebody/pets", num_classes=changes.get("num_classes"))
        return
    splits = load("hfds/somebody/pets")
    assert "split 'valid' is the test set, since others cannot be opened: validation: no validation" in caplog.text
    train: Any = splits.train
    assert (splits.classes, len(train), train.image(2).getpixel((0, 0))) == (("cat", "dog"), 3, (2, 0, 0))
    with pytest.raises(DataError, match=r"split train, row 1 \(hub/1\.png\): not a readable image"):
        train.image(1)
