"""Change whole batches of images by Pillow's operations, with parameters of its own for each image.

Images are (n, 3, h, w) on any device, bytes that are floats within an operation. Arithmetic is whole numbers, or single
steps of IEEE arithmetic in Pillow's order, so every device makes the same picture.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int64, UInt8
from torch import Tensor

from famba.data.batch_policy import Step
from famba.ops.native import pictures


@dataclass(frozen=True)
class Geometry:
    """Says how moved images are filled and interpolated."""

    fill: tuple[int, int, int]  # colour of pixels that come from outside of the image, 0..255
    interpolation: str  # "bilinear" or "bicubic"


def change(pixels: UInt8[Tensor, "b 3 h w"], step: Step, geometry: Geometry, dtype: torch.dtype) -> None:
    """Apply an operation to some of the images, in place; dtype: of the arithmetic.

    Compiled kernels move pixels and look them up where they can be used; elsewhere the functions below do.
    """
    is_native, rows, kind = pictures.usable(pixels.device, dtype), step.rows, step.kind
    if is_native and kind == "move":
        return pictures.move(pixels, rows, step.values, geometry.fill, geometry.interpolation == "bicubic")
    images = pixels.index_select(0, rows).to(dtype)
    if kind in TABLES:
        tables = TABLES[kind](images, step.values)
        if is_native:
            return pictures.look_up(pixels, rows, tables)
        images = tables.expand(-1, 3, -1).gather(2, images.flatten(2).long()).view_as(images)
    elif kind == "move":
        images = move(images, step.values, geometry)
    else:
        images = BLENDS[kind](images, step.values)
    pixels.index_copy_(0, rows, images.byte())
    return None


def equalize(images: Float[Tensor, "n c h w"], _: Tensor) -> UInt8[Tensor, "n c 256"]:
    """Return tables that spread the values of each channel evenly, as `ImageOps.equalize` does."""
    pixels = images.flatten(2).long()
    counts = pixels.new_zeros(*pixels.shape[:2], 256).scatter_add_(2, pixels, torch.ones_like(pixels))
    last = counts.gather(2, pixels.amax(2, keepdim=True))
    step = (pixels.shape[2] - last) // 255
    table = (step // 2 + counts.cumsum(2) - counts) // step.clamp(min=1)
    return torch.where(step == 0, torch.arange(256, device=images.device), table.clamp(max=255)).byte()


def autocontrast(images: Float[Tensor, "n c h w"], _: Tensor) -> UInt8[Tensor, "n c 256"]:
    """Return tables that stretch each channel to 0..255, as `ImageOps.autocontrast` does, in float64 as there."""
    flat, values = images.flatten(2), torch.arange(256, device=images.device)
    low, high = (extreme(flat, 2, keepdim=True).double() for extreme in (torch.amin, torch.amax))
    scale = low.new_full((), 255) / (high - low).clamp(min=1)  # a tensor: torch divides numbers inexactly
    stretched = (values * scale).add_(-low * scale).clamp_(0, 255).byte()
    return torch.where(high > low, stretched, values.byte())


def contrast(images: Float[Tensor, "n c h w"], factor: Float64[Tensor, " n"]) -> UInt8[Tensor, "n 1 256"]:
    """Return tables that blend with the mean grey; a factor of 0 gives one grey, 1 the image."""
    total = _grey(images).sum((1, 2, 3), keepdim=True, dtype=torch.float64)
    mean = total / total.new_full((), images.shape[2] * images.shape[3])  # a tensor: CUDA divides by a number inexactly
    values = torch.arange(256, dtype=images.dtype, device=images.device).view(1, 1, 1, -1)
    return _blend((mean + 0.5).floor().to(images.dtype), values, factor)[:, 0].byte()


def color(images: Float[Tensor, "n c h w"], factor: Float64[Tensor, " n"]) -> Tensor:
    """Blend with the grey picture; a factor of 0 gives grey, 1 the image."""
    return _blend(_grey(images), images, factor)


def sharpness(images: Float[Tensor, "n c h w"], factor: Float64[Tensor, " n"]) -> Tensor:
    """Blend with a smooth picture, its border left as it was; a factor of 0 gives smooth, 1 the image."""
    lines = images[:, :, :-2] + images[:, :, 1:-1] + images[:, :, 2:]
    total = lines[..., :-2] + lines[..., 1:-1] + lines[..., 2:] + 4 * images[:, :, 1:-1, 1:-1]
    smooth = images.clone()
    smooth[:, :, 1:-1, 1:-1] = total.div_(13).add_(0.5).floor_()
    return _blend(smooth, images, factor)


def blur(images: Float[Tensor, "n c h w"], weights: Int64[Tensor, "n 3"]) -> Tensor:
    """Blur by three boxes each way, as `ImageFilter.GaussianBlur` does.

    weights: of a pixel, its neighbours and those beyond, of 2**24 in all.
    """
    pixels = images.long()
    own, near, far = weights.view(-1, 3, 1, 1, 1).unbind(1)
    for _ in range(2):
        for _ in range(3):
            first, last = pixels[..., :1], pixels[..., -1:]
            p = torch.cat([first, first, pixels, last, last], -1)
            total = own * pixels + near * (p[..., 1:-3] + p[..., 3:-1]) + far * (p[..., :-4] + p[..., 4:])
            pixels = (total + 2**23) >> 24
        pixels = pixels.transpose(2, 3)
    return pixels.to(images.dtype)


def move(images: Float[Tensor, "n c h w"], matrix: Float64[Tensor, "n 6"], geometry: Geometry) -> Tensor:
    """Take the pixel at (x, y) from (a x + b y + c, d x + e y + f), as `Image.transform` does; matrix: a to f."""
    high, wide = images.shape[2:]
    a, b, c, d, e, f = matrix[..., None, None].unbind(1)
    x, y = (torch.arange(side, dtype=torch.float64, device=images.device) + 0.5 for side in (wide, high))
    across, down = (p * x + q * y[:, None] + at for p, q, at in ((a, b, c), (d, e, f)))
    inside = (across >= 0) & (across < wide) & (down >= 0) & (down < high)
    (first_x, columns), (first_y, rows) = (
        _neighbours(*pair, geometry, images.dtype) for pair in ((across, wide), (down, high))
    )
    # Neighbours are at the same distance in memory for all pixels, so one index serves all sixteen; bytes fit a cache.
    padded = F.pad(images, (2,) * 4, mode="replicate").byte().flatten(2)
    corner = ((first_y + 1) * (wide + 4) + first_x + 1).flatten(1)[:, None].expand(-1, images.shape[1], -1)
    length = padded.shape[2] - 3 * (wide + 5)

    def neighbour(below: int, right: int) -> Tensor:
        start = (below + 1) * (wide + 4) + right + 1
        return padded.narrow(2, start, length).gather(2, corner).to(images.dtype).view_as(images)

    lines = (_sum(neighbour(y, x).mul_(part) for x, part in columns.items()).mul_(weight) for y, weight in rows.items())
    fill = column(geometry.fill, images.dtype, images.device)
    # Cut off as in Pillow, but a sum that rounding left just below a whole number is that number.
    return torch.where(inside[:, None], _sum(lines).add_(2**-10).clamp_(0, 255).floor_(), fill)


def _neighbours(
    place: Float64[Tensor, "n h w"], length: int, geometry: Geometry, dtype: torch.dtype
) -> tuple[Int64[Tensor, "n h w"], dict[int, Tensor]]:
    """Return the pixel to the left of each place, -1 to length - 1, and the weights of its neighbours, (n, 1, h, w)."""
    first = (place - 0.5).floor()
    taps = _taps((place - 0.5 - first).to(dtype)[:, None], geometry)
    return first.clamp_(-1, length - 1).long(), taps


def erase(
    images: Float[Tensor, "n c h w"], boxes: Int64[Tensor, "n 4"], content: Float[Tensor, "n _ _ _"]
) -> Float[Tensor, "n c h w"]:
    """Replace a box (top, left, height, width) of each image by its content."""
    top, left, height, width = boxes.view(-1, 4, 1, 1).unbind(1)
    y = torch.arange(images.shape[2], device=images.device)[:, None]
    x = torch.arange(images.shape[3], device=images.device)
    inside = (y >= top) & (y < top + height) & (x >= left) & (x < left + width)
    return torch.where(inside[:, None], content, images)


def column(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Float[Tensor, "c 1 1"]:
    """Return one value for each channel, without a copy from the host that would have to wait for the device."""
    return torch.stack([torch.full((1, 1), value, dtype=dtype, device=device) for value in values])


def _grey(images: Tensor) -> Tensor:
    red, green, blue = images.split(1, dim=1)  # sums stay below 2**24, so they are exact
    return (red * 19595).add_(green * 38470).add_(blue * 7471).add_(32768).div_(65536).floor_()


def _blend(other: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    mixed = (images - other).mul_(factor.to(images.dtype)[:, None, None, None]).add_(other)
    return mixed.clamp_(0, 255).floor_()  # cut off, not rounded, as in Pillow


def _taps(right: Tensor, geometry: Geometry) -> dict[int, Tensor]:
    """Map neighbours to weights, for places that are `right` of a pixel to the right of the pixel at 0."""
    left = 1 - right
    if geometry.interpolation == "bilinear":
        return {0: left, 1: right}
    both = left * right  # the kernel of Keys (1981) with a = -1
    return {-1: -both * left, 0: 1 - right * right * (1 + left), 1: 1 - left * left * (1 + right), 2: -both * right}


def _sum(terms: Iterable[Tensor]) -> Tensor:
    return functools.reduce(Tensor.add_, terms)


TABLES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "table": lambda _, tables: tables[:, None],
    "contrast": contrast,
    "equalize": equalize,
    "autocontrast": autocontrast,
}
"""Map operations on single values to functions of images, and a row of values for each, that return tables."""
BLENDS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"color": color, "sharpness": sharpness, "blur": blur}
"""Map operations to functions of images, and values for each, that return images."""
