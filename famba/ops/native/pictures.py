"""Scale and move pictures on CPUs by compiled kernels; `famba.data` does the same in torch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from famba.ops.native.library import Motion, Scaling, call, obstacle


def usable(pictures: Tensor) -> bool:
    """Return whether the kernels can write these pictures: float32 on a CPU, where they were compiled."""
    return pictures.device.type == "cpu" and pictures.dtype == torch.float32 and obstacle() is None


def resample(images: Tensor, rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor], out: Tensor) -> Tensor:
    """Fill and return out, contiguous float32 (b, 3, s, s), with weighted sums of uint8 (b, 3, h, w).

    rows, columns: the first pixel of each sum, (b, s), from which all lie within, and weights, (b, s, taps); or (1, ...)
    for all images. Weights have 15 bits after the point in rows, 22 in columns.
    """
    number, _, height, width = images.shape
    given = []
    for (first, weights), bits in ((rows, 15), (columns, 22)):
        fixed = (weights * 2**bits).round().int()
        given += [x.expand(number, *x.shape[1:]).contiguous() for x in (first.int(), fixed)]
    sizes = {"batch": number, "height": height, "width": width, "size": out.shape[-1]}
    taps = {"taps_down": given[1].shape[-1], "taps_across": given[3].shape[-1]}
    arrays = dict(zip(("first_rows", "rows", "first_columns", "columns"), given, strict=True))
    call("resample", Scaling, out.dtype, **sizes, **taps, images=images.contiguous(), **arrays, out=out)
    return out


def move(images: Tensor, matrices: Tensor, fill: tuple[int, int, int], bicubic: bool) -> Tensor:
    """Return float32 (b, 3, h, w), whose pixels at (x, y) come from (a x + b y + c, d x + e y + f), or are the fill.

    matrices: float64 (b, 6), a to f.
    """
    number, _, height, width = images.shape
    out, colour = torch.empty(images.shape), torch.tensor(fill, dtype=torch.float32)
    sizes = {"batch": number, "height": height, "width": width, "bicubic": bicubic}
    given = {"images": images.contiguous(), "matrices": matrices.contiguous()}
    call("move", Motion, out.dtype, **sizes, **given, fill=colour, out=out)
    return out
