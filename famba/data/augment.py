"""What images go through between a source and the model.

Training images take one of two ways: whole uint8 batches (pad-crop and flip), or one by one through timm's
transforms. Both draw from (seed, epoch, position) alone, see `draws`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform

from famba.data.draws import Stream, seed_global_generators, words
from famba.data.images import fit, to_tensor
from famba.errors import ConfigError, near_miss

KINDS = ("batch", "timm")
ERASING_MODES = ("pixel", "rand", "const")
INTERPOLATIONS = ("bilinear", "bicubic")
_NUMBER = r"\d{1,2}(\.\d+)?"
# timm's settings, with whole numbers where it reads whole numbers. More than 99 operations on an image is a slip.
_POLICY = re.compile(
    rf"rand(-(m|n|mmax|inc)\d{{1,2}}|-(p|mstd){_NUMBER}|-mstd\d{{3}}|-t(weights|3aw?))*"
    rf"|augmix(-(m|w|d|b)\d{{1,2}}|-(a|mstd){_NUMBER})*"
    rf"|(3a|original|originalr|v0|v0r)(-mstd{_NUMBER})?"
)
_EXAMPLES = ("rand-m9-mstd0.5-inc1", "augmix-m5-w4-d2", "original-mstd0.5", "3a")


@dataclass(frozen=True)
class Augmentation:
    """What the training images go through, and how images are scaled for evaluation.

    Attributes:
        kind: "batch": pad-crop and flip of whole uint8 batches, then scaling; "timm": timm's random resized
            crop, flip and what is asked for below, image by image.
        crop_padding: "batch": black pixels added on each side before a crop of the original size.
        hflip: probability of a horizontal flip.
        auto_augment: "timm": a policy such as "rand-m9-mstd0.5-inc1", or None.
        color_jitter: "timm": strength, 0 for none. timm leaves it out where `auto_augment` is on.
        random_erasing: "timm": probability that a rectangle is erased.
        erasing_mode: "timm": what fills it: noise per "pixel", one "rand" colour, or "const" zero.
        interpolation: "bilinear" or "bicubic", in training and evaluation.
        eval_crop: share of the shorter side that the centre crop of evaluation keeps: 0.875 scales to 256
            and crops 224; 1.0 is plain scaling.

    Raises:
        ConfigError: for a value out of range or a policy that timm cannot read.
    """

    kind: str
    crop_padding: int
    hflip: float
    auto_augment: str | None
    color_jitter: float
    random_erasing: float
    erasing_mode: str
    interpolation: str
    eval_crop: float

    def __post_init__(self) -> None:
        _one_of("kind", self.kind, KINDS)
        _one_of("erasing_mode", self.erasing_mode, ERASING_MODES)
        _one_of("interpolation", self.interpolation, INTERPOLATIONS)
        for name, value in (("hflip", self.hflip), ("random_erasing", self.random_erasing)):
            if not 0 <= value <= 1:
                raise ConfigError(f"{name} is {value}, but a probability lies in 0..1.", name)
        for name, value in (("crop_padding", self.crop_padding), ("color_jitter", self.color_jitter)):
            if value < 0:
                raise ConfigError(f"{name} is {value}, but must not be negative.", name)
        if not 0 < self.eval_crop <= 1:
            raise ConfigError(f"eval_crop is {self.eval_crop}, but must be above 0 and at most 1.", "eval_crop")
        self._refuse_what_the_kind_leaves_out()
        if self.kind == "timm":
            _check_policy(self.auto_augment)
            timm_transform(self, 8, (0.5,) * 3, (0.5,) * 3)  # a wrong policy shows here, before any work

    def _refuse_what_the_kind_leaves_out(self) -> None:
        neutral: dict[str, object] = {"crop_padding": 0}
        if self.kind == "batch":
            neutral = {"auto_augment": None, "color_jitter": 0, "random_erasing": 0}
        for name, nothing in neutral.items():
            if getattr(self, name) != nothing:
                value = "null" if nothing is None else nothing
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}, but augmentation {self.kind!r} does not use it: "
                    f"set it to {value}, or use the other augmentation.",
                    name,
                )


@dataclass(frozen=True)
class Normalize:
    """uint8 or float values in 0..255, (b, 3, h, w), to float32 (value / 255 - mean) / std."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ConfigError(f"mean {self.mean} and std {self.std} must hold three numbers each, std above zero.")

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return a new float32 tensor of the same shape."""
        mean, std = (torch.tensor(values).mul_(255).view(3, 1, 1) for values in (self.mean, self.std))
        return (images.float() - mean).div_(std)


@dataclass(frozen=True)
class BatchTransform:
    """Pad-crop, flip, scaling and normalisation of a uint8 batch; each image has draws of its own.

    Attributes:
        augmentation: its crop_padding and hflip are used.
        scaling: to the size of the result.
        normalize: the last step.
        stream: what the draws are for.
        key: integers that the draws depend on beside epoch and position, the seed first.
    """

    augmentation: Augmentation
    scaling: Scaling
    normalize: Normalize
    stream: Stream
    key: tuple[int, ...]

    def __call__(self, images: torch.Tensor, epoch: int, start: int) -> torch.Tensor:
        """Turn uint8 (b, 3, h, w), of which image i has position start + i, into float32 (b, 3, s, s)."""
        drawn = words(self.stream, self.key, epoch, start, len(images))
        cropped = _pad_crop(images, self.augmentation.crop_padding, drawn[:, 0], drawn[:, 1])
        uniform = (drawn[:, 2] >> np.uint64(11)) * 2.0**-53
        flipped = torch.from_numpy(uniform < self.augmentation.hflip)
        cropped[flipped] = cropped[flipped].flip(-1)
        return self.normalize(self.scaling.batch(cropped))


@dataclass(frozen=True)
class ScaledTransform:
    """The transform of whole batches, for images that are not in memory and may differ in size."""

    scaling: Scaling
    transform: BatchTransform

    def __call__(self, images: Iterable[Image.Image], epoch: int, start: int) -> torch.Tensor:
        """Return float32 (b, 3, s, s); image i has position start + i."""
        return self.transform(torch.stack([self.scaling.image(image) for image in images]), epoch, start)


@dataclass(frozen=True)
class SampleTransform:
    """timm's training transform, image by image, each seeded by its position.

    `stream` and `key` are as in `BatchTransform`.
    """

    transform: Callable[[Image.Image], torch.Tensor]
    stream: Stream
    key: tuple[int, ...]

    def __call__(self, images: Iterable[Image.Image], epoch: int, start: int) -> torch.Tensor:
        """Return float32 (b, 3, s, s); image i has position start + i. Seeds the global CPU generators."""
        return torch.stack([self._one(image, epoch, start + place) for place, image in enumerate(images)])

    def _one(self, image: Image.Image, epoch: int, position: int) -> torch.Tensor:
        seed_global_generators(self.stream, self.key, epoch, position)
        return self.transform(image)


@dataclass(frozen=True)
class Scaling:
    """Scaling of the shorter side to `side` pixels, then a centre crop to `crop` pixels."""

    side: int
    crop: int
    interpolation: str

    def batch(self, images: torch.Tensor) -> torch.Tensor:
        """Turn uint8 (b, 3, h, w) into float32 (b, 3, s, s) in 0..255, or leave it if it has that size."""
        if self.side == self.crop and images.shape[-2:] == (self.crop, self.crop):
            return images
        return fit(images.float(), self.side, self.crop, self.interpolation)

    def image(self, image: Image.Image) -> torch.Tensor:
        """Turn an RGB image into uint8 (3, s, s)."""
        return to_tensor(fit(image, self.side, self.crop, self.interpolation))


def training_scaling(augmentation: Augmentation, image_size: int) -> Scaling:
    """Scaling to `image_size` that keeps all of the shorter side."""
    return Scaling(image_size, image_size, augmentation.interpolation)


def evaluation_scaling(augmentation: Augmentation, image_size: int) -> Scaling:
    """Scaling and centre crop of evaluation."""
    return Scaling(round(image_size / augmentation.eval_crop), image_size, augmentation.interpolation)


def _check_policy(policy: str | None) -> None:
    """Refuse what timm would pass over in silence, or count by the million."""
    if policy is None or _POLICY.fullmatch(policy):
        return
    raise ConfigError(
        f"auto_augment {policy!r} is no policy: allowed are rand, augmix, 3a, original, originalr, v0 and v0r, behind "
        f"them settings of timm such as -m9 with numbers up to 99{near_miss(policy, _EXAMPLES)}.",
        "auto_augment",
    )


def timm_transform(
    augmentation: Augmentation, image_size: int, mean: Sequence[float], std: Sequence[float]
) -> Callable[[Image.Image], torch.Tensor]:
    """Build timm's training transform: RGB image to float32 (3, s, s)."""
    try:
        return create_transform(
            image_size,
            is_training=True,
            hflip=augmentation.hflip,
            color_jitter=augmentation.color_jitter,
            auto_augment=augmentation.auto_augment,
            interpolation=augmentation.interpolation,
            mean=tuple(mean),
            std=tuple(std),
            re_prob=augmentation.random_erasing,
            re_mode=augmentation.erasing_mode,
        )
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        raise ConfigError(
            f"auto_augment {augmentation.auto_augment!r} is no policy that timm reads ({error}). "
            "An example is rand-m9-mstd0.5-inc1.",
            "auto_augment",
        ) from error


