"""Augment whole batches of images as timm's transforms do, with the same pictures on every device.

Random crop, flip, policy, colour jitter, normalisation and erasing come in the order of `timm.data.create_transform`.
Draws are made on the host from (seed, epoch, position) alone; nothing waits for the device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, UInt8
from PIL import Image
from scipy.special import ndtri
from torch import Tensor
from torchvision.transforms import functional as vision

from famba.data.batch_operations import Geometry, change, column, erase
from famba.data.batch_policy import DRAWS, Array, Policy, Step, jitter
from famba.data.batch_resample import BOX_DRAWS, crop, crop_each, random_boxes
from famba.data.draws import Stream, sent, uniforms, words

if TYPE_CHECKING:
    from famba.data.augment import AugmentationOptions

_BOXES, _POLICY, _JITTER, _ERASING, _NOISE = range(5)  # parts of the stream of draws
_ATTEMPTS = 10
_ERASING_DRAWS = 1 + 2 * _ATTEMPTS + 2 + 3  # whether, sizes, place, colour
_ERASED_AREA, _LOG_ERASED_ASPECT = (0.02, 1 / 3), (math.log(0.3), math.log(1 / 0.3))
_NOISE_STARTS = 2**20  # places at which the noise of an image may start in the table
_AT_ONCE = 64  # images whose values stay near a processor


@dataclass(frozen=True)
class Erasing:
    """Holds n erased boxes."""

    rows: Tensor  # int64 (n,), the images' numbers in the batch
    boxes: Tensor  # int64 (n, 4): top, left, height, width
    colours: Tensor  # float64 (n, 3), standard normal, for boxes of one colour
    starts: Tensor  # int64 (n,), where the noise of the image starts in the table


@dataclass(frozen=True)
class Draws:
    """Holds all that is drawn for a batch of b images."""

    boxes: Float64[Tensor, "b 4"]  # top, left, height, width in pixels, from the padding's corner
    flip: Bool[Tensor, " b"]
    steps: tuple[Step, ...]  # in their order
    erasing: Erasing | None

    def to(self, device: torch.device) -> Draws:
        """Return the same on a device, without waiting for it."""
        boxes, flip = sent(self.boxes, device), sent(self.flip, device)
        erasing = self.erasing and Erasing(*(sent(x, device) for x in vars(self.erasing).values()))
        return Draws(boxes, flip, tuple(step.to(device) for step in self.steps), erasing)


@dataclass(frozen=True, eq=False)
class BatchAugmentation:
    """Augments the training images of one run in whole batches."""

    options: AugmentationOptions  # where `crop_padding` is None, boxes are those of a random resized crop
    size: int  # side of the results in pixels
    mean: Sequence[float]  # of the colours, in 0..1
    std: Sequence[float]
    seed: int
    dtype: torch.dtype = torch.float32  # of the arithmetic

    @functools.cached_property
    def _policy(self) -> Policy | None:
        return None if self.options.auto_augment is None else Policy.of(self.options.auto_augment)

    def __call__(self, images: Tensor, epoch: int, start: int, cropped: bool = False) -> Float[Tensor, "b 3 s s"]:
        """Augment uint8 (b, 3, h, w), on its device, at positions start, start + 1, ... of the epoch.

        cropped: whether the images went through `crop_each` before.
        """
        done = torch.empty(len(images), 3, self.size, self.size, dtype=self.dtype, device=images.device)
        at_once = _AT_ONCE if images.device.type == "cpu" else len(images)
        padding, interpolation = self.options.crop_padding or 0, self.options.interpolation
        for first in range(0, len(images), at_once):
            part, out = images[first : first + at_once], done[first : first + at_once]
            draws = self.draw(epoch, start + first, len(part), *part.shape[2:]).to(images.device)
            box = draws.boxes, draws.flip, self.size
            pixels = part.clone() if cropped else crop(part, *box, interpolation, padding, self.dtype)
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
        if self._policy is not None and self._policy.layers:
            numbers = self._uniforms(_POLICY, epoch, start, count, self._policy.layers * DRAWS)
            yield from self._policy.draw(numbers.reshape(count, -1, DRAWS), self.size)
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


@functools.lru_cache(maxsize=2)
def _noise(device: torch.device, length: int) -> Tensor:
    """Return standard normal numbers, float32, of which `length` start at each of the places."""
    numbers = uniforms(Stream.BATCH, (_NOISE,), 0, 0, 1, _NOISE_STARTS + length)
    return torch.from_numpy(ndtri(numbers[0])).float().to(device)
