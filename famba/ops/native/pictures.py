"""Scale and move pictures on CPUs by compiled kernels; `famba.data` does the same in torch, on any device."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from famba.ops.native.library import Lookup, Motion, Scaling, call, obstacle

Span: TypeAlias = tuple[Tensor, int]
"""Give what is scaled along an axis, float64 (b, 4) or (1, 4), and its length when it is scaled."""


def usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the kernels can be used: on a CPU, for arithmetic in float32, where they were compiled."""
    return device.type == "cpu" and dtype == torch.float32 and obstacle() is None


def resample(images: Tensor, rows: Span, columns: Span, size: int, bicubic: bool) -> Tensor:
    """Return uint8 (b, 3, s, s): parts of uint8 (b, 3, h, w), scaled first across and then down.

    rows, columns: as in `famba.data.batch_resample`.
    """
    number, _, height, width = images.shape
    out = images.new_empty(number, 3, size, size)
    sizes = {"batch": number, "height": height, "width": width, "size": size, "bicubic": bicubic}
    spans = {"rows": rows[0].expand(number, 4).contiguous(), "columns": columns[0].expand(number, 4).contiguous()}
    scaled = {"down": rows[1], "across": columns[1]}
    call("resample", Scaling, torch.float32, **sizes, **spans, **scaled, images=images.contiguous(), out=out)
    return out


def move(images: Tensor, rows: Tensor, matrices: Tensor, fill: tuple[int, int, int], bicubic: bool) -> None:
    """Take the pixel at (x, y) from (a x + b y + c, d x + e y + f), or from the fill, in the images at `rows`.

    images: contiguous uint8 (b, 3, h, w), changed in place. rows: int64 (n,), each once. matrices: float64 (n, 6).
    """
    height, width = images.shape[2:]
    sizes = {"count": len(rows), "height": height, "width": width, "bicubic": bicubic}
    colour = images.new_tensor(fill)
    call("move", Motion, torch.float32, **sizes, images=images, rows=rows, matrices=matrices.contiguous(), fill=colour)


def look_up(images: Tensor, rows: Tensor, tables: Tensor) -> None:
    """Replace each value by its entry in a table, in the images at `rows`.

    images, rows: as for `move`. tables: uint8 (n, 3, 256), or (n, 1, 256) for all colours.
    """
    given = {"images": images, "rows": rows, "tables": tables.expand(-1, 3, -1).contiguous()}
    call("look_up", Lookup, torch.float32, count=len(rows), area=images.shape[2:].numel(), **given)
