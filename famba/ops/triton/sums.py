"""Add up, in a fixed order, what the programs of a kernel each wrote down."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def column_sums(
    partials, rows, column, inside,
    COLUMNS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up the rows of a float32 matrix (rows, COLUMNS), at columns (BLOCK,) of which some are inside."""
    total = tl.zeros([BLOCK_ROWS, BLOCK], tl.float32)
    for first in range(0, rows, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        held = (row[:, None] < rows) & inside[None, :]
        total += tl.load(partials + row[:, None].to(tl.int64) * COLUMNS + column[None, :], mask=held, other=0.0)
    return tl.sum(total, 0)
