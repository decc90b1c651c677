from __future__ import annotations

import multiprocessing
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, call

import numpy as np
import pytest
import torch
from images_and_loaders import (
    BATCH,
    PLAIN,
    POLICY,
    TIMM,
    arrays,
    assert_same,
    evaluation,
    labels_in,
    load,
    saved,
    training,
    write,
)
from PIL import Image

from famba.data import ArraySource, Augmentation, Batch, Source, labels_of, loader
from famba.errors import ConfigError, DataError

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
BOTH = pytest.mark.parametrize("augmentation", [BATCH, TIMM, POLICY], ids=["batch", "timm", "policy"])
WORKERS = pytest.mark.parametrize("workers", [0, 2])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Images of several sizes."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for part in ("train", "val"):
        for number in range(18):
            pixels = generator.integers(0, 256, (10 + number % 9, 12, 3), dtype=np.uint8)
            write(root / part, [f"{number // 9}/{number}.png"], saved(Image.fromarray(pixels)))
    return load("folder", root).train  # type: ignore[return-value]


def join(batches: list[Batch]) -> Batch:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_an_epoch_shows_each_image_at_most_once_in_whole_steps() -> None:
    source, batches = arrays(26), training(arrays(26), PLAIN)
    assert batches.steps_per_epoch == 3
    epoch = list(batches.epoch(0))
    assert [tuple(images.shape) for images, _ in epoch] == [(8, 3, 8, 8)] * 3
    assert {(images.dtype, labels.dtype) for images, labels in epoch} == {(torch.float32, torch.int64)}
    assert len(set(labels_in(epoch))) == 24
    for images, labels in epoch:
        assert torch.allclose(images * 255, source.images[labels].float(), atol=1e-3)
    runs = [(training(source, PLAIN, batch_size=1, seed=seed), number) for seed, number in ((3, 0), (3, 1), (4, 0))]
    orders = [labels_in(one.epoch(number)) for one, number in runs]
    assert all(sorted(order) == list(range(26)) for order in orders)
    assert len(set(map(tuple, orders))) == 3, "each seed and epoch has an order of its own"


@BOTH
@WORKERS
@pytest.mark.parametrize("in_memory", [True, False])
def test_a_start_in_mid_epoch_gives_the_rest_of_the_epoch(
    folder: Source, augmentation: Augmentation, workers: int, in_memory: bool
) -> None:
    source = arrays(18) if in_memory else folder
    options: dict[str, Any] = {"batch_size": 4, "accumulation": 2, "image_size": 16}
    whole = list(training(source, augmentation, **options).epoch(1))
    assert [tuple(images.shape) for images, _ in whole] == [(2, 3, 16, 16)] * 8
    torch.manual_seed(99)  # what else draws, and what ran before, has no part in it
    np.random.seed(99)
    assert_same(training(source, augmentation, workers=workers, **options).epoch(1, 1), whole[2:])
    assert list(training(source, augmentation, workers=workers, **options).epoch(1, 4)) == []


@BOTH
@WORKERS
def test_two_processes_share_the_batch_of_one(folder: Source, augmentation: Augmentation, workers: int) -> None:
    for source in (arrays(18), folder):
        whole = list(training(source, augmentation).epoch(3))
        options: dict[str, Any] = {"accumulation": 2, "world_size": 2, "workers": workers}
        parts = [list(training(source, augmentation, rank=rank, **options).epoch(3)) for rank in range(2)]
        # Position is 8 * step + 4 * micro-batch + 2 * rank.
        joined = [
            join([parts[rank][2 * step + micro] for micro in (0, 1) for rank in (0, 1)]) for step in range(len(whole))
        ]
        assert_same(joined, whole)