def _pad_crop(images: torch.Tensor, padding: int, down: np.ndarray, right: np.ndarray) -> torch.Tensor:
    """Crop (b, 3, h, w) to the same size at offsets 0 .. 2 * padding from uint64 draws (b,); a new tensor."""
    if padding == 0:
        return images.clone()
    padded = F.pad(images, (padding,) * 4).numpy()
    size = images.shape[-2:]
    # A view of every window, (b, 3, offsets down, offsets right, h, w); indexing copies one for each image.
    windows = np.lib.stride_tricks.sliding_window_view(padded, size, axis=(2, 3))
    offsets = np.uint64(2 * padding + 1)
    chosen = windows[np.arange(len(images)), :, down % offsets, right % offsets]
    return torch.from_numpy(chosen)


def _one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        hint = near_miss(str(value), allowed) or "."
        raise ConfigError(f"{name} {value!r} is not one of {', '.join(allowed)}{hint}", name)


def images_transform(
    augmentation: Augmentation, image_size: int, normalize: Normalize, stream: Stream, key: tuple[int, ...]
) -> ScaledTransform | SampleTransform:
    """Return the training transform of images; `stream` and `key` are as in `BatchTransform`."""
    if augmentation.kind == "timm":
        transform = timm_transform(augmentation, image_size, normalize.mean, normalize.std)
        return SampleTransform(transform, stream, key)
    scaling = training_scaling(augmentation, image_size)
    return ScaledTransform(scaling, BatchTransform(augmentation, scaling, normalize, stream, key))
