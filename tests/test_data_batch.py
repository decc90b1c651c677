"""The batched augmentation makes the pictures of Pillow and timm, and draws as timm does."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from images_and_loaders import BATCH, PLAIN, POLICY, training
from PIL import Image
from scipy import stats
from sklearn.datasets import load_sample_images
from timm.data import Mixup, create_transform
from timm.data.auto_augment import AugmentOp, auto_augment_transform, rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as vision

from famba.data import ArraySource, Augmentation
from famba.data.augment import BatchAugmentation, Normalize, evaluation_transform, training_transform
from famba.data.batch_operations import Geometry, change
from famba.data.batch_policy import BY_NAME, DRAWS, Policy, jitter
from famba.data.batch_resample import BOX_DRAWS, crop, random_boxes
from famba.data.sources import LazySource
from famba.ops.native import pictures
from famba.ops.native.library import obstacle

FILL = (10, 128, 200)
PAPER = replace(POLICY, color_jitter=0.3, random_erasing=0.25, eval_crop=0.875)
CROP_ONLY = replace(PAPER, auto_augment=None, color_jitter=0.0, random_erasing=0.0)


def photos(count: int, high: int, wide: int) -> list[Image.Image]:
    """Crops of photographs, scaled by at most half, and pictures that are extreme: noise, few colours, one colour."""
    rng, given = np.random.default_rng(0), [Image.fromarray(photo) for photo in load_sample_images().images]
    found = []
    for number in range(count - 3):
        photo, scale = given[number % 2], rng.uniform(1, 2)
        left, top = (rng.integers(0, side - scale * part) for side, part in zip(photo.size, (wide, high), strict=True))
        found.append(photo.resize((wide, high), box=(left, top, left + wide * scale, top + high * scale)))
    noise = rng.integers(0, 256, (high, wide, 3))
    return [*found, *(Image.fromarray(x.astype(np.uint8)) for x in (noise, noise // 60 * 9 + 70, noise * 0 + 77))]


def tensor_of(images: list[Image.Image]) -> Tensor:
    return torch.stack([vision.pil_to_tensor(image) for image in images])


def uniform(*shape: int) -> Any:
    return np.random.default_rng(1).random(shape)


def augmentation(options: Augmentation = PAPER, size: int = 48, **changes: Any) -> BatchAugmentation:
    return BatchAugmentation(options, size, (0.5, 0.25, 0.75), (0.25, 0.5, 0.2), 7, **changes)


@pytest.fixture(params=["compiled", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run by the compiled kernels, and by torch, as on other devices."""
    if request.param == "compiled" and not pictures.usable(torch.device("cpu"), torch.float32):
        pytest.skip(f"the kernels for CPUs cannot be used: {obstacle()}")
    if request.param == "torch":
        monkeypatch.setattr(pictures, "usable", lambda device, dtype: False)


def assert_same_distribution(one: Any, other: Any) -> None:
    assert stats.ks_2samp(one, other).pvalue > 0.001


