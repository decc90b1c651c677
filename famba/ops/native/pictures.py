"""Scale and move pictures on CPUs by compiled kernels; `famba.data` does the same in torch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from famba.ops.native.library import Lookup, Motion, Scaling, call, obstacle


def usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the kernels can be used: on a CPU, for arithmetic in float32, where they were compiled."""
    return device.type == "cpu" and dtype == torch.float32 and obstacle() is None


def resample(images: Tensor, rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor]) -> Tensor:
    """Return weighted sums, uint8 (b, 3, s, s), of uint8 (b, 3, h, w).

    rows, columns: the first pixel of each sum, (b, s), from which all lie within, and weights, (b, s, taps); or (1, ...)
    for all images. Weights have 15 bits after the point in rows, 22 in columns.
    """
    number, _, height, width = images.shape
    given = []
    for (first, weights), bits in ((rows, 15), (columns, 22)):
        fixed = (weights * 2**bits).round().int()
        given += [x.expand(number, *x.shape[1:]).contiguous() for x in (first.int(), fixed)]
    side = rows[0].shape[1]
    out = torch.empty(number, 3, side, side, dtype=torch.uint8)
    sizes = {"batch": number, "height": height, "width": width, "size": side}
    taps = {"taps_down": given[1].shape[-1], "taps_across": given[3].shape[-1]}
    arrays = dict(zip(("first_rows", "rows", "first_columns", "columns"), given, strict=True))
    call("resample", Scaling, torch.float32, **sizes, **taps, images=images.contiguous(), **arrays, out=out)
    return out


def move(images: Tensor, rows: Tensor, matrices: Tensor, fill: tuple[int, int, int], bicubic: bool) -> None:
    """Take the pixel at (x, y) from (a x + b y + c, d x + e y + f), or from the fill, in the images at `rows`.

    images: contiguous uint8 (b, 3, h, w), changed in place. rows: int64 (n,), each once. matrices: float64 (n, 6), a to f.
    """
    height, width = images.shape[2:]
    sizes = {"count": len(rows), "height": height, "width": width, "bicubic": bicubic}
    colour = torch.tensor(fill, dtype=torch.uint8)
    call("move", Motion, torch.float32, **sizes, images=images, rows=rows, matrices=matrices.contiguous(), fill=colour)


def look_up(images: Tensor, rows: Tensor, tables: Tensor) -> None:
    """Replace each value by its entry in a table, in the images at `rows`.

    images, rows: as for `move`. tables: uint8 (n, 3, 256), or (n, 1, 256) for all colours.
    """
    given = {"images": images, "rows": rows, "tables": tables.expand(-1, 3, -1).contiguous()}
    call("look_up", Lookup, torch.float32, count=len(rows), area=images.shape[2:].numel(), **given)
