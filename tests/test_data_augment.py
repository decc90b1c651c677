from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from images_and_loaders import PLAIN, arrays, training
from PIL import Image
from torchvision.transforms import functional as vision

from famba.data import ArraySource, Augmentation
from famba.data.augment import Scaling
from famba.errors import ConfigError

TIMM = replace(PLAIN, kind="timm", interpolation="bilinear")
CROP = replace(PLAIN, crop_padding=3)


def augmented(source: ArraySource, augmentation: Augmentation, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One epoch as a single batch, in 0..255, and the images' numbers."""
    options: dict[str, Any] = {"image_size": size, "std": (1 / 255,) * 3, "batch_size": len(source)}
    ((images, labels),) = training(source, augmentation, **options).epoch(0)
    return images, labels


def test_pad_crop_cuts_each_image_out_of_the_padded_one_somewhere_else() -> None:
    data, steps = arrays(200, 7), range(7)
    found = []
    for image, label in zip(*augmented(data, CROP, 7), strict=True):
        padded = F.pad(data.images[label].float(), (3,) * 4)
        windows = {(y, x): padded[:, y : y + 7, x : x + 7] for y in steps for x in steps}
        places = [place for place, window in windows.items() if torch.allclose(image, window, atol=1e-2)]
        assert len(places) == 1
        found += places
    rows, columns = zip(*found, strict=True)
    assert set(rows) == set(columns) == set(steps)  # every offset occurs
    assert abs(np.corrcoef(rows, columns)[0, 1]) < 0.3


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_flips_follow_their_probability(probability: float) -> None:
    data = arrays(1000, 2)
    before = data.images.clone()
    images, labels = augmented(data, replace(PLAIN, hflip=probability), 2)
    same, flipped = (
        (images - given).abs().amax((1, 2, 3)) < 0.5
        for given in (data.images[labels].float(), data.images[labels].float().flip(-1))
    )
    assert bool((same | flipped).all())
    assert float(flipped.float().mean()) == pytest.approx(probability, abs=0.05)
    assert torch.equal(data.images, before), "the source stays as it was"


@pytest.mark.parametrize(("width", "height"), [(8, 60_000), (60_000, 8)])
def test_a_very_long_image_is_cut_before_it_is_scaled(monkeypatch: pytest.MonkeyPatch, width: int, height: int) -> None:
    made: list[int] = []
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, *rest: made.append(size) or resize(self, size, *rest))
    image = Image.effect_noise((width, height), 20).convert("RGB")
    scaling = Scaling(256, 224, "bicubic")
    found = scaling.image(image)
    assert [max(size) for size in made] == [8 * 256]  # unscaled 2 MB, where the whole would be 1.5 GB
    left, top = (width - 32) // 2, (height - 32) // 2
    middle = image.crop((max(left, 0), max(top, 0), min(left + 32, width), min(top + 32, height)))
    assert (found.int() - scaling.image(middle).int()).abs().max() <= 1
    pixels = vision.pil_to_tensor(image)[None]
    assert (scaling.batch(pixels)[0].int() - found).abs().max() <= 1


def test_of_images_that_are_not_square_the_centre_is_seen() -> None:
    wide = torch.zeros(8, 3, 8, 16, dtype=torch.uint8)
    wide[..., :4], wide[..., 12:] = 255, 255
    erasing = replace(CROP, random_erasing=1e-9)
    images, _ = augmented(ArraySource(wide, torch.zeros(8, dtype=torch.int64), 1), erasing, 8)
    assert all(len(columns.unique()) <= 2 for columns in images[:, 0, 4]), "no colour between black and white"


def test_each_option_of_timms_transform_acts() -> None:
    plain, options = augmented(arrays(16, 16), TIMM, 16)[0], {"hflip": 1.0, "auto_augment": "v0", "color_jitter": 0.4}
    for name, value in {**options, "random_erasing": 1.0, "interpolation": "bicubic"}.items():
        assert not torch.equal(plain, augmented(arrays(16, 16), replace(TIMM, **{name: value}), 16)[0]), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "btach"}, "kind is 'btach'. Input should be 'batch' or 'timm'"),
        ({"hflip": 1.5}, "hflip is 1.5. Input should be less than or equal to 1"),
        ({"auto_augment": "rand-q9"}, "auto_augment 'rand-q9' is no policy"),
        ({"auto_augment": "augmix-m5"}, "known are rand and v0, v0r, original, .* recipe.augmentation=timm"),
        ({"auto_augment": "rand-n16-tweights"}, "draws 16 of 15 operations"),
    ],
)
def test_values_out_of_range_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(CROP, **change)
