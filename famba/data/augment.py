"""Turn images as a source gives them into what the model takes.

Training images are augmented in whole uint8 batches, or one by one by timm's transforms; both draw from (seed, epoch,
position) alone, see `draws`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, TypeAlias, get_type_hints

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field, TypeAdapter, ValidationError
from timm.data import create_transform
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as vision

from famba.data.batch_augment import BatchAugmentation
from famba.data.batch_policy import Policy
from famba.data.draws import Stream, seed_global_generators, words
from famba.errors import ConfigError, near_miss

Images: TypeAlias = torch.Tensor | Iterable[Image.Image]
"""uint8 (b, 3, h, w), or RGB images that may differ in size."""

Transform: TypeAlias = Callable[[Images, int, int], torch.Tensor]
"""(images, epoch, start) to float32 (b, 3, s, s), for images at positions start, start + 1, ... of the epoch."""

Probability = Annotated[float, Field(ge=0, le=1)]

_LONGEST = 8  # times the shorter side that an image is scaled at
_NUMBER = r"\d{1,2}(\.\d+)?"
# timm's settings, with whole numbers where it reads whole numbers. More than 99 operations on an image is a slip.
_POLICY = re.compile(
    rf"rand(-(m|n|mmax|inc)\d{{1,2}}|-(p|mstd){_NUMBER}|-mstd\d{{3}}|-t(weights|3aw?))*"
    rf"|augmix(-(m|w|d|b)\d{{1,2}}|-(a|mstd){_NUMBER})*"
    rf"|(3a|original|originalr|v0|v0r)(-mstd{_NUMBER})?"
)
_EXAMPLES = ("rand-m9-mstd0.5-inc1", "augmix-m5-w4-d2", "original-mstd0.5", "3a")


@dataclass(frozen=True)
class AugmentationOptions:
    """Holds the options that a recipe has under the same names."""

    crop_padding: Annotated[int, Field(ge=0, le=1024)] | None  # black pixels on each side before a crop of that size;
    # None: a random resized crop, which "timm" has always
    hflip: Probability  # of a horizontal flip
    auto_augment: str | None  # a policy such as "rand-m9-mstd0.5-inc1"
    color_jitter: Annotated[float, Field(ge=0, le=1000)]  # strength; left out where `auto_augment` is on
    random_erasing: Probability  # that a rectangle is erased
    erasing_mode: Literal["pixel", "rand", "const"]  # filled with noise per pixel, one random colour, or zero
    interpolation: Literal["bilinear", "bicubic"]  # in training and evaluation
    eval_crop: Annotated[float, Field(ge=0.1, le=1)]  # share of the shorter side: 0.875 scales to 256 and crops 224


@dataclass(frozen=True)
class Augmentation(AugmentationOptions):
    """Says what training images go through, and how images are scaled for evaluation.

    Raises ConfigError for a value out of range, one that this kind does not use, or a policy that it cannot read.
    """

    kind: Literal["batch", "timm"]  # whole batches at once; or image by image, by timm's own transforms

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(Augmentation, include_extras=True).items():
            value = getattr(self, name)
            try:
                TypeAdapter(kind).validate_python(value, strict=True)
            except ValidationError as error:
                raise ConfigError(f"{name} is {value!r}. {error.errors()[0]['msg']}.", name) from None
        if self.kind == "timm" and self.crop_padding:
            said = f"crop_padding is {self.crop_padding!r}, but augmentation 'timm' does not use it"
            raise ConfigError(f"{said}: set it to 0, or use the other one.", "crop_padding")
        if self.kind == "batch" and self.crop_padding == 0 and self.changes_pixels:
            raise ConfigError(
                "crop_padding is 0, which is no crop at all, but auto_augment, color_jitter or random_erasing is on: "
                "set it to null for timm's random resized crop, or to a number of pixels above 0.",
                "crop_padding",
            )
        timm_transform(self, 8, (0.5,) * 3, (0.5,) * 3)  # a wrong policy shows here, before any work
        if self.kind == "batch" and self.auto_augment is not None:
            Policy.of(self.auto_augment)

    @property
    def changes_pixels(self) -> bool:
        """Return whether there is more than a crop and a flip."""
        return self.auto_augment is not None or self.color_jitter > 0 or self.random_erasing > 0


@dataclass(frozen=True)
class Scaling:
    """Scales the shorter side to `side` pixels, then cuts out the central `crop` pixels."""

    side: int
    crop: int
    interpolation: str

    def batch(self, images: Images) -> torch.Tensor:
        """Return uint8 or float32 (b, 3, s, s) in 0..255."""
        if not isinstance(images, torch.Tensor):
            return torch.stack([self.image(image) for image in images])
        if self.side == self.crop and images.shape[-2:] == (self.crop, self.crop):
            return images
        scaled = vision.resize(_without_ends(images).float(), self.side, InterpolationMode(self.interpolation))
        return vision.center_crop(scaled.clamp(0, 255), [self.crop, self.crop])  # bicubic weights overshoot at edges

    def image(self, image: Image.Image) -> torch.Tensor:
        """Return uint8 (3, s, s) for an RGB image."""
        scaled = vision.resize(_without_ends(image), self.side, InterpolationMode(self.interpolation))
        return vision.pil_to_tensor(vision.center_crop(scaled, [self.crop, self.crop]))


def _without_ends(image: Any) -> Any:
    """Cut off the ends of a very long image: scaled, they would fill gigabytes, and no central crop shows them."""
    sides = vision.get_dimensions(image)[1:]
    longest = _LONGEST * min(sides)
    return image if max(sides) <= longest else vision.center_crop(image, [min(side, longest) for side in sides])


@dataclass(frozen=True)
class Normalize:
    """Turns uint8 or float values in 0..255, (b, 3, h, w), into new float32 (value / 255 - mean) / std."""

    mean: Sequence[float]
    std: Sequence[float]

    def __post_init__(self) -> None:
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ConfigError(f"mean {self.mean} and std {self.std} must hold three numbers each, std above zero.")

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return the values in the same shape."""
        mean, std = (torch.tensor(values).mul_(255).view(3, 1, 1) for values in (self.mean, self.std))
        return (images.float() - mean).div_(std)


