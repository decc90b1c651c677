from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from famba.data import ArraySource, Augmentation, train_batches
from famba.data.draws import WORDS, Stream, permutation, words
from famba.errors import ConfigError

BATCH = Augmentation(
    kind="batch",
    crop_padding=3,
    hflip=0.0,
    auto_augment=None,
    color_jitter=0.0,
    random_erasing=0.0,
    erasing_mode="pixel",
    interpolation="bilinear",
    eval_crop=1.0,
)


def augmented(source: ArraySource, augmentation: Augmentation, **changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """One epoch as a single batch, in 0..255, and the images' numbers."""
    options: dict[str, Any] = {"image_size": source.images.shape[-1], "seed": 0, **changes}
    batches = train_batches(
        source,
        augmentation,
        mean=(0.0, 0.0, 0.0),
        std=(1 / 255, 1 / 255, 1 / 255),
        batch_size=len(source),
        accumulation=1,
        rank=0,
        world_size=1,
        workers=0,
        repeats=1,
        **options,
    )
    ((images, labels),) = batches.epoch(0)
    return images, labels


def source(count: int, height: int = 7, width: int = 7) -> ArraySource:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(1, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)
    return ArraySource(images, torch.arange(count), count)


def offsets(image: torch.Tensor, original: torch.Tensor, padding: int) -> list[tuple[int, int]]:
    """Where the image lies in the padded original."""
    padded = F.pad(original.float(), (padding,) * 4)
    side = original.shape[-1]
    steps = range(2 * padding + 1)
    return [
        (y, x) for y in steps for x in steps if torch.allclose(image, padded[:, y : y + side, x : x + side], atol=1e-2)
    ]


def test_pad_crop_cuts_each_image_out_of_the_padded_one_somewhere_else() -> None:
    data = source(200)
    images, labels = augmented(data, BATCH)
    found = [offsets(image, data.images[label], 3) for image, label in zip(images, labels, strict=True)]
    assert all(len(places) == 1 for places in found)
    rows, columns = zip(*(places[0] for places in found), strict=True)
    assert set(rows) == set(columns) == set(range(7))  # every offset occurs
    assert abs(np.corrcoef(rows, columns)[0, 1]) < 0.3


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_flip_at_the_ends_of_its_range(probability: float) -> None:
    data = source(40)
    images, labels = augmented(data, replace(BATCH, crop_padding=0, hflip=probability))
    expected = data.images[labels].float()
    assert torch.allclose(images, expected.flip(-1) if probability else expected, atol=1e-2)


def test_flip_in_between_follows_its_probability() -> None:
    data = source(1000, 2, 2)
    images, labels = augmented(data, replace(BATCH, crop_padding=0, hflip=0.3))
    flipped = (images - data.images[labels].float()).abs().amax((1, 2, 3)) > 0.5
    assert 0.25 < flipped.float().mean() < 0.35


def test_augmentation_leaves_the_source_as_it_was() -> None:
    data = source(20)
    before = data.images.clone()
    for padding in (0, 2):
        augmented(data, replace(BATCH, hflip=1.0, crop_padding=padding))
    assert torch.equal(data.images, before)


def test_bicubic_scaling_stays_in_range() -> None:
    data = ArraySource(torch.eye(8, dtype=torch.uint8).mul(255).expand(4, 3, 8, 8), torch.arange(4), 4)
    images, _ = augmented(data, replace(BATCH, interpolation="bicubic", crop_padding=0), image_size=20)
    assert images.shape == (4, 3, 20, 20)
    assert images.min() >= 0
    assert images.max() <= 255.01


def timm(**changes: Any) -> Augmentation:
    return replace(BATCH, **{"kind": "timm", "crop_padding": 0, **changes})


def test_each_option_of_timms_transform_acts() -> None:
    data = source(16, 16, 16)
    plain, _ = augmented(data, timm())
    for change in (
        {"hflip": 1.0},
        {"auto_augment": "rand-m9-mstd0.5-inc1"},
        {"color_jitter": 0.4},
        {"random_erasing": 1.0},
        {"random_erasing": 1.0, "erasing_mode": "const"},
        {"interpolation": "bicubic"},
    ):
        other, _ = augmented(data, timm(**change))
        assert not torch.equal(plain, other), change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "btach"}, "kind 'btach' is not one of batch, timm, did you mean 'batch'"),
        ({"erasing_mode": "noise"}, "erasing_mode 'noise' is not one of pixel, rand, const"),
        ({"interpolation": "cubic"}, "did you mean 'bicubic'"),
        ({"hflip": 1.5}, "hflip is 1.5"),
        ({"random_erasing": -0.1}, "random_erasing is -0.1"),
        ({"crop_padding": -1}, "crop_padding is -1"),
        ({"color_jitter": -1.0}, "color_jitter is -1.0"),
        ({"eval_crop": 0.0}, "eval_crop is 0.0"),
        ({"random_erasing": 0.5}, "augmentation 'batch' does not use it: set it to 0"),
        ({"kind": "timm"}, "crop_padding is 3, but augmentation 'timm' does not use it"),
        ({"kind": "timm", "crop_padding": 0, "auto_augment": "rnad-m9"}, "auto_augment 'rnad-m9' is no policy"),
        ({"kind": "timm", "crop_padding": 0, "auto_augment": "rand-q9"}, "auto_augment 'rand-q9' is no policy"),
    ],
)
def test_values_out_of_range_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(BATCH, **change)


@given(start=st.integers(0, 2**40), count=st.integers(1, 50), cut=st.integers(0, 50))
@settings(deadline=None)
def test_draws_belong_to_positions(start: int, count: int, cut: int) -> None:
    cut = min(cut, count)
    whole = words(Stream.AUGMENTATION, (5,), 1, start, count)
    assert whole.shape == (count, WORDS)
    parts = [
        words(Stream.AUGMENTATION, (5,), 1, start, cut),
        words(Stream.AUGMENTATION, (5,), 1, start + cut, count - cut),
    ]
    assert np.array_equal(whole, np.concatenate(parts))


def test_streams_seeds_and_epochs_draw_differently() -> None:
    drawn = [
        words(stream, key, epoch, 0, 8).tobytes()
        for stream in (Stream.AUGMENTATION, Stream.STREAMED_AUGMENTATION)
        for key in ((0,), (1,), (1, 0), (0, 1), (2**32,))
        for epoch in (0, 1)
    ]
    assert len(set(drawn)) == len(drawn)
    orders = [tuple(permutation(stream, 0, 0, 50)) for stream in (Stream.ORDER, Stream.SPLIT)]
    assert orders[0] != orders[1]
