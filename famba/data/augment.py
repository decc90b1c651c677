"""Turn images as a source gives them into what the model takes.

Training images are augmented in whole batches, with the same pictures on every device and in the order of
`timm.data.create_transform`; or one by one by timm's transforms. Both draw on the host, from (seed, epoch, position)
alone, see `draws`; nothing waits for the device.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias, get_type_hints

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, UInt8
from PIL import Image
from pydantic import Field, TypeAdapter, ValidationError
from scipy.special import ndtri
from timm.data import create_transform
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as vision

from famba.data.batch_operations import Geometry, change, column, erase
from famba.data.batch_policy import DRAWS, Array, Policy, Step, jitter
from famba.data.batch_resample import BOX_DRAWS, crop, crop_each, random_boxes, resize_and_crop
from famba.data.draws import Stream, seed_global_generators, sent, uniforms, words
from famba.errors import ConfigError, near_miss

Batched: TypeAlias = Callable[[Tensor, int, int], Tensor]
"""(images, epoch, start) to float32 (b, 3, s, s), for images at positions start, start + 1, ... of the epoch."""

Probability = Annotated[float, Field(ge=0, le=1)]

_BOXES, _OPERATIONS, _JITTER, _ERASING, _NOISE = range(5)  # parts of the stream of draws
_ATTEMPTS = 10
_ERASING_DRAWS = 1 + 2 * _ATTEMPTS + 2 + 3  # whether, sizes, place, colour
_ERASED_AREA, _LOG_ERASED_ASPECT = (0.02, 1 / 3), (math.log(0.3), math.log(1 / 0.3))
_NOISE_STARTS = 2**20  # places at which the noise of an image may start in the table
_AT_ONCE = 64  # images on a CPU: larger intermediate results are given back to the system, and cost new pages
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
        timm_transform(self, 8, (0.5,) * 3, (0.5,) * 3)  # a wrong policy shows here, before any work
        if self.kind == "batch" and self.auto_augment is not None:
            Policy.of(self.auto_augment)
        if self.kind == "timm" and self.crop_padding:
            said = f"crop_padding is {self.crop_padding!r}, but augmentation 'timm' does not use it"
            raise ConfigError(f"{said}: set it to null, or use augmentation 'batch'.", "crop_padding")
        if self.kind == "batch" and self.crop_padding == 0 and self.changes_pixels:
            said = "crop_padding is 0, which is no crop at all, but auto_augment, color_jitter or random_erasing is on"
            raise ConfigError(f"{said}: set it to null for a random resized crop, or above 0.", "crop_padding")

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


class Erasing(NamedTuple):
    """Holds n erased boxes."""

    rows: Tensor  # int64 (n,), the images' numbers in the batch
    boxes: Tensor  # int64 (n, 4): top, left, height, width
    colours: Tensor  # float64 (n, 3), standard normal, for boxes of one colour
    starts: Tensor  # int64 (n,), where the noise of the image starts in the table


class Draws(NamedTuple):
    """Holds all that is drawn for a batch of b images."""

    boxes: Float64[Tensor, "b 4"]  # top, left, height, width in pixels, from the padding's corner
    flip: Bool[Tensor, " b"]
    steps: tuple[Step, ...]  # in their order
    erasing: Erasing | None


@dataclass(frozen=True, eq=False)
class BatchAugmentation:
    """Augments the training images of one run in whole batches."""

    options: AugmentationOptions  # where `crop_padding` is None, boxes are those of a random resized crop
    size: int  # side of the results in pixels
    mean: Sequence[float]  # of the colours, in 0..1
    std: Sequence[float]
    seed: int
    dtype: torch.dtype = torch.float32  # of the arithmetic

    def __call__(self, images: Tensor, epoch: int, start: int, cropped: bool = False) -> Float[Tensor, "b 3 s s"]:
        """Augment uint8 (b, 3, h, w), on its device, at positions start, start + 1, ... of the epoch.

        cropped: whether the images went through `crop_each` before.
        """
        done = torch.empty(len(images), 3, self.size, self.size, dtype=self.dtype, device=images.device)
        at_once = _AT_ONCE if images.device.type == "cpu" else len(images)
        padding, kind = self.options.crop_padding or 0, self.options.interpolation
        for first in range(0, len(images), at_once):
            part, out = images[first : first + at_once], done[first : first + at_once]
            draws = sent(self.draw(epoch, start + first, len(part), *part.shape[2:]), images.device)
            boxes = draws.boxes
            if padding:  # of the centre of what is not square, as in evaluation
                sides = boxes[:, 2:].amin(1, keepdim=True)
                boxes = torch.cat([boxes[:, :2] + ((boxes[:, 2:] - sides) / 2).floor(), sides, sides], 1)
            pixels = part.clone() if cropped else crop(part, boxes, draws.flip, self.size, kind, padding, self.dtype)
            self._finish(pixels, draws, out)
        return done

    def draw(self, epoch: int, start: int, count: int, height: int, width: int) -> Draws:
        """Draw for `count` images of height x width pixels, from position `start` of the epoch on."""
        boxes, flip = self._crops(epoch, start, np.full(count, height), np.full(count, width))
        steps = tuple(self._steps(epoch, start, count))
        return Draws(torch.from_numpy(boxes), torch.from_numpy(flip), steps, self._erasing(epoch, start, count))

    def crop_each(self, images: Iterable[Image.Image], epoch: int, start: int) -> UInt8[Tensor, "b 3 s s"]:
        """Crop, scale and flip RGB images of any size one by one, as a batch without padding."""
        images = list(images)
        boxes, flip = self._crops(epoch, start, *np.array([(image.height, image.width) for image in images]).T)
        parts = [
            vision.pil_to_tensor(image.crop((left, top, left + width, top + height)))
            for image, (top, left, height, width) in zip(images, boxes.astype(int).tolist(), strict=True)
        ]
        return crop_each(parts, torch.from_numpy(flip), self.size, self.options.interpolation)

    def _finish(self, pixels: UInt8[Tensor, "b 3 s s"], draws: Draws, out: Float[Tensor, "b 3 s s"]) -> None:
        """Apply all that follows the crop, in place at first."""
        red, green, blue = (min(255, round(255 * value)) for value in self.mean)
        geometry = Geometry((red, green, blue), self.options.interpolation)
        for step in draws.steps:
            change(pixels, step, geometry, self.dtype)
        mean, std = (column(values, self.dtype, pixels.device) * 255 for values in (self.mean, self.std))
        out.copy_(pixels).sub_(mean).div_(std)
        if (erasing := draws.erasing) is not None:
            part = out.index_select(0, erasing.rows)
            out.index_copy_(0, erasing.rows, erase(part, erasing.boxes, self._content(erasing, part)))

    def _uniforms(self, part: int, epoch: int, start: int, count: int, numbers: int) -> Array:
        return uniforms(Stream.BATCH, (self.seed, part), epoch, start, count, numbers)

    def _crops(self, epoch: int, start: int, heights: Array, widths: Array) -> tuple[Array, Array]:
        """Return boxes, float64 (b, 4), and flips, bool (b,)."""
        drawn = words(Stream.AUGMENTATION, (self.seed,), epoch, start, len(heights))
        flip = (drawn[:, 2] >> np.uint64(11)) * 2.0**-53 < self.options.hflip
        if self.options.crop_padding is None:
            numbers = self._uniforms(_BOXES, epoch, start, len(heights), BOX_DRAWS)
            return random_boxes(numbers, heights, widths), flip
        corner = drawn[:, :2] % np.uint64(2 * self.options.crop_padding + 1)
        return np.concatenate([corner, heights[:, None], widths[:, None]], axis=1).astype(np.float64), flip

    def _steps(self, epoch: int, start: int, count: int) -> Iterator[Step]:
        text, strength = self.options.auto_augment, self.options.color_jitter
        if text is not None and (policy := Policy.of(text)).layers:
            numbers = self._uniforms(_OPERATIONS, epoch, start, count, policy.layers * DRAWS)
            yield from policy.draw(numbers.reshape(count, -1, DRAWS), self.size)
        if strength and (text is None or "3a" in text):  # as timm has it
            yield from jitter(self._uniforms(_JITTER, epoch, start, count, DRAWS), strength)

    def _erasing(self, epoch: int, start: int, count: int) -> Erasing | None:
        """Draw boxes as timm's RandomErasing does; an image into which ten of them do not fit is left whole."""
        if not self.options.random_erasing:
            return None
        numbers = self._uniforms(_ERASING, epoch, start, count, _ERASING_DRAWS)
        tries, place, colours = numbers[:, 1 : 1 + 2 * _ATTEMPTS], numbers[:, -5:-3], ndtri(numbers[:, -3:])
        (small, large), (flat, tall) = _ERASED_AREA, _LOG_ERASED_ASPECT
        area = (small + (large - small) * tries[:, ::2]) * self.size**2
        aspect = np.exp(flat + (tall - flat) * tries[:, 1::2])
        sides = np.rint(np.sqrt(np.stack([area * aspect, area / aspect], axis=2)))
        fits = np.asarray((sides < self.size).all(2))
        chosen: Array = sides[np.arange(count), fits.argmax(1)]
        corner = np.floor(place * (self.size - chosen + 1))
        rows = np.flatnonzero(fits.any(1) & (numbers[:, 0] <= self.options.random_erasing))
        boxes = np.concatenate([corner, chosen], axis=1).astype(np.int64)
        # The last number serves twice: only one of the two modes uses it.
        starts = np.floor(numbers[:, -1] * _NOISE_STARTS).astype(np.int64)
        return Erasing(*(torch.from_numpy(x[rows]) for x in (np.arange(count), boxes, colours, starts)))

    def _content(self, erasing: Erasing, images: Tensor) -> Tensor:
        """Return what erased boxes of images (n, 3, s, s) are filled with, as large as they or (n, 3, 1, 1)."""
        if self.options.erasing_mode == "const":
            return images.new_zeros(1, 3, 1, 1)
        if self.options.erasing_mode == "rand":
            return erasing.colours[..., None, None].to(images.dtype)
        length = images.shape[1:].numel()
        table = _noise(images.device, length)
        return table.as_strided((_NOISE_STARTS, length), (1, 1)).index_select(0, erasing.starts).view_as(images)


