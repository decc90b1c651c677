"""What GPUs can do at best, as their makers publish it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

# Reciprocals, logarithms and exponentials that a multiprocessor evaluates in a clock: CUDA C++ Programming Guide,
# "Throughput of Native Arithmetic Instructions", compute capabilities 7.0 to 9.0.
_SPECIAL_PER_CLOCK = 16


@dataclass(frozen=True)
class Peaks:
    """Peak rates of a device, each by the second.

    bandwidth: bytes of device memory. products: operations of dense matrix products, two for each multiply-add, by
    precision; empty where not known. vector: float32 instructions on single numbers, a multiply-add being one;
    special: exponentials, logarithms and reciprocals; both None where not known.
    """

    name: str
    bandwidth: float
    products: Mapping[str, float] = field(default_factory=dict)
    vector: float | None = None
    special: float | None = None


def _board(name: str, gb_per_s: float, tensor_tflops: float, fp32_tflops: float, processors: int, mhz: int) -> Peaks:
    # float32 products run without tensor cores, as torch does by default.
    products = {"fp32": fp32_tflops * 1e12, "bf16": tensor_tflops * 1e12, "fp16": tensor_tflops * 1e12}
    special = _SPECIAL_PER_CLOCK * processors * mhz * 1e6
    return Peaks(name, gb_per_s * 1e9, products, fp32_tflops * 1e12 / 2, special)


# NVIDIA A100 Tensor Core GPU data sheet (2021); H100 Tensor Core GPU data sheet (2023), where peaks of tensor cores
# are given with sparsity: half of them without; H200 Tensor Core GPU data sheet (2024). Multiprocessors and boost
# clocks: NVIDIA A100 and H100 Tensor Core GPU Architecture white papers.
_BOARDS = {
    "A100-SXM4-40GB": _board("A100 SXM 40 GB", 1555, 312, 19.5, 108, 1410),
    "A100-SXM4-80GB": _board("A100 SXM 80 GB", 2039, 312, 19.5, 108, 1410),
    "A100-PCIE-40GB": _board("A100 PCIe 40 GB", 1555, 312, 19.5, 108, 1410),
    "A100 80GB PCIe": _board("A100 PCIe 80 GB", 1935, 312, 19.5, 108, 1410),
    "H100 80GB HBM3": _board("H100 SXM", 3350, 989.4, 66.9, 132, 1980),
    "H100 PCIe": _board("H100 PCIe", 2000, 756.4, 51.2, 114, 1755),
    "H200": _board("H200 SXM", 4800, 989.4, 66.9, 132, 1980),
}
A100 = _BOARDS["A100-SXM4-80GB"]
H100 = _BOARDS["H100 80GB HBM3"]


def peaks(device: torch.device, gb_per_s: float | None = None, cuda: Any = torch.cuda) -> Peaks | None:
    """Look up a device's peaks by its name; None where not even the bandwidth of its memory is known.

    gb_per_s: instead of the bandwidth that is published, in 10^9 bytes a second. Of a CUDA device that is not in the
    table the bandwidth is worked out from clock and width of its memory, where torch tells them.
    """
    name = cuda.get_device_name(device) if device.type == "cuda" else device.type
    known = named_peaks(name, gb_per_s)
    return known or (_from_properties(name, cuda.get_device_properties(device)) if device.type == "cuda" else None)


def named_peaks(name: str, gb_per_s: float | None = None) -> Peaks | None:
    """The peaks of a board by the name that torch has for it; arguments and result otherwise as of `peaks`."""
    known = _BOARDS.get(name.removeprefix("NVIDIA "))
    if gb_per_s is None:
        return known
    return replace(known, name=name, bandwidth=gb_per_s * 1e9) if known else Peaks(name, gb_per_s * 1e9)


def _from_properties(name: str, properties: Any) -> Peaks | None:
    khz, bits = (getattr(properties, key, 0) for key in ("memory_clock_rate", "memory_bus_width"))
    # Two transfers in a clock, as all memory of GPUs has it.
    return Peaks(name, 2 * khz * 1e3 * bits / 8) if khz and bits else None
