"""Crop, flip and scale whole batches of images on any device, with the pictures that Pillow makes.

Every output row and column is a weighted sum of input ones, so a batch takes two products. Weights are rounded so that
these sums are exact in float32, in any order: every device makes the same picture.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float64, UInt8
from torch import Tensor

from famba.data.batch_operations import column
from famba.ops.native import pictures

_KERNELS = {"bilinear": (1, lambda x: (1 - x).clamp_(min=0)), "bicubic": (2, lambda x: _cubic(x))}
_ATTEMPTS = 10
BOX_DRAWS = 2 * _ATTEMPTS + 2  # uniform numbers that one random box takes
_AREA, _LOG_ASPECT = (0.08, 1.0), (math.log(3 / 4), math.log(4 / 3))


def random_boxes(
    uniform: Float64[np.ndarray, "b {BOX_DRAWS}"], heights: npt.ArrayLike, widths: npt.ArrayLike
) -> Float64[np.ndarray, "b 4"]:
    """Return boxes (top, left, height, width) of whole numbers, distributed as those of timm's random resized crop.

    A box takes 0.08 to 1 of the area, with aspect ratios from 3/4 to 4/3; the central part where ten tries do not fit.
    heights, widths: of the images, numbers or (b,).
    """
    high, wide = (np.broadcast_to(np.asarray(side, np.float64), len(uniform)) for side in (heights, widths))
    tries = uniform[:, : 2 * _ATTEMPTS].reshape(-1, _ATTEMPTS, 2)
    area = (_AREA[0] + (_AREA[1] - _AREA[0]) * tries[..., 0]) * (high * wide)[:, None]
    aspect = np.exp(_LOG_ASPECT[0] + (_LOG_ASPECT[1] - _LOG_ASPECT[0]) * tries[..., 1])
    height, width = np.rint(np.sqrt(area / aspect)), np.rint(np.sqrt(area * aspect))
    fits = (height <= high[:, None]) & (width <= wide[:, None])
    row, first, some = np.arange(len(uniform)), fits.argmax(1), fits.any(1)
    low_aspect, high_aspect = np.exp(_LOG_ASPECT)
    whole = np.minimum(high, np.rint(wide / low_aspect)), np.minimum(wide, np.rint(high * high_aspect))
    height, width = (np.where(some, side[row, first], all_) for side, all_ in zip((height, width), whole, strict=True))
    places = [
        np.where(some, np.floor(u * (side - part + 1)), (side - part) // 2)
        for u, side, part in zip(uniform[:, -2:].T, (high, wide), (height, width), strict=True)
    ]
    return np.stack([*places, height, width], axis=1)


def crop(
    images: UInt8[Tensor, "b c h w"],
    boxes: Float64[Tensor, "b 4"],
    flip: Bool[Tensor, " b"],
    size: int,
    interpolation: str,
    padding: int = 0,
    dtype: torch.dtype = torch.float32,
) -> UInt8[Tensor, "b c {size} {size}"]:
    """Cut a box (top, left, height, width) out of each image, scale it to size x size, and mirror it where `flip` is.

    Boxes count from the corner of the image with `padding` black pixels on each side, and lie within. dtype: of the
    arithmetic.
    """
    images = F.pad(images, (padding,) * 4) if padding else images
    rows, columns = _spans(boxes, flip, size)
    return _resample(images, (rows, size), (columns, size), size, interpolation, dtype)


def crop_each(
    parts: Sequence[UInt8[Tensor, "c _ _"]], flip: Bool[Tensor, " b"], size: int, interpolation: str
) -> UInt8[Tensor, "b c {size} {size}"]:
    """Scale images of any size to size x size, and mirror them where `flip` is."""
    boxes = parts[0].new_tensor([(0, 0, *part.shape[1:]) for part in parts], dtype=torch.float64)
    spans = zip(*(span.split(1) for span in _spans(boxes, flip, size)), strict=True)
    done = [
        _resample(part[None], (rows, size), (columns, size), size, interpolation, torch.float32)
        for part, (rows, columns) in zip(parts, spans, strict=True)
    ]
    return torch.cat(done)


def _spans(boxes: Float64[Tensor, "b 4"], flip: Bool[Tensor, " b"], size: int) -> tuple[Tensor, Tensor]:
    one = boxes.new_ones(len(boxes))
    first, step = torch.where(flip, size - 0.5 * one, 0.5 * one), torch.where(flip, -one, one)
    rows = torch.stack([boxes[:, 0], boxes[:, 2], 0.5 * one, one], 1)
    return rows, torch.stack([boxes[:, 1], boxes[:, 3], first, step], 1)


def resize_and_crop(
    images: UInt8[Tensor, "b c h w"], side: int, size: int, interpolation: str
) -> UInt8[Tensor, "b c {size} {size}"]:
    """Scale the shorter side to `side` pixels, at least `size`, and cut out the centre."""
    spans: list[pictures.Span] = []
    for source in images.shape[2:]:
        scaled = int(side * source / min(images.shape[2:]))
        numbers = (0, source, round((scaled - size) / 2) + 0.5, 1)
        spans.append((column(numbers, torch.float64, images.device).view(1, 4), scaled))
    return _resample(images, spans[0], spans[1], size, interpolation, torch.float32)


def _weights(span: pictures.Span, size: int, source: int, interpolation: str) -> Float64[Tensor, "b s n"]:
    """Return the weights of `source` pixels in each of `size` outputs.

    The kernel widens where it shrinks, and sees nothing outside of the extent.
    """
    (start, extent, place, step), scaled = span[0].T[..., None], span[1]
    support, kernel = _KERNELS[interpolation]
    taps = min(source, 2 * math.ceil(support * max(1.0, source / scaled)) + 1)
    scale = extent / extent.new_full((), scaled)  # a tensor: CUDA divides by a number inexactly
    widened = scale.clamp(min=1)
    centre = start + (place + step * torch.arange(size, device=start.device)) * scale
    first = (centre - support * widened).floor().clamp(0, source - taps)
    pixel = first[..., None] + torch.arange(taps, device=start.device)
    weight = kernel(((pixel + 0.5 - centre[..., None]) / widened[..., None]).abs())
    weight = weight * ((pixel >= start[..., None]) & (pixel < (start + extent)[..., None]))
    full = weight.new_zeros(*weight.shape[:-1], source)
    return full.scatter_(-1, pixel.long(), weight / weight.sum(-1, keepdim=True))


def _cubic(x: Tensor) -> Tensor:
    """Return the kernel of Keys (1981) with a = -0.5, at distances of 0 or more."""
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, torch.where(x < 2, far, 0))


def _resample(
    images: Tensor, rows: pictures.Span, columns: pictures.Span, size: int, interpolation: str, dtype: torch.dtype
) -> UInt8[Tensor, "b c s s"]:
    """Apply the weights of columns, round, then those of rows, and round again, as Pillow does.

    rows, columns: start and extent of what is scaled, in pixels, and where it is scaled, the centre of the first result
    and the way to the next, float64 (b, 4) or (1, 4); and the length of the scaled.

    A sum of 255 w is exact in float32 where the weights w have 15 bits after the point. Pillow's have 22: two products
    of 11 bits each make columns as exact as Pillow's, the rows after them need no more to be at most 1 away.
    """
    if pictures.usable(images.device, dtype):
        return pictures.resample(images, rows, columns, size, interpolation == "bicubic")
    number, channels, high, wide = images.shape
    exact = _to_bits(_weights(columns, size, wide, interpolation), 22)
    coarse = _to_bits(exact, 11)
    with _exact_products(images.device):
        lines = images.to(dtype).reshape(number, channels * high, wide)
        parts = [lines @ part.to(dtype).transpose(1, 2) for part in (coarse, exact - coarse)]
        whole = parts[0].add_(0.5).floor()
        across = parts[1].add_(parts[0].sub_(whole)).floor_().add_(whole).clamp_(0, 255)
        each = _to_bits(_weights(rows, size, high, interpolation), 15).to(dtype)[:, None]
        found = each @ across.view(number, channels, high, -1)
    return found.add_(0.5).floor_().clamp_(0, 255).byte()


def _to_bits(weights: Tensor, bits: int) -> Tensor:
    return (weights * 2**bits).round() / 2**bits


@contextmanager
def _exact_products(device: torch.device) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