@lru_cache(maxsize=2)
def _noise(device: torch.device, length: int) -> Tensor:
    """Return standard normal numbers, float32, of which `length` start at each of the places."""
    numbers = uniforms(Stream.BATCH, (_NOISE,), 0, 0, 1, _NOISE_STARTS + length)
    return torch.from_numpy(ndtri(numbers[0])).float().to(device)


def evaluation_scaling(augmentation: Augmentation, image_size: int) -> Scaling:
    """Return the scaling and centre crop of evaluation."""
    return Scaling(math.floor(image_size / augmentation.eval_crop), image_size, augmentation.interpolation)


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
    draws = sent(whole.draw(epoch, start, len(images), *images.shape[2:]), images.device)
    down, right = draws.boxes[:, :2].long().T
    windows = F.pad(images, (padding,) * 4).unfold(2, images.shape[2], 1).unfold(3, images.shape[3], 1)
    cropped = windows[torch.arange(len(images), device=images.device), :, down, right]
    cropped = torch.where(draws.flip.view(-1, 1, 1, 1), cropped.flip(-1), cropped)
    if cropped.shape[2:] != (size, size):
        scaled = vision.resize(_without_ends(cropped).float(), size, InterpolationMode(whole.options.interpolation))
        cropped = vision.center_crop(scaled.clamp(0, 255), [size, size])  # bicubic weights overshoot at edges
    return normalize(cropped)