def evaluation_scaling(augmentation: Augmentation, image_size: int) -> Scaling:
    """Return the scaling and centre crop of evaluation."""
    return Scaling(round(image_size / augmentation.eval_crop), image_size, augmentation.interpolation)


def evaluation_transform(augmentation: Augmentation, image_size: int, normalize: Normalize) -> Transform:
    """Return the transform of evaluation, which draws nothing."""
    return partial(_evaluated, evaluation_scaling(augmentation, image_size), normalize)


def _evaluated(scaling: Scaling, normalize: Normalize, images: Images, epoch: int, start: int) -> torch.Tensor:
    return normalize(scaling.batch(images))


def training_transform(augmentation: Augmentation, image_size: int, normalize: Normalize, seed: int) -> Transform:
    """Return the transform of training images, whose draws depend on the seed, the epoch and the position."""
    if augmentation.kind == "timm":
        return partial(_each, timm_transform(augmentation, image_size, normalize.mean, normalize.std), seed)
    scaling = Scaling(image_size, image_size, augmentation.interpolation)
    if augmentation.crop_padding is None or augmentation.changes_pixels:
        whole = BatchAugmentation.of(augmentation, image_size, normalize.mean, normalize.std, seed)
        return partial(_batched, augmentation, scaling, whole)
    return partial(_cropped, augmentation, scaling, normalize, seed)


def timm_transform(
    augmentation: Augmentation, image_size: int, mean: Sequence[float], std: Sequence[float]
) -> Callable[[Image.Image], torch.Tensor]:
    """Build timm's training transform: RGB image to float32 (3, s, s). Raises ConfigError for a wrong policy."""
    policy = augmentation.auto_augment
    try:
        # timm would pass over some mistakes in silence, and repeat an operation a million times.
        if policy is not None and not _POLICY.fullmatch(policy):
            raise ValueError("allowed: rand, augmix, 3a, original, originalr, v0, v0r, with settings like -m9 up to 99")
        return create_transform(
            image_size,
            is_training=True,
            hflip=augmentation.hflip,
            color_jitter=augmentation.color_jitter,
            auto_augment=policy,
            interpolation=augmentation.interpolation,
            mean=tuple(mean),
            std=tuple(std),
            re_prob=augmentation.random_erasing,
            re_mode=augmentation.erasing_mode,
        )
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        hint = near_miss(str(policy), _EXAMPLES) or f", such as {_EXAMPLES[0]}."
        raise ConfigError(f"auto_augment {policy!r} is no policy ({error}){hint}", "auto_augment") from error


def _each(
    transform: Callable[[Image.Image], torch.Tensor], seed: int, images: Images, epoch: int, start: int
) -> torch.Tensor:
    """Transform images one by one as timm does, each seeded by its position, through the global CPU generators."""
    done = []
    for position, image in enumerate(images, start):
        rgb = vision.to_pil_image(image) if isinstance(image, torch.Tensor) else image
        seed_global_generators(Stream.AUGMENTATION, (seed,), epoch, position)
        done.append(transform(rgb))
    return torch.stack(done)


def _batched(
    augmentation: Augmentation, scaling: Scaling, whole: BatchAugmentation, images: Images, epoch: int, start: int
) -> torch.Tensor:
    """Augment images at once; for a crop with padding, those that are not in memory are scaled first."""
    pixels = images if augmentation.crop_padding is None else scaling.batch(images)
    return whole(pixels, epoch, start)


def _cropped(
    augmentation: Augmentation,
    scaling: Scaling,
    normalize: Normalize,
    seed: int,
    images: Images,
    epoch: int,
    start: int,
) -> torch.Tensor:
    """Pad-crop, flip, scale and normalise images, bit by bit as Famba 0.1; those not in memory are scaled first."""
    pixels = images if isinstance(images, torch.Tensor) else scaling.batch(images)
    drawn = words(Stream.AUGMENTATION, (seed,), epoch, start, len(pixels))
    cropped = _pad_crop(pixels, augmentation.crop_padding or 0, drawn[:, 0], drawn[:, 1])
    uniform = (drawn[:, 2] >> np.uint64(11)) * 2.0**-53
    flipped = torch.from_numpy(uniform < augmentation.hflip)
    cropped[flipped] = cropped[flipped].flip(-1)
    return normalize(scaling.batch(cropped))


def _pad_crop(images: torch.Tensor, padding: int, down: np.ndarray, right: np.ndarray) -> torch.Tensor:
    """Crop (b, 3, h, w) to the same size at offsets 0 .. 2 * padding, drawn as uint64 (b,); return a new tensor."""
    padded = F.pad(images, (padding,) * 4).numpy()
    # A view of every window, (b, 3, offsets down, offsets right, h, w); indexing copies one for each image.
    windows = np.lib.stride_tricks.sliding_window_view(padded, images.shape[-2:], axis=(2, 3))
    offsets = np.uint64(2 * padding + 1)
    return torch.from_numpy(windows[np.arange(len(images)), :, down % offsets, right % offsets])
