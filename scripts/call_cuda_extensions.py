"""Calls the real CUDA extensions through the adapter with CPU tensors: see build_cuda_extensions.sh.

A call that binds its arguments ends in the extension's own "is_cuda" check, any other in something else.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from famba.ops import availability, mamba_ssm
from famba.ops.availability import CAUSAL_CONV1D, MAMBA_SSM
from famba.ops.inputs import Direction, MixerInputs, ScanInputs

BATCH, LENGTH, CHANNELS, STATES, RANK, D_MODEL = 2, 17, 8, 4, 3, 6
REACHED = "is_cuda() to be true"


def main() -> int:
    """Return 0 where each call got as far as the check."""
    for extension in (CAUSAL_CONV1D, MAMBA_SSM):
        print(extension.package, extension.version(), "of", extension.load().__file__)
    print("obstacle:", availability.mamba_ssm_obstacle())
    failures = 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for name, call in {**_single(dtype), **_mixed(dtype)}.items():
            outcome = _outcome(call)
            failures += REACHED not in outcome
            print(f"{'ok    ' if REACHED in outcome else 'FAILED'} {dtype!s:15} {name}: {outcome}")
    print("every call reached the check" if failures == 0 else f"{failures} calls did not reach the check")
    return min(failures, 1)


def _outcome(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        # Without what torch appends: an invitation to improve the message.
        return f"{type(error).__name__}: {str(error).splitlines()[0].split('  (')[0]}"
    return "no error"


def _single(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    u, delta, z, dy = (torch.randn(BATCH, LENGTH, CHANNELS, dtype=dtype) for _ in range(4))
    B, C = (torch.randn(BATCH, LENGTH, STATES, dtype=dtype) for _ in range(2))
    A, D, bias, weight = -torch.rand(CHANNELS, STATES), *torch.randn(2, CHANNELS), torch.randn(CHANNELS, 4)
    gated = ScanInputs(u, delta, A, B, C, D, z, bias, True, False)
    plain = ScanInputs(u, delta, A, B, C, None, None, None, False, True)

    def backward(inputs: ScanInputs) -> object:
        scan = mamba_ssm._scan_inputs(inputs)
        ungated = None if scan.z is None else scan.u
        return mamba_ssm._run_scan_backward(scan, scan.u, ungated, u.new_empty(0))

    return {
        "scan": lambda: mamba_ssm.selective_scan(gated),
        "scan without D, gate and bias": lambda: mamba_ssm.selective_scan(plain),
        "scan backward": lambda: backward(gated),
        "scan backward without D, gate and bias": lambda: backward(plain),
        "convolution": lambda: mamba_ssm.causal_conv1d(u, weight, bias, True, False),
        "convolution backward": lambda: mamba_ssm.causal_conv1d_backward(dy, u, weight, bias, True, False),
        "convolution backward without bias": lambda: mamba_ssm.causal_conv1d_backward(dy, u, weight, None, False, True),
    }


def _mixed(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """The mixer's calls: each in turn the real one, with the others left out so that it is reached."""
    direction = Direction(
        torch.randn(CHANNELS, 4),
        torch.randn(CHANNELS),
        torch.randn(RANK + 2 * STATES, CHANNELS, dtype=dtype),
        torch.randn(CHANNELS, RANK, dtype=dtype),
        torch.randn(CHANNELS),
        -torch.rand(CHANNELS, STATES),
        torch.randn(CHANNELS),
    )
    x = torch.randn(BATCH, LENGTH, D_MODEL, dtype=dtype)
    in_weight, out_weight = torch.randn(2 * CHANNELS, D_MODEL).to(dtype), torch.randn(D_MODEL, CHANNELS).to(dtype)
    arguments = MixerInputs(x, in_weight, direction, direction, out_weight)
    shapes, float_shapes = mamba_ssm.mixer_kept_shapes(arguments.sizes)
    kept = [*(torch.zeros(shape, dtype=dtype) for shape in shapes), *(torch.zeros(shape) for shape in float_shapes)]

    def with_real(real: str, call: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            scan, (conv, conv_backward) = MAMBA_SSM.load(), availability.convolution()
            pair = (
                conv if real == "conv" else _left_out,
                conv_backward if real == "conv backward" else _left_out_backward,
            )
            namespace = SimpleNamespace(
                fwd=scan.fwd if real == "scan" else _left_out_scan,
                bwd=scan.bwd if real == "scan backward" else _left_out_scan_backward,
            )
            with (
                mock.patch.dict(sys.modules, {MAMBA_SSM.module: namespace}),
                mock.patch.object(mamba_ssm, "convolution", return_value=pair),
            ):
                return call()

        return run

    return {
        "mixer's convolution": with_real("conv", lambda: mamba_ssm.mixer(arguments)),
        "mixer's scan": with_real("scan", lambda: mamba_ssm.mixer(arguments)),
        "mixer's scan backward": with_real("scan backward", lambda: mamba_ssm.mixer_backward(x, arguments, kept)),
        "mixer's convolution backward": with_real(
            "conv backward", lambda: mamba_ssm.mixer_backward(x, arguments, kept)
        ),
    }


def _left_out(x: Tensor, *_: Any) -> Tensor:
    return torch.zeros_like(x)


def _left_out_backward(x: Tensor, weight: Tensor, bias: Tensor, *_: Any) -> Iterator[Tensor | None]:
    return iter([torch.zeros_like(x), torch.zeros_like(weight), torch.zeros_like(bias), None])


def _left_out_scan(u: Tensor, *_: Any) -> list[Tensor]:
    return [torch.zeros_like(u), u.new_zeros(0)]


def _left_out_scan_backward(*arguments: Any) -> list[Tensor]:
    u, delta, A, B, C, D, _, delta_bias, *_ = arguments
    return [torch.zeros_like(x) for x in (u, delta, A, B, C, D, delta_bias)]


if __name__ == "__main__":
    sys.exit(main())