@pytest.mark.parametrize(("high", "wide", "size"), [(32, 32, 80), (40, 61, 33), (32, 32, 32), (150, 120, 20)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_crops_are_those_of_pillow(way: None, high: int, wide: int, size: int, interpolation: str) -> None:
    images, mode = photos(200 if size == 80 else 30, high, wide), InterpolationMode(interpolation)
    boxes, flips = random_boxes(uniform(len(images), BOX_DRAWS), high, wide), uniform(len(images)) < 0.5
    found = crop(tensor_of(images), torch.from_numpy(boxes), torch.from_numpy(flips), size, interpolation)
    wanted = [
        vision.resized_crop(image, *map(int, box), [size, size], mode) for image, box in zip(images, boxes, strict=True)
    ]
    flipped = [vision.hflip(image) if flip else image for image, flip in zip(wanted, flips, strict=True)]
    assert (found.int() - tensor_of(flipped)).abs().max() <= 1
    side = int(size / 0.875)
    central = [vision.center_crop(vision.resize(image, side, mode), [size, size]) for image in images]
    as_they_are = Normalize((0.0,) * 3, (1 / 255,) * 3)
    whole = evaluation_transform(replace(PAPER, interpolation=interpolation), size, as_they_are).whole
    assert whole is not None
    assert (whole(tensor_of(images), 0, 0) - tensor_of(central)).abs().max() < 1.01


@pytest.mark.parametrize("magnitude", [0, 3, 9.7])
@pytest.mark.parametrize("name", BY_NAME)
def test_operations_are_those_of_timm(way: None, name: str, magnitude: float) -> None:
    images = photos(200 // 3, 48, 48)
    one = Policy((name,), np.ones(1), np.array([magnitude]), 0.0, 10.0, 1, None, False)
    seeds = [random.Random(number).random() for number in range(len(images))]
    numbers = np.stack([np.zeros((len(images), DRAWS - 1)).T[0]] * (DRAWS - 1) + [np.array(seeds)], axis=1)[:, None]
    for interpolation in ("bicubic", "bilinear") if "shift" in BY_NAME[name][0] or name == "Rotate" else ("bicubic",):
        found = tensor_of(images)
        (step,) = one.draw(numbers, 48)
        assert step.rows.tolist() == list(range(len(images)))
        change(found, step, Geometry(FILL, interpolation), torch.float32)
        settings = {"img_mean": FILL, "interpolation": Image.Resampling[interpolation.upper()]}
        operation = AugmentOp(name, prob=1, magnitude=magnitude, hparams=settings)
        wanted = []
        for number, image in enumerate(images):
            random.seed(number)
            wanted.append(operation(image))
        away = (found.int() - tensor_of(wanted)).abs()
        assert away.max() <= (0 if name in ("Equalize", "AutoContrast") else 1)


@pytest.mark.parametrize(
    "text", ["rand-m9-mstd0.5-inc1", "rand-n3-m7-mstd101-p0.7", "rand-n3-tweights-mstd2", "v0", "3a"]
)
def test_policies_draw_as_those_of_timm(text: str) -> None:
    policy = Policy.of(text)
    chosen, acts, magnitude = policy.choose(uniform(100_000, policy.layers, DRAWS))
    transform: Any = rand_augment_transform(text, {}) if text[:4] == "rand" else auto_augment_transform(text, {})
    if "tweights" in text:
        assert all(len(set(row)) == 3 for row in chosen.tolist()), "each comes once in an image"
    groups = getattr(transform, "policy", None) or [transform.ops]
    drawn: list[tuple[str, float]] = []
    for operation in (operation for group in groups for operation in group):
        operation.level_fn = lambda level, _, name=operation.name: drawn.append((name, level)) or ()
        operation.aug_fn = lambda image, **_: image
    random.seed(0)
    np.random.seed(0)
    for _ in range(20_000):
        transform(None)
    names = sorted(set(policy.names))
    ours = np.array(policy.names)[chosen][acts]
    theirs = np.array([name for name, _ in drawn])
    counts = np.array([[np.sum(one == name) for name in names] for one in (ours, theirs)], dtype=np.float64)
    idle = [100_000 * policy.layers - counts[0].sum(), 20_000 * policy.layers - counts[1].sum()]
    table = np.column_stack([counts, idle])
    assert stats.chi2_contingency(table[:, table.sum(0) > 0]).pvalue > 0.001
    for name in names:
        levels = [level for one, level in drawn if one == name]
        assert_same_distribution(magnitude[acts & (np.array(policy.names)[chosen] == name)], levels)


@pytest.mark.parametrize(("high", "wide"), [(64, 64), (30, 90)])
def test_boxes_of_random_crops_are_distributed_as_those_of_timm(high: int, wide: int) -> None:
    boxes = random_boxes(uniform(100_000, BOX_DRAWS), high, wide)
    random.seed(0)
    image = Image.new("RGB", (wide, high))
    draw = RandomResizedCropAndInterpolation.get_params
    theirs = np.array([draw(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(20_000)])
    for column in range(4):
        assert_same_distribution(boxes[:, column], theirs[:, column])
    assert_same_distribution(boxes[:, 2] * boxes[:, 3], theirs[:, 2] * theirs[:, 3])


def test_erased_boxes_are_distributed_as_those_of_timm() -> None:
    drawn = augmentation(replace(PAPER, random_erasing=0.4)).draw(0, 0, 100_000, 8, 8).erasing
    assert drawn is not None
    assert stats.binomtest(len(drawn.rows), 100_000, 0.4).pvalue > 0.001
    random.seed(0)
    erase, theirs = RandomErasing(1.0, mode="const", device="cpu"), []
    for _ in range(5_000):
        rows, columns = np.nonzero(erase(torch.ones(1, 48, 48))[0].numpy() == 0)
        theirs.append([rows.min(), columns.min(), np.ptp(rows) + 1, np.ptp(columns) + 1])
    for ours, other in zip(drawn.boxes.numpy().T, np.array(theirs).T, strict=True):
        assert_same_distribution(ours, other)


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_erasing_fills_the_box_alone(mode: Any) -> None:
    plain, images = augmentation(CROP_ONLY), tensor_of(photos(16, 32, 32)).clone()
    erasing = augmentation(replace(CROP_ONLY, random_erasing=1.0, erasing_mode=mode))
    drawn = erasing.draw(3, 5, 16, 32, 32).erasing
    assert drawn is not None
    found, before = erasing(images, 3, 5), plain(images, 3, 5)
    filled = []
    for image, old, (top, left, high, wide) in zip(found, before, drawn.boxes.tolist(), strict=True):
        inside = torch.zeros(48, 48, dtype=torch.bool)
        inside[top : top + high, left : left + wide] = True
        assert torch.equal(image[:, ~inside], old[:, ~inside])
        filled.append(image[:, inside])
    if mode == "const":
        assert all(bool((part == 0).all()) for part in filled)
    elif mode == "rand":
        assert all(bool((part == part[:, :1]).all()) for part in filled)
    else:
        assert stats.kstest(torch.cat([part.flatten() for part in filled]).numpy(), "norm").pvalue > 0.001
    assert len({float(part[0, 0]) for part in filled}) == (1 if mode == "const" else 16)


def test_jitter_is_that_of_torchvision() -> None:
    images, numbers = photos(60, 32, 32), uniform(60, DRAWS)
    found = tensor_of(images)
    for step in jitter(numbers, 0.4):
        change(found, step, Geometry(FILL, "bicubic"), torch.float32)
    factors = 0.6 + 0.8 * numbers[:, 1:]
    functions = (vision.adjust_brightness, vision.adjust_contrast, vision.adjust_saturation)
    orders = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    for image, row, number, factor in zip(images, found, numbers, factors, strict=True):
        wanted = image
        for turn in orders[int(number[0] * 6)]:
            wanted = functions[turn](wanted, factor[turn])
        assert (row.int() - vision.pil_to_tensor(wanted)).abs().max() <= 1


@pytest.mark.parametrize("text", ["rand-m9-mstd0.5-inc1", "rand-t3aw-n3", "original-mstd0.5", None])
def test_float32_and_float64_make_the_same_pictures(text: str | None) -> None:
    images, options = tensor_of(photos(60, 32, 32)), replace(PAPER, auto_augment=text, random_erasing=1.0)
    one, other = (augmentation(options, dtype=dtype)(images, 0, 0) for dtype in (torch.float32, torch.float64))
    assert other.dtype == torch.float64
    assert ((one - other).abs() * torch.tensor([0.25, 0.5, 0.2]).view(3, 1, 1) * 255).max() < 1.01


def test_the_parts_come_in_the_order_of_timm(way: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fixed draws the whole is timm's whole: the policy is one operation, which always acts alike."""
    images, options = photos(8, 40, 40), replace(PAPER, hflip=1.0, auto_augment="rand-m9-n1-p1", random_erasing=0.0)
    only = Policy(("Solarize",), np.ones(1), np.array([4.0]), 0.0, 10.0, 1, None, False)
    monkeypatch.setattr(Policy, "of", lambda text: only)
    one = augmentation(options)
    boxes = one.draw(0, 0, 8, 40, 40).boxes.int().tolist()
    steps = create_transform(
        48, is_training=True, mean=one.mean, std=one.std, hflip=1.0, interpolation="bicubic"
    ).transforms
    for image, box, found in zip(images, boxes, one(tensor_of(images), 0, 0), strict=True):
        part = vision.hflip(vision.resized_crop(image, *box, [48, 48], InterpolationMode.BICUBIC))
        wanted = steps[-1](steps[-2](AugmentOp("Solarize", 1.0, 4)(part)))
        assert ((found - wanted).abs() * torch.tensor(one.std)[:, None, None] * 255 < 1.01).float().mean() > 0.999


@pytest.mark.parametrize(
    ("options", "typical"), [(CROP_ONLY, False), (PAPER, True), (replace(PAPER, crop_padding=3), True)]
)
def test_the_loader_augments_whole_batches_from_memory_and_from_files(options: Augmentation, typical: bool) -> None:
    pixels = tensor_of(photos(24, 48, 48))
    one = BatchAugmentation(options, 48, (0.0,) * 3, (1.0,) * 3, 3)
    files = LazySource(lambda number: vision.to_pil_image(pixels[number]), range(24), np.arange(24), 24)
    for source in (ArraySource(pixels, torch.arange(24), 24), files):
        ((images, labels),) = training(source, options, image_size=48, batch_size=24).epoch(0)
        away = (images - one(pixels[labels], 0, 0)).abs() * 255
        if source is not files:
            assert away.max() == 0
        else:  # a policy makes much of a pixel that is rounded otherwise
            assert (away.median() if typical else away.max()) < 1.01


@pytest.mark.parametrize(
    "options",
    [
        BATCH,
        replace(POLICY, crop_padding=2),
        *(replace(PAPER, auto_augment=text, erasing_mode="rand") for text in ("rand-m9-inc1", "rand-t3aw-n3", "v0")),
    ],
    ids=["0.1", "padding", "rand", "weighted", "v0"],
)
def test_nothing_waits_for_the_device_or_depends_on_pixels(options: Augmentation) -> None:
    """Tensors without values stand for a GPU: a value that is read, or a tensor left on the host, is an error."""
    normalize = Normalize((0.5, 0.25, 0.75), (0.25, 0.5, 0.2))
    transforms = training_transform(options, 48, normalize, 3), evaluation_transform(PLAIN, 48, normalize)
    with FakeTensorMode(allow_non_fake_inputs=True):
        labels = torch.empty(64, dtype=torch.int64, device="cuda")
        for size, functions in ((32, [one.whole for one in transforms]), (48, [one.finish for one in transforms])):
            for function in functions:
                assert function is not None
                found = function(torch.empty(64, 3, size, size, dtype=torch.uint8, device="cuda"), 0, 0)
                assert (found.device.type, found.shape, found.dtype) == ("cuda", (64, 3, 48, 48), torch.float32)
        for mixing in (Mixup(0.8, 0.0, num_classes=10), Mixup(0.0, 1.0, num_classes=10)):  # as training mixes
            assert [(x.device.type, len(x)) for x in mixing(found, labels)] == [("cuda", 64)] * 2
