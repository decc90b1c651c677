"""Launch the kernels of `src/conv.cu`, which says how the causal depthwise convolution is done.

The backward keeps nothing of the forward: it works out again what entered silu.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from famba.ops.cuda.launch import TYPES, Constants, Launch
from famba.ops.cuda.scan import column_sums
from famba.ops.directional import Convolution
from famba.ops.inputs import optional_parameter, parameter

_THREADS = 64
# Steps that a thread walks over, at most: enough to make little of those that it reads beside them.
_STEPS = 28


def convolve(convolution: Convolution, y: Tensor) -> None:
    """Write results, in one launch."""
    _launch("conv_forward", convolution, y=y)


def convolve_backward(
    dys: Tensor, convolution: Convolution, dx: Tensor, dweights: Sequence[Tensor], dbiases: Sequence[Tensor | None]
) -> None:
    """Write gradients, in one launch, and one that adds up sums."""
    batch, length, channels = dx.shape
    slots = dweights[0].shape[1] + 1
    partials = dx.new_empty(len(dweights) * batch * _chunks(length), slots, channels, dtype=torch.float32)
    _launch("conv_backward", convolution, dys=dys, dx=dx, partials=partials)
    column_sums(partials, dweights, dbiases)


def _launch(kernel: str, convolution: Convolution, **tensors: Tensor) -> None:
    """Launch a kernel that takes the structure `Conv`; tensors: y, dys, dx and partials."""
    x, weights, biases, silu, reverses = convolution
    y, dys, dx, partials = (tensors.get(name) for name in ("y", "dys", "dx", "partials"))
    batch, length, channels = x.shape
    width, chunks = weights[0].shape[1], _chunks(length)
    # Two channels side by side in one word, where every row begins at a word.
    even = all(t is None or t.stride(-2) % 2 == t.storage_offset() % 2 == 0 for t in (x, y, dys, dx))
    lanes = 2 if channels % 2 == 0 and even else 1
    rows = {"X_ROW": x.stride(1), "DX_ROW": 0 if dx is None else dx.stride(1)}
    how = {"SILU": silu, "AHEAD": not all(reverses), "BACK": any(reverses), "WIDTH": width, "LANES": lanes}
    constants: Constants = {"T": TYPES[x.dtype], "CHANNELS": channels, **rows, **how}
    # Of each direction, or the same twice.
    given = [parameter(weight) for weight in weights], [optional_parameter(bias) for bias in biases]
    pairs = [x for each in (*given, *(t if t is not None else [None] for t in (y, dys))) for x in (each[0], each[-1])]
    numbers = (batch, length, chunks, batch * chunks * (width + 1) * channels)
    grid = (batch * chunks * -(-channels // (_THREADS * lanes)), 1)
    Launch("conv.cu", kernel, constants, grid, _THREADS, (x, *pairs, dx, partials, *numbers)).run()


def _chunks(length: int) -> int:
    return -(-length // _STEPS)
