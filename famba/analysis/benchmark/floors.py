"""The least that ops and steps have to do, and the floor that a GPU's published rates set under their time.

Counted are the bytes that go through device memory: each input read once, each output written once, what is worked out
in between kept on the chip. A kernel that reads twice is above its floor; an input in the cache may bring it below.
Shapes are (b, l, d), with n states for each channel; item is the bytes of an activation, parameters are float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from famba.models.vim import Vim, VimBlock
from famba.ops.selective_scan import scan_macs

_FP32, _INT64, _ADAMW_TENSORS, _WIDTH = 4, 8, 7, 4  # of AdamW: four tensors are read and three written
# Of each state in a backward scan: 3 instructions to work it out again, 2 for its adjoint, 3 for the gradients of B, C
# and delta u, 2 for that of the decay, 2 from there to those of delta and A.
_BACKWARD_VECTOR = 12


class Peaks(NamedTuple):
    """Peak rates of a GPU, each by the second.

    bandwidth: bytes of device memory. tensor: operations of dense 16-bit matrix products, two for each multiply-add.
    vector: float32 instructions on single numbers. special: exponentials, logarithms and reciprocals, 16 in a clock of
    a multiprocessor (CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions").
    """

    name: str
    bandwidth: float
    tensor: float
    vector: float
    special: float


# NVIDIA's data sheets of the A100 (2021), H100 (2023, where rates of tensor cores are given with sparsity: half of them
# without) and H200 (2024); multiprocessors and boost clocks of the architecture white papers. By torch's names.
BOARDS = {
    "A100-SXM4-40GB": Peaks("A100 SXM 40 GB", 1555e9, 312e12, 9.75e12, 16 * 108 * 1.41e9),
    "A100-SXM4-80GB": Peaks("A100 SXM 80 GB", 2039e9, 312e12, 9.75e12, 16 * 108 * 1.41e9),
    "A100-PCIE-40GB": Peaks("A100 PCIe 40 GB", 1555e9, 312e12, 9.75e12, 16 * 108 * 1.41e9),
    "A100 80GB PCIe": Peaks("A100 PCIe 80 GB", 1935e9, 312e12, 9.75e12, 16 * 108 * 1.41e9),
    "H100 80GB HBM3": Peaks("H100 SXM", 3350e9, 989.4e12, 33.45e12, 16 * 132 * 1.98e9),
    "H100 PCIe": Peaks("H100 PCIe", 2000e9, 756.4e12, 25.6e12, 16 * 114 * 1.755e9),
    "H200": Peaks("H200 SXM", 4800e9, 989.4e12, 33.45e12, 16 * 132 * 1.98e9),
}


def peaks(device: torch.device) -> Peaks | None:
    """Return a device's peaks by the name that torch has for it, None where they are not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return BOARDS.get(name.removeprefix("NVIDIA "))


class Work(NamedTuple):
    """The least that one pass over data does, in the units of `Peaks`; backward: whether it is of a backward."""

    bytes: int
    products: int = 0
    vector: int = 0
    special: int = 0
    backward: bool = False


def floor_ms(passes: Iterable[Work], limits: Peaks | None, precision: str) -> float | None:
    """Return the milliseconds of passes that wait for one another; in each the slowest unit decides.

    precision: "bf16", "fp16", or "fp32", whose products do without tensor cores, as torch has it.
    """
    if limits is None:
        return None
    products = 2 * limits.vector if precision == "fp32" else limits.tensor
    rates = (limits.bandwidth, products, limits.vector, limits.special)
    return 1000 * sum(max(amount / rate for amount, rate in zip(work, rates, strict=False)) for work in passes)


def scan(b: int, l: int, d: int, n: int, item: int, inner: bool = False, k: int = 1) -> list[Work]:  # noqa: E741
    """Count a scan in k directions with skip weights; as the mixer has it, with gate, softplus and bias, where `inner`.

    Directions share gate and result. The states that a kernel keeps for its backward are left out: they can be worked
    out again. Special functions of each token and channel: n exponentials, 2 for softplus (backward 3), 2 for the gate.
    """
    tokens, gate, values = b * l, int(inner), k * b * l * d
    weights = _FP32 * k * d * (n + 1 + gate)
    forward = tokens * item * (d * (2 * k + 1 + gate) + 2 * k * n) + weights
    backward = tokens * item * (d * (4 * k + 1 + 2 * gate) + 4 * k * n) + 2 * weights
    return [
        Work(forward, 0, k * scan_macs(b, l, d, n, skip=True, gate=inner), values * (n + 4 * gate)),
        Work(backward, 0, values * n * _BACKWARD_VECTOR, values * (n + 5 * gate), True),
    ]


def convolution(b: int, l: int, d: int, item: int, k: int = 1) -> list[Work]:  # noqa: E741
    """Count a convolution of width 4 in k directions, with bias and silu, whose argument is worked out again."""
    values, weights = b * l * d, _FP32 * k * d * (_WIDTH + 1)
    forward = Work(values * item * (1 + k) + weights, 0, values * k * _WIDTH, 2 * values * k)
    return [forward, Work(values * item * (2 + k) + 2 * weights, 0, 3 * values * k * _WIDTH, 2 * values * k, True)]


def norm(b: int, l: int, d: int, item: int, first: bool = False) -> list[Work]:  # noqa: E741
    """Count the addition to a float32 residual and the norm; `first` where no residual is there yet."""
    values, weight = b * l * d, _FP32 * d
    gradients = item if first or item == _FP32 else item + _FP32
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
    """A product y = x W^T with its backward: x (rows, inputs), W (outputs, inputs); needs_dx: of the backward."""

    rows: int
    inputs: int
    outputs: int
    needs_dx: bool = True

    def passes(self, item: int) -> list[Work]:
        """Count its up to three products, each of which reads two operands and writes one."""
        moved = item * (self.rows * (self.inputs + self.outputs) + self.inputs * self.outputs)
        one = Work(moved, 2 * self.rows * self.inputs * self.outputs)
        return [one] + [one._replace(backward=True)] * (1 + self.needs_dx)


def mixer_linears(rows: int, d_model: int, d: int, n: int, rank: int) -> list[Linear]:
    """Return the products of Vim's mixer."""
    both = [Linear(rows, d, rank + 2 * n), Linear(rows, rank, d)] * 2
    return [Linear(rows, d_model, 2 * d), *both, Linear(rows, d, d_model)]


def mixer(b: int, l: int, d_model: int, d: int, n: int, rank: int, item: int) -> list[Work]:  # noqa: E741
    """Count Vim's mixer: its products, and between them one pass for both convolutions and one for both scans."""
    multiplied = [work for one in mixer_linears(b * l, d_model, d, n, rank) for work in one.passes(item)]
    return multiplied + convolution(b, l, d, item, 2) + scan(b, l, d, n, item, True, 2)


def linears(model: Vim, batch: int) -> list[Linear]:
    """Return what a training step multiplies, in the order of the forward, for a model that fuses before its mixers."""
    kernel, tokens = model.patch_embed.proj.weight, model.num_tokens
    found = [Linear(batch * model.num_patches, kernel[0].numel(), len(kernel), needs_dx=False)]
    for layer in model.layers:
        assert isinstance(layer, VimBlock)
        tokens -= layer.fusion.r
        of = layer.mixer
        found += mixer_linears(batch * tokens, model.embed_dim, of.d_inner, of.d_state, of.dt_rank)
    if isinstance(model.head, nn.Linear):
        found.append(Linear(batch, model.head.in_features, model.head.out_features))
    return found


def step(model: Vim, batch: int, item: int) -> list[Work]:
    """Count a training step with AdamW; the passes of its forward alone are an inference.

    Left out: casts, position embedding, class token, mixing, loss, clipping and drop path.
    """
    d, tokens = model.embed_dim, model.num_tokens
    passes = [work for one in linears(model, batch) for work in one.passes(item)]
    for number, layer in enumerate(model.layers):
        assert isinstance(layer, VimBlock)
        passes += norm(batch, tokens, d, item, first=number == 0)
        if r := layer.fusion.r:
            passes += matching(batch, tokens, d, r, item)
            passes += fusing(batch, tokens, d, r, item) + fusing(batch, tokens, d, r, _FP32)
        tokens -= r
        inner, states = layer.mixer.d_inner, layer.mixer.d_state
        passes += convolution(batch, tokens, inner, item, 2) + scan(batch, tokens, inner, states, item, True, 2)
    update = _ADAMW_TENSORS * _FP32 * sum(weight.numel() for weight in model.parameters())
    return [*passes, *norm(batch, tokens, d, item), Work(update, backward=True)]
