"""Count the least that ops and steps have to do, and the floor that a GPU's published rates set under their time.

Counted are the bytes through device memory: each input read once, each output written once, the rest kept on the chip
or worked out again. A kernel that reads twice is above its floor; an input in the cache may bring it below.
Activations are (b, l, d), item the bytes of a number in them, n the states of a channel, r the tokens removed, and k
the directions, which share gate and result; parameters are float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple, cast

import torch

from famba.models.vim import Vim, VimBlock
from famba.ops.selective_scan import scan_macs

_FP32, _INT64, _WIDTH = 4, 8, 4
# Of each state in a backward scan: 3 instructions to work it out again, 2 for its adjoint, 3 for the gradients of B, C
# and delta u, 2 for that of the decay, 2 from there to those of delta and A. AdamW reads four tensors and writes three.
_BACKWARD_VECTOR, _ADAMW_TENSORS = 12, 7


class Work(NamedTuple):
    """Count what one pass over data does at the least, or in `BOARDS` what a GPU can do in a second.

    bytes: through device memory. products: operations of 16-bit matrix products, two for each multiply-add. vector:
    float32 instructions on single numbers. special: exponentials, logarithms and reciprocals, of which a multiprocessor
    does 16 in a clock (CUDA C++ Programming Guide). backward: whether the pass is of a backward.
    """

    bytes: float
    products: float = 0
    vector: float = 0
    special: float = 0
    backward: bool = False


# By torch's names. NVIDIA's data sheets of the A100 (2021), H100 (2023, where rates of tensor cores are given with
# sparsity: half of them without) and H200 (2024); multiprocessors and clocks of the architecture white papers.
BOARDS = {
    "A100-SXM4-40GB": Work(1555e9, 312e12, 9.75e12, 16 * 108 * 1.41e9),
    "A100-SXM4-80GB": Work(2039e9, 312e12, 9.75e12, 16 * 108 * 1.41e9),
    "A100 80GB PCIe": Work(1935e9, 312e12, 9.75e12, 16 * 108 * 1.41e9),
    "H100 80GB HBM3": Work(3350e9, 989.4e12, 33.45e12, 16 * 132 * 1.98e9),
    "H100 PCIe": Work(2000e9, 756.4e12, 25.6e12, 16 * 114 * 1.755e9),
    "H200": Work(4800e9, 989.4e12, 33.45e12, 16 * 132 * 1.98e9),
}


def floor_ms(passes: Iterable[Work], board: Work, precision: str) -> float:
    """Return the milliseconds of passes that wait for one another; in each the slowest unit decides.

    Products in "fp32" do without tensor cores, as torch has it.
    """
    rates = (board.bytes, 2 * board.vector if precision == "fp32" else board.products, board.vector, board.special)
    return 1000 * sum(max(amount / rate for amount, rate in zip(work, rates, strict=False)) for work in passes)


def floor_here(passes: Iterable[Work], device: torch.device, precision: str) -> float | None:
    """Return the floor on a device, None where its rates are not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    board = BOARDS.get(name.removeprefix("NVIDIA "))
    return None if board is None else floor_ms(passes, board, precision)


def scan(b: int, l: int, d: int, n: int, item: int, inner: bool = False, k: int = 1) -> list[Work]:  # noqa: E741
    """Count a scan with skip weights; as the mixer has it, with gate, softplus and bias, where `inner`.

    Special functions of each token and channel: n exponentials, 2 for softplus (backward 3), 2 for the gate.
    """
    tokens, gate, values, weights = b * l, int(inner), k * b * l * d, _FP32 * k * d * (n + 1 + inner)
    forward = tokens * item * (d * (2 * k + 1 + gate) + 2 * k * n) + weights
    backward = tokens * item * (d * (4 * k + 1 + 2 * gate) + 4 * k * n) + 2 * weights
    return [
        Work(forward, 0, k * scan_macs(b, l, d, n, skip=True, gate=inner), values * (n + 4 * gate)),
        Work(backward, 0, values * n * _BACKWARD_VECTOR, values * (n + 5 * gate), True),
    ]


