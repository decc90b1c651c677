from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from famba.data import ArraySource, Augmentation, Batch, Source, eval_batches, load_splits, train_batches
from famba.errors import ConfigError, DataError

BATCH = Augmentation(
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
TIMM = replace(
    BATCH,
    kind="timm",
    crop_padding=0,
    auto_augment="rand-m9-mstd0.5-inc1",
    color_jitter=0.3,
    random_erasing=0.5,
)
PLAIN = replace(BATCH, crop_padding=0, hflip=0.0)
IDENTITY: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


def arrays(count: int = 26, side: int = 8) -> ArraySource:
    """Random images; the label of each is its number."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
    return ArraySource(images, torch.arange(count), count)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Image folders with images of several sizes; the red of each corner is its number in the class."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("a", "b"):
            (root / part / name).mkdir(parents=True)
            for i in range(9):
                pixels = generator.integers(0, 256, (10 + i, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


def folder_source(root: Path) -> Source:
    train = load_splits("folder", root, subset=None, val_fraction=0.0, num_classes=None).train
    assert isinstance(train, Source)
    return train


def training(source: Any, augmentation: Augmentation = BATCH, **changes: Any) -> Any:
    options: dict[str, Any] = {
        "image_size": 8,
        **IDENTITY,
        "seed": 3,
        "batch_size": 8,
        "accumulation": 1,
        "rank": 0,
        "world_size": 1,
        "workers": 0,
        "repeats": 1,
    }
    return train_batches(source, augmentation, **{**options, **changes})


def evaluation(source: Any, augmentation: Augmentation = PLAIN, **changes: Any) -> Any:
    options: dict[str, Any] = {
        "image_size": 8,
        **IDENTITY,
        "batch_size": 4,
        "rank": 0,
        "world_size": 1,
        "workers": 0,
    }
    return eval_batches(source, augmentation, **{**options, **changes})


def labels_of(batches: Iterable[Batch]) -> list[int]:
    return [int(label) for _, labels in batches for label in labels]


def join(batches: list[Batch]) -> Batch:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def assert_same(one: Iterable[Batch], other: Iterable[Batch]) -> None:
    one, other = list(one), list(other)
    assert len(one) == len(other) > 0
    for (images, labels), (other_images, other_labels) in zip(one, other, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


def test_an_epoch_shows_each_image_at_most_once_in_whole_steps() -> None:
    batches = training(arrays(26))
    assert batches.steps_per_epoch == 3
    epoch = list(batches.epoch(0))
    assert [(image.shape, image.dtype, label.dtype) for image, label in epoch] == [
        (torch.Size([8, 3, 8, 8]), torch.float32, torch.int64)
    ] * 3
    assert len(set(labels_of(epoch))) == 24


@given(count=st.integers(1, 60), seed=st.integers(0, 2**40))
@settings(max_examples=30, deadline=None)
def test_the_order_is_a_permutation(count: int, seed: int) -> None:
    batches = training(arrays(count, side=2), PLAIN, batch_size=1, seed=seed, image_size=2)
    assert sorted(labels_of(batches.epoch(0))) == list(range(count))


def test_the_order_differs_by_epoch_and_seed_and_not_otherwise() -> None:
    first, same, other = training(arrays()), training(arrays()), training(arrays(), seed=4)
    assert labels_of(first.epoch(1)) == labels_of(same.epoch(1))
    assert labels_of(first.epoch(0)) != labels_of(first.epoch(1))
    assert labels_of(first.epoch(0)) != labels_of(other.epoch(0))
    assert labels_of(training(arrays(), seed=1).epoch(0)) != labels_of(training(arrays(), seed=0).epoch(1))


def test_images_and_labels_stay_together() -> None:
    source = arrays()
    for images, labels in training(source, PLAIN).epoch(2):
        assert torch.allclose(images * 255, source.images[labels].float(), atol=1e-3)


@pytest.mark.parametrize("augmentation", [BATCH, TIMM], ids=["batch", "timm"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("in_memory", [True, False])
def test_a_start_in_mid_epoch_gives_the_rest_of_the_epoch(
    folder: Path, augmentation: Augmentation, workers: int, in_memory: bool
) -> None:
    source = arrays(18) if in_memory else folder_source(folder)
    options: dict[str, Any] = {"batch_size": 4, "accumulation": 2}
    whole = list(training(source, augmentation, **options).epoch(1))
    assert len(whole) == 8
    torch.manual_seed(99)  # what else draws, and what ran before, has no part in it
    np.random.seed(99)
    assert_same(training(source, augmentation, workers=workers, **options).epoch(1, 1), whole[2:])
    assert list(training(source, augmentation, workers=workers, **options).epoch(1, 4)) == []


@pytest.mark.parametrize("augmentation", [BATCH, TIMM], ids=["batch", "timm"])
@pytest.mark.parametrize("workers", [0, 2])
def test_two_processes_share_the_batch_of_one(folder: Path, augmentation: Augmentation, workers: int) -> None:
    for source in (arrays(18), folder_source(folder)):
        whole = list(training(source, augmentation, batch_size=8).epoch(3))
        parts = [
            list(
                training(
                    source,
                    augmentation,
                    batch_size=8,
                    accumulation=2,
                    rank=rank,
                    world_size=2,
                    workers=workers,
                ).epoch(3)
            )
            for rank in range(2)
        ]
        # Position is 8 * step + 4 * micro-batch + 2 * rank.
        joined = [
            join([parts[rank][2 * step + micro] for micro in (0, 1) for rank in (0, 1)]) for step in range(len(whole))
        ]
        assert_same(joined, whole)


def test_augmentation_of_a_sample_does_not_depend_on_its_batch() -> None:
    for augmentation in (BATCH, TIMM):
        for size in (8, 11):
            large, small = (
                training(arrays(24), augmentation, batch_size=batch_size, image_size=size) for batch_size in (24, 3)
            )
            assert_same(large.epoch(0), [join(list(small.epoch(0)))])


def test_augmentation_differs_by_epoch_and_seed() -> None:
    one = ArraySource(arrays(1).images.expand(16, -1, -1, -1), torch.zeros(16, dtype=torch.int64), 1)
    for augmentation in (BATCH, TIMM):
        images = [
            next(training(one, augmentation, batch_size=16, seed=seed).epoch(epoch))[0]
            for seed, epoch in ((3, 0), (3, 1), (4, 0))
        ]
        assert not torch.equal(images[0], images[1])
        assert not torch.equal(images[0], images[2])
        assert len({image.numpy().tobytes() for image in images[0]}) > 8  # images differ within a batch


def test_images_of_other_sizes_are_scaled(folder: Path) -> None:
    source = folder_source(folder)
    for augmentation in (BATCH, TIMM):
        for images, _ in training(source, augmentation, image_size=16).epoch(0):
            assert images.shape == (8, 3, 16, 16)


def test_loading_leaves_the_training_loops_generator_alone_in_workers() -> None:
    state = torch.get_rng_state()
    list(training(arrays(), TIMM, workers=2).epoch(0))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_image_ends_training_with_its_name(tmp_path: Path, workers: int) -> None:
    for part in ("train", "val"):
        (tmp_path / part / "a").mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (8, 8)).save(tmp_path / part / "a" / f"{i}.jpg")
    (tmp_path / "train" / "a" / "2.jpg").write_bytes(b"broken")
    source = folder_source(tmp_path)
    for augmentation in (BATCH, TIMM):
        with pytest.raises(DataError) as caught:
            list(training(source, augmentation, batch_size=2, workers=workers).epoch(0))
        path = tmp_path / "train" / "a" / "2.jpg"
        assert str(caught.value).startswith(f"{path}: not a readable image")
        assert "Traceback" not in str(caught.value)
        assert multiprocessing.active_children() == []
    with pytest.raises(DataError, match=r"2\.jpg"):
        list(evaluation(source, workers=workers))


def test_batches_can_be_sent_to_workers_that_are_not_forked(folder: Path) -> None:
    for source in (arrays(18), folder_source(folder)):
        for augmentation in (BATCH, TIMM):
            batches = training(source, augmentation)
            assert_same(pickle.loads(pickle.dumps(batches)).epoch(0), batches.epoch(0))


def test_workers_end_when_the_epoch_is_closed() -> None:
    epoch = training(arrays(), TIMM, batch_size=2, workers=2).epoch(0)
    next(epoch)
    assert len(multiprocessing.active_children()) == 2
    epoch.close()
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 27}, "does not fit into the 26 training images: at most 26"),
        ({"batch_size": 40, "accumulation": 4, "world_size": 2}, "at most 24"),
        ({"batch_size": 10, "accumulation": 4}, "not divisible by .* 8 or 12 would be"),
        ({"batch_size": 1, "world_size": 2}, "not divisible by .* 2 would be"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"accumulation": 0}, "accumulation is 0"),
        ({"repeats": 0}, "repeats is 0"),
        ({"rank": 1}, "rank is 1"),
        ({"workers": -1}, "workers is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"image_size": 0}, "image_size is 0"),
        ({"std": (1.0, 0.0, 1.0)}, "std above zero"),
    ],
)
def test_numbers_that_do_not_fit_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        training(arrays(26), **changes)


def test_there_is_no_step_outside_the_epoch() -> None:
    for epoch, step in ((0, 4), (0, -1), (-1, 0)):
        with pytest.raises(ConfigError, match=f"no step {step} in epoch {epoch}: .* 3 steps"):
            training(arrays(26)).epoch(epoch, step)


def repeated(rank: int, **changes: Any) -> Any:
    options: dict[str, Any] = {"batch_size": 32, "rank": rank, "world_size": 2, "repeats": 3, "image_size": 4}
    return training(arrays(512, side=4), **{**options, **changes})


def test_repeated_augmentation_shows_images_several_times_across_processes() -> None:
    batches = [repeated(rank) for rank in range(2)]
    assert batches[0].steps_per_epoch == 16  # as many as without
    shown = np.bincount([label for b in batches for label in labels_of(b.epoch(0))], minlength=512)
    assert shown.max() == 3
    assert np.count_nonzero(shown) == 171  # 512 places for three of each
    assert labels_of(repeated(0).epoch(0)) != labels_of(repeated(0).epoch(1))
    assert labels_of(repeated(0).epoch(0)) != labels_of(repeated(0, seed=4).epoch(0))


def test_repeats_of_an_image_are_augmented_differently() -> None:
    found: dict[int, list[bytes]] = {}
    for rank in range(2):
        for images, labels in repeated(rank).epoch(0):
            for image, label in zip(images, labels.tolist(), strict=True):
                found.setdefault(label, []).append(image.numpy().tobytes())
    assert sum(len(set(views)) > 1 for views in found.values()) > len(found) * 0.8


def test_repeated_augmentation_resumes_in_mid_epoch_and_rests_in_one_process() -> None:
    assert_same(repeated(1).epoch(0, 5), list(repeated(1).epoch(0))[5:])
    assert_same(training(arrays(), repeats=3).epoch(0), training(arrays(), repeats=1).epoch(0))


def test_repeated_augmentation_names_a_batch_size_that_fits() -> None:
    with pytest.raises(ConfigError, match="at most 256"):
        training(arrays(300, side=2), batch_size=300, world_size=2, repeats=3)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_covers_each_image_once(folder: Path, world_size: int, workers: int) -> None:
    for source in (arrays(10), folder_source(folder)):
        shares = [
            list(evaluation(source, rank=rank, world_size=world_size, workers=workers)) for rank in range(world_size)
        ]
        joined = [batch for share in shares for batch in share]
        assert_same(
            [join(joined)],
            evaluation(source, batch_size=100),
        )
        assert labels_of(joined) == [source.label(i) for i in range(len(source))]


def test_a_process_may_have_nothing_to_evaluate() -> None:
    shares = [list(evaluation(arrays(2), rank=rank, world_size=3)) for rank in range(3)]
    assert sorted(labels_of(batch for share in shares for batch in share)) == [0, 1]
    assert [] in shares


def test_evaluation_can_be_repeated() -> None:
    batches = evaluation(arrays())
    assert len(batches) == 7
    assert_same(batches, batches)


def test_evaluation_leaves_images_of_the_right_size_alone() -> None:
    source = arrays()
    options: dict[str, Any] = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
    ((images, _),) = evaluation(source, batch_size=26, **options)
    mean, std = (torch.tensor(options[name]).view(3, 1, 1) for name in ("mean", "std"))
    assert torch.allclose(images, (source.images / 255 - mean) / std, atol=1e-5)


@pytest.mark.parametrize(("size", "crop", "side"), [(8, 1.0, 8), (14, 0.875, 16), (9, 0.9, 10)])
def test_evaluation_scales_and_crops_the_centre(size: int, crop: float, side: int) -> None:
    noise = arrays(3, side=12)
    # Little contrast: Pillow cuts what overshoots also between its two passes.
    source = ArraySource(noise.images // 4 + 96, noise.labels, 3)
    augmentation = replace(PLAIN, eval_crop=crop)
    ((images, _),) = evaluation(source, augmentation, image_size=size)
    scaled = source.image(1).resize((side, side), Image.Resampling.BICUBIC)
    first = round((side - size) / 2)
    expected = np.asarray(scaled)[first : first + size, first : first + size].transpose(2, 0, 1)
    assert np.abs(images[1].numpy() * 255 - expected).max() < 1.5  # Pillow rounds twice on the way


def test_evaluation_keeps_the_shape_of_what_it_scales(folder: Path) -> None:
    source = folder_source(folder)
    ((images, _),) = evaluation(source, replace(PLAIN, interpolation="bilinear"), batch_size=18, image_size=6)
    tall = source.image(8)  # 12 wide, 18 high
    expected = np.asarray(tall.resize((6, 9), Image.Resampling.BILINEAR))[2:8].transpose(2, 0, 1)
    assert np.abs(images[8].numpy() * 255 - expected).max() < 1.5


def test_evaluation_numbers_that_do_not_fit_are_named() -> None:
    for name, value in (("batch_size", 0), ("rank", 3), ("workers", -2), ("image_size", -1)):
        changes: dict[str, Any] = {name: value}
        with pytest.raises(ConfigError, match=name):
            evaluation(arrays(), **changes)