@BOTH
def test_augmentation_of_a_sample_depends_on_its_place_epoch_and_seed_alone(augmentation: Augmentation) -> None:
    for size in (8, 11):
        large, small = (training(arrays(24), augmentation, batch_size=n, image_size=size) for n in (24, 3))
        assert_same(large.epoch(0), [join(list(small.epoch(0)))])
    one = ArraySource(arrays(1).images.expand(16, -1, -1, -1), torch.zeros(16, dtype=torch.int64), 1)
    first, *others = (
        next(training(one, augmentation, batch_size=16, seed=seed).epoch(epoch))[0]
        for seed, epoch in ((3, 0), (3, 1), (4, 0))
    )
    assert not any(torch.equal(first, other) for other in others)
    assert len({image.numpy().tobytes() for image in first}) > 8  # images differ within a batch


@WORKERS
def test_a_corrupt_image_ends_training_with_its_name(tmp_path: Path, workers: int) -> None:
    for part in ("train", "val"):
        write(tmp_path / part, [f"a/{number}.png" for number in range(4)])
    path = tmp_path / "train" / "a" / "2.png"
    path.write_bytes(b"broken")
    source: Any = load("folder", tmp_path).train
    for batches in (
        *(training(source, one, batch_size=2, workers=workers).epoch(0) for one in (BATCH, TIMM)),
        evaluation(source, workers=workers),
    ):
        with pytest.raises(DataError) as caught:
            list(batches)
        assert str(caught.value).startswith(f"{path}: not a readable image")
        assert "Traceback" not in str(caught.value)
        assert multiprocessing.active_children() == []


def test_workers_end_when_the_epoch_is_closed_and_draw_nothing_here() -> None:
    state = torch.get_rng_state()
    epoch = training(arrays(), TIMM, batch_size=2, workers=2).epoch(0)
    next(epoch)
    assert len(multiprocessing.active_children()) == 2
    epoch.close()
    assert multiprocessing.active_children() == []
    assert torch.equal(torch.get_rng_state(), state), "the training loop's generator is its own"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 27}, "does not fit into the 26 training images: at most 26"),
        ({"batch_size": 40, "accumulation": 4, "world_size": 2}, "at most 26, and a multiple of 8"),
        ({"batch_size": 10, "accumulation": 4}, "must be a multiple of 4"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"rank": 1}, "rank is 1"),
        ({"image_size": 0}, "image_size is 0"),
        ({"std": (1.0, 0.0, 1.0)}, "std above zero"),
    ],
)
def test_numbers_that_do_not_fit_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        training(arrays(26), **changes)
    if changes.keys() <= {"rank", "image_size", "std"} or changes == {"batch_size": 0}:
        with pytest.raises(ConfigError, match=message):
            evaluation(arrays(26), **changes)


def repeated(rank: int, **changes: Any) -> Any:
    options: dict[str, Any] = {"batch_size": 32, "rank": rank, "world_size": 2, "repeats": 3, "image_size": 4}
    return training(arrays(512, side=4), **{**options, **changes})


def test_repeated_augmentation_shows_images_several_times_across_processes_and_differently() -> None:
    assert repeated(0).steps_per_epoch == 16  # as many as without
    views: dict[int, list[bytes]] = {}
    for rank in range(2):
        for images, labels in repeated(rank).epoch(0):
            for image, label in zip(images, labels.tolist(), strict=True):
                views.setdefault(label, []).append(image.numpy().tobytes())
    assert len(views) == 171  # 512 places for three of each
    assert max(map(len, views.values())) == 3
    assert sum(len(set(found)) > 1 for found in views.values()) > len(views) * 0.8
    orders = [labels_in(batches.epoch(epoch)) for batches, epoch in ((repeated(0), 0), (repeated(0), 1))]
    assert len({tuple(order) for order in (*orders, labels_in(repeated(0, seed=4).epoch(0)))}) == 3
    assert_same(repeated(1).epoch(0, 5), list(repeated(1).epoch(0))[5:])
    assert_same(training(arrays(), repeats=3).epoch(0), training(arrays()).epoch(0))  # one process repeats nothing
    with pytest.raises(ConfigError, match="at most 256, and a multiple of 2"):
        training(arrays(300, side=2), batch_size=300, world_size=2, repeats=3)