def convolution(b: int, l: int, d: int, item: int, k: int = 1) -> list[Work]:  # noqa: E741
    """Count a convolution of width 4 with bias and silu."""
    values, weights = b * l * d, _FP32 * k * d * (_WIDTH + 1)
    forward = Work(values * item * (1 + k) + weights, 0, values * k * _WIDTH, 2 * values * k)
    return [forward, Work(values * item * (2 + k) + 2 * weights, 0, 3 * values * k * _WIDTH, 2 * values * k, True)]


def norm(b: int, l: int, d: int, item: int, first: bool = False) -> list[Work]:  # noqa: E741
    """Count the addition to a float32 residual and the norm; `first` where no residual is there yet."""
    values, weight, gradients = b * l * d, _FP32 * d, item if first or item == _FP32 else item + _FP32
    forward = Work(values * (2 * item + _FP32 * (2 - first)) + weight)
    return [forward, Work(values * (item + 2 * _FP32 + gradients) + 2 * weight, backward=True)]


def matching(b: int, l: int, d: int, r: int, item: int) -> list[Work]:  # noqa: E741
    """Count a matching with one protected token; similarities are float32 multiply-adds and stay on the chip."""
    pairs = math.ceil((l - 1) / 2) * ((l - 1) // 2)
    return [Work(b * (l * (d * item + _INT64 + _FP32) + (l - r) * _FP32), vector=b * pairs * d)]


def fusing(b: int, l: int, d: int, r: int, item: int) -> list[Work]:  # noqa: E741
    """Count a fusing: tokens, places and shares are read, the fused tokens written; backward turned round."""
    moved = b * (2 * l - r) * d * item + b * l * (_INT64 + _FP32)
    return [Work(moved), Work(moved, backward=True)]


class Linear(NamedTuple):
    """Hold the sizes of y = x W^T: x (rows, inputs), W (outputs, inputs); needs_dx: whether its backward needs dx."""

    rows: int
    inputs: int
    outputs: int
    needs_dx: bool = True


def multiplying(linears: Iterable[Linear], item: int) -> list[Work]:
    """Count linears: up to three products each, of which each reads two operands and writes one."""
    passes = []
    for rows, inputs, outputs, needs_dx in linears:
        one = Work(item * (rows * (inputs + outputs) + inputs * outputs), 2 * rows * inputs * outputs)
        passes += [one] + [one._replace(backward=True)] * (1 + needs_dx)
    return passes


def mixer_linears(rows: int, d_model: int, d: int, n: int, rank: int) -> list[Linear]:
    """Return the products of Vim's mixer; `mixing` counts what is done between them."""
    both = [Linear(rows, d, rank + 2 * n), Linear(rows, rank, d)] * 2
    return [Linear(rows, d_model, 2 * d), *both, Linear(rows, d, d_model)]


def mixing(b: int, l: int, d: int, n: int, item: int) -> list[Work]:  # noqa: E741
    """Count one pass for both convolutions of a mixer, and one for both scans."""
    return convolution(b, l, d, item, 2) + scan(b, l, d, n, item, True, 2)


def step(model: Vim, batch: int, item: int) -> tuple[list[Work], list[Linear]]:
    """Count a training step with AdamW of a model that fuses before its mixers; return its products as well.

    Left out: casts, position embedding, class token, mixing of images, loss, clipping and drop path.
    """
    d, tokens, kernel, head = model.embed_dim, model.num_tokens, model.patch_embed.proj.weight, model.get_classifier()
    passes: list[Work] = []
    linears = [Linear(batch * model.num_patches, kernel[0].numel(), d, needs_dx=False)]
    for number, (layer, r) in enumerate(zip(cast(Iterable[VimBlock], model.layers), model.fusion, strict=True)):
        passes += norm(batch, tokens, d, item, first=number == 0)
        if r:
            passes += matching(batch, tokens, d, r, item)
            passes += fusing(batch, tokens, d, r, item) + fusing(batch, tokens, d, r, _FP32)
        tokens, of = tokens - r, layer.mixer
        passes += mixing(batch, tokens, of.d_inner, of.d_state, item)
        linears += mixer_linears(batch * tokens, d, of.d_inner, of.d_state, of.dt_rank)
    linears.append(Linear(batch, d, head.out_features))
    update = Work(_ADAMW_TENSORS * _FP32 * sum(weight.numel() for weight in model.parameters()), backward=True)
    return [*passes, *multiplying(linears, item), *norm(batch, tokens, d, item), update], linears
