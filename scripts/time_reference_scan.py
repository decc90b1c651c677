"""Time the reference scan against mamba.py's parallel scan, forward and forward plus backward, interleaved.

Needs `pip install mambapy`. Usage: python scripts/time_reference_scan.py [--rounds 9]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from famba.ops import selective_scan, use_backend

SHAPE = (8, 197, 384, 16)


def inputs() -> list[Tensor]:
    """Return u, delta, A, B, C and D for (batch, length, channels, states)."""
    batch, length, channels, states = SHAPE
    torch.manual_seed(0)
    tensors = [
        torch.randn(batch, length, channels),
        torch.rand(batch, length, channels) * 0.1,
        -16 * torch.rand(channels, states),
        torch.randn(batch, length, states),
        torch.randn(batch, length, states),
        torch.ones(channels),
    ]
    return [x.requires_grad_() for x in tensors]


def reference(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Return the scan of the reference backend."""
    return selective_scan(u, delta, A, B, C, D)


def mamba_py(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Return what mamba.py's block computes around its parallel scan."""
    from mambapy.pscan import pscan

    decay = torch.exp(delta.unsqueeze(-1) * A)
    drive = delta.unsqueeze(-1) * B.unsqueeze(2) * u.unsqueeze(-1)
    return (pscan(decay, drive) @ C.unsqueeze(-1)).squeeze(3) + D * u


def seconds(scan: Callable[..., Tensor], tensors: list[Tensor]) -> tuple[float, float]:
    """Time of the forward, and of forward plus backward."""
    begin = time.perf_counter()
    y = scan(*tensors)
    middle = time.perf_counter()
    y.sum().backward()
    return middle - begin, time.perf_counter() - begin


def main() -> None:
    """Print medians in milliseconds and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    tensors = inputs()
    times: dict[str, list[tuple[float, float]]] = {"reference": [], "mamba.py": []}
    with use_backend("reference"):
        torch.testing.assert_close(reference(*tensors), mamba_py(*tensors), rtol=1e-4, atol=1e-4)
        for _ in range(rounds + 1):
            times["reference"].append(seconds(reference, tensors))
            times["mamba.py"].append(seconds(mamba_py, tensors))
    print(f"(batch, length, channels, states) = {SHAPE}, float32")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    medians = {}
    for name, runs in times.items():
        medians[name] = [1000 * statistics.median(column) for column in zip(*runs[1:], strict=True)]
        print(f"{name:10} forward {medians[name][0]:7.1f} ms, forward and backward {medians[name][1]:7.1f} ms")
    ratios = [other / own for own, other in zip(medians["reference"], medians["mamba.py"], strict=True)]
    print(f"mamba.py takes {ratios[0]:.1f} times as long forward, {ratios[1]:.1f} times forward and backward")


if __name__ == "__main__":
    main()