@pytest.mark.parametrize("world_size", [1, 3])
@WORKERS
def test_evaluation_covers_each_image_once(folder: Source, world_size: int, workers: int) -> None:
    for source in (arrays(2), arrays(10), folder):  # of 2 images, a third process has none
        shares = [evaluation(source, rank=rank, world_size=world_size, workers=workers) for rank in range(world_size)]
        joined = [batch for share in shares for batch in share]
        assert_same([join(joined)], evaluation(source, batch_size=100))
        assert labels_in(joined) == labels_of(source).tolist()
        assert [len(share) for share in shares] == [len(list(share)) for share in shares]
        assert_same(shares[-1], shares[-1])


@BOTH
def test_images_finished_on_another_device_are_the_same(
    folder: Source, augmentation: Augmentation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This process finishes what workers read, as for a GPU; nothing is sent, so that a CPU can stand in for it."""
    monkeypatch.setattr(loader, "sent", lambda values, device: values)
    for source in (arrays(18), folder):
        for workers in (0, 2):
            options = {"workers": workers, "image_size": 11, "finish_on": torch.device("cuda")}
            here = training(source, augmentation, image_size=11)
            assert_same(training(source, augmentation, **options).epoch(1, 1), here.epoch(1, 1))
            assert_same(evaluation(source, augmentation, **options), evaluation(source, augmentation, image_size=11))


def test_a_batch_is_prepared_on_a_second_stream_before_the_one_before_it_is_handed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu, device = MagicMock(), torch.device("cuda")  # notes every call, in order
    gpu.second.record_event.side_effect = ["event 0", "event 1", "event 0", "event 1"]
    monkeypatch.setattr(loader, "_second_stream", lambda device: gpu.second)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: gpu.first)
    monkeypatch.setattr(torch.cuda, "stream", gpu.on)

    def prepared() -> Any:
        try:
            for number in range(2):
                gpu.prepare(number)
                yield (gpu.part,)
        finally:
            gpu.close()

    for (part,) in loader.ahead(prepared(), device):
        gpu.step(part)
    on, back = (call.on(gpu.second), call.on().__enter__()), call.on().__exit__(None, None, None)
    assert gpu.mock_calls == [
        call.second.wait_stream(gpu.first),
        *(*on, call.prepare(0), call.second.record_event(), back),
        *(*on, call.prepare(1), call.second.record_event(), back),
        *(call.first.wait_event("event 0"), call.part.record_stream(gpu.first), call.step(gpu.part)),
        *(*on, call.close(), back),
        *(call.first.wait_event("event 1"), call.part.record_stream(gpu.first), call.step(gpu.part)),
    ]
    batches = loader.ahead(prepared(), device)
    next(batches)
    batches.close()
    assert gpu.mock_calls[-1] == call.close(), "what prepares batches ends with who takes them"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize(
    "augmentation", [BATCH, POLICY, replace(POLICY, crop_padding=2)], ids=["0.1", "crop", "padding"]
)
def test_a_gpu_makes_the_pictures_of_a_cpu_and_nothing_waits_for_it(folder: Source, augmentation: Augmentation) -> None:
    device, source = torch.device("cuda"), arrays(26)
    there = ArraySource(source.images.to(device), source.labels.to(device), 26)
    for one, other in ((source, there), (source, source), (folder, folder)):
        expected = list(training(one, augmentation, image_size=11).epoch(1))
        batches = training(other, augmentation, image_size=11, device=device, finish_on=device)
        list(batches.epoch(0))  # the table of noise is sent once
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype feature")
            torch.cuda.set_sync_debug_mode("error")
        try:
            found = list(batches.epoch(1))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for (images, labels), (pictures, numbers) in zip(expected, found, strict=True):
            assert torch.equal(numbers.cpu(), labels)
            assert ((pictures.cpu() - images).abs() * 255).max() < 1.01
