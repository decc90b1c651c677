"""Turn images as a source gives them into what the model takes.

Training images are augmented in whole uint8 batches, or one by one by timm's transforms; both draw from (seed, epoch,
position) alone, see `draws`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias, get_type_hints

import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field, TypeAdapter, ValidationError
from timm.data import create_transform
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as vision

from famba.data.batch_augment import BatchAugmentation
from famba.data.batch_operations import column
from famba.data.batch_policy import Policy
from famba.data.batch_resample import resize_and_crop
from famba.data.draws import Stream, seed_global_generators
from famba.errors import ConfigError, near_miss

Batched: TypeAlias = Callable[[Tensor, int, int], Tensor]
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
            raise ConfigError(f"{said}: set it to null, or use the other one.", "crop_padding")
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


class Transform(NamedTuple):
    """Turns images into what the model takes; `finish` and `whole` work on any device."""

    read: Callable[[Iterable[Image.Image], int, int], Tensor]  # RGB images to (b, 3, s, s) on the host, as in `Batched`
    finish: Batched  # what `read` returned
    whole: Batched | None  # uint8 (b, 3, h, w) at once instead of both; None: there is no such way


@dataclass(frozen=True)
class Scaling:
    """Scales the shorter side to `side` pixels, then cuts out the central `crop` pixels."""

    side: int
    crop: int
    interpolation: str

    def batch(self, images: Tensor) -> Tensor:
        """Return (b, 3, s, s) of whole numbers for uint8 (b, 3, h, w), on its device: the pictures of `image`."""
        if self.side == self.crop and images.shape[-2:] == (self.crop, self.crop):
            return images
        return resize_and_crop(_without_ends(images), self.side, self.crop, self.interpolation)

    def each(self, images: Iterable[Image.Image], epoch: int = 0, start: int = 0) -> Tensor:
        """Return uint8 (b, 3, s, s) for RGB images."""
        return torch.stack([self.image(image) for image in images])

    def image(self, image: Image.Image) -> Tensor:
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

    def __call__(self, images: Tensor, epoch: int = 0, start: int = 0) -> Tensor:
        """Return the values in the same shape; there is nothing to draw."""
        mean, std = (column(values, torch.float32, images.device) * 255 for values in (self.mean, self.std))
        return (images.float() - mean).div_(std)


def evaluation_scaling(augmentation: Augmentation, image_size: int) -> Scaling:
    """Return the scaling and centre crop of evaluation."""
    return Scaling(round(image_size / augmentation.eval_crop), image_size, augmentation.interpolation)


def evaluation_transform(augmentation: Augmentation, image_size: int, normalize: Normalize) -> Transform:
    """Return the transform of evaluation, which draws nothing."""
    scaling = evaluation_scaling(augmentation, image_size)
    return Transform(scaling.each, normalize, partial(_evaluated, scaling, normalize))


def _evaluated(scaling: Scaling, normalize: Normalize, images: Tensor, epoch: int, start: int) -> Tensor:
    return normalize(scaling.batch(images))


def training_transform(augmentation: Augmentation, image_size: int, normalize: Normalize, seed: int) -> Transform:
    """Return the transform of training images, whose draws depend on the seed, the epoch and the position."""
    if augmentation.kind == "timm":
        one = timm_transform(augmentation, image_size, normalize.mean, normalize.std)
        return Transform(partial(_each, one, seed), unchanged, None)
    whole = BatchAugmentation(augmentation, image_size, normalize.mean, normalize.std, seed)
    if augmentation.crop_padding is None:
        return Transform(whole.crop_each, partial(whole, cropped=True), whole)
    scaling = Scaling(image_size, image_size, augmentation.interpolation)
    batched = whole if augmentation.changes_pixels else partial(_cropped, whole, normalize)
    return Transform(scaling.each, batched, batched)


def unchanged(images: Tensor, epoch: int, start: int) -> Tensor:
    """Return the images as they are."""
    return images


def timm_transform(
    augmentation: Augmentation, image_size: int, mean: Sequence[float], std: Sequence[float]
) -> Callable[[Image.Image], Tensor]:
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
    transform: Callable[[Image.Image], Tensor], seed: int, images: Iterable[Image.Image], epoch: int, start: int
) -> Tensor:
    """Transform images one by one as timm does, each seeded by its position, through the global CPU generators."""
    done = []
    for position, image in enumerate(images, start):
        seed_global_generators(Stream.AUGMENTATION, (seed,), epoch, position)
        done.append(transform(image))
    return torch.stack(done)


def _cropped(whole: BatchAugmentation, normalize: Normalize, images: Tensor, epoch: int, start: int) -> Tensor:
    """Pad-crop, flip, scale and normalise uint8 (b, 3, h, w), on a CPU bit by bit as Famba 0.1."""
    size, padding = whole.size, whole.options.crop_padding or 0
    draws = whole.draw(epoch, start, len(images), *images.shape[2:]).to(images.device)
    down, right = draws.boxes[:, :2].long().T[..., None]
    row, across = (torch.arange(side, device=images.device) for side in images.shape[2:])
    mirrored = right + torch.where(draws.flip[:, None], across.flip(0), across)
    number, channel = (torch.arange(n, device=images.device) for n in images.shape[:2])
    padded = F.pad(images, (padding,) * 4)
    cropped = padded[
        number[:, None, None, None], channel[:, None, None], (down + row)[:, None, :, None], mirrored[:, None, None]
    ]
    if cropped.shape[2:] != (size, size):
        scaled = vision.resize(_without_ends(cropped).float(), size, InterpolationMode(whole.options.interpolation))
        cropped = vision.center_crop(scaled.clamp(0, 255), [size, size])  # bicubic weights overshoot at edges
    return normalize(cropped)
