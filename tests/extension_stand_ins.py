"""Stand-ins for the CUDA extensions of mamba-ssm and causal-conv1d: their checks, and the reference as arithmetic.

They take and refuse what the C++ does, but for the device, and give tensors of the strides and dtypes that it gives.
"""

from __future__ import annotations

import importlib.metadata
import sys
import types
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from famba.ops import availability, reference, registry
from famba.ops.inputs import ScanInputs

HALF_OR_FLOAT = (torch.float32, torch.float16, torch.bfloat16)
STEPS_PER_CHUNK = 2048


def demand(condition: bool, text: str) -> None:
    if not condition:
        raise RuntimeError(f"Expected {text} to be true, but got false.")


class SelectiveScan(types.ModuleType):
    """`selective_scan_cuda`, as of mamba-ssm 2.2 to 2.3.2, for B and C of one group."""

    def __init__(self) -> None:
        super().__init__("selective_scan_cuda")

    def fwd(self, *args: Any) -> list[Tensor]:
        u, delta, A, B, C, D, z, delta_bias, _ = args
        self._check(u, delta, A, B, C, D, z, delta_bias)
        results = [torch.empty_like(delta).copy_(self._run(*args[:6], None, *args[7:])), self._states(u, A)]
        return results if z is None else [*results, torch.empty_like(z).copy_(self._run(*args))]

    def bwd(self, *args: Any) -> list[Tensor | None]:
        u, delta, A, B, C, D, z, delta_bias, dout, x, out, dz, delta_softplus, recompute_out_z = args
        self._check(u, delta, A, B, C, D, z, delta_bias)
        demand(dout.dtype == u.dtype and dout.shape == u.shape, "dout like u")
        demand(dout.stride(-1) == 1 or dout.shape[-1] == 1, "dout.stride(-1) == 1")
        demand(dz is None and not recompute_out_z, "dz is None")
        if u.shape[2] > STEPS_PER_CHUNK or x is not None:
            demand(x is not None and x.is_contiguous() and torch.equal(x, self._states(u, A)), "x from fwd")
        if z is not None:
            demand(out is not None and out.dtype == u.dtype and out.shape == u.shape, "out like u")
            demand(torch.allclose(out, self._run(*args[:6], None, delta_bias, delta_softplus)), "out before the gate")
        inputs = self._turned(*args[:8], delta_softplus)
        du, ddelta, dA, dB, dC, dD, dgate, dbias = reference.selective_scan_backward(_turn(dout), inputs, u[0, 0, :0])
        like = [torch.empty_like(x).copy_(_turn(grad)) for x, grad in ((u, du), (delta, ddelta))]
        grads = [*like, dA, *(_turn(grad).unsqueeze(1).contiguous() for grad in (dB, dC)), dD, dbias]
        return grads if z is None else [*grads, torch.empty_like(z).copy_(_turn(dgate))]

    def _check(self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *optional: Any) -> None:
        D, z, delta_bias = optional
        batch, channels, length = u.shape
        demand(u.dtype in HALF_OR_FLOAT, "a known input type")
        demand(A.dtype == torch.float32 and A.shape[0] == channels and A.shape[1] <= 256, "A of float32")
        for x in (delta, z):
            demand(x is None or (x.dtype == u.dtype and x.shape == u.shape), "delta and z like u")
        for x in (B, C):
            demand(x.dtype == u.dtype and x.shape == (batch, 1, A.shape[1], length), "B and C of four axes")
        for x in (u, delta, B, C, z, D, delta_bias):
            demand(x is None or x.stride(-1) == 1 or x.shape[-1] == 1, "stride(-1) == 1")
        for x in (D, delta_bias):
            demand(x is None or (x.dtype == torch.float32 and x.shape == (channels,)), "float32 of (d,)")
        if length % 128 == 0:
            for x in (u, delta, B, C, z):
                demand(x is None or x.data_ptr() % 16 == 0, "addresses that vectors are read from")

    @staticmethod
    def _turned(*args: Any) -> ScanInputs:
        u, delta, A, B, C, D, z, delta_bias, softplus = args
        tokens = (_turn(u), _turn(delta), A, _turn(B[:, 0]), _turn(C[:, 0]))
        return ScanInputs(*tokens, D, None if z is None else _turn(z), delta_bias, softplus, False)

    def _run(self, *args: Any) -> Tensor:
        return _turn(reference.selective_scan(self._turned(*args))[0])

    @staticmethod
    def _states(u: Tensor, A: Tensor) -> Tensor:
        """Something of the right shape that only this input gives."""
        chunks = -(-u.shape[2] // STEPS_PER_CHUNK)
        return u.float().sum(2).reshape(*u.shape[:2], 1, 1).repeat(1, 1, chunks, 2 * A.shape[1])


class CausalConv1d(types.ModuleType):
    """`causal_conv1d_cuda` to 1.5.0, or `causal_conv1d.cpp_functions` since: the same functions by other names."""

    def __init__(self, name: str = "causal_conv1d_cuda") -> None:
        super().__init__(name)
        self.causal_conv1d_fwd = self.causal_conv1d_fwd_function = self._fwd
        self.causal_conv1d_bwd = self.causal_conv1d_bwd_function = self._bwd

    def _fwd(self, *args: Any) -> Tensor:
        x, weight, bias, *states, silu = args
        self._check(x, weight, bias)
        demand(states == [None] * 3, "no states")
        return torch.empty_like(x).copy_(_turn(reference.causal_conv1d(_turn(x), weight, bias, silu, False)))

    def _bwd(self, *args: Any) -> list[Tensor | None]:
        x, weight, bias, dout, *states, return_dinitial_states, silu = args
        self._check(x, weight, bias)
        demand(states == [None] * 4 and not return_dinitial_states, "no states, and nothing else asked for")
        # The kernel reads dout as x's dtype, unchecked.
        demand(dout.shape == x.shape and dout.dtype == x.dtype, "dout like x")
        dx, dweight, dbias = reference.causal_conv1d_backward(_turn(dout), _turn(x), weight, bias, silu, False)
        return [torch.empty_like(x).copy_(_turn(dx)), dweight, dbias, None]

    def _check(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        demand(x.dtype in HALF_OR_FLOAT and weight.dtype in HALF_OR_FLOAT, "known types")
        demand(weight.shape[0] == x.shape[1] and 2 <= weight.shape[1] <= 4, "width between 2 and 4")
        demand(x.stride(2) == 1 or x.stride(1) == 1, "x.stride(2) == 1 || x.stride(1) == 1")
        demand(not (x.stride(1) == 1 and x.stride(2) > 1), "steps side by side, the layout of the adapter")
        if bias is not None:
            demand(bias.dtype == weight.dtype and bias.shape == weight.shape[:1], "bias of weight's dtype")
            demand(bias.stride(-1) == 1, "bias.stride(-1) == 1")


def _turn(x: Tensor) -> Tensor:
    return x.transpose(-1, -2)


def pretend(patch: pytest.MonkeyPatch, versions: dict[str, str | None]) -> None:
    """Let these versions be installed, None for none; others as they are."""
    real = importlib.metadata.version

    def version(name: str) -> str:
        found = versions[name] if name in versions else real(name)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    patch.setattr(importlib.metadata, "version", version)


def forget_caches() -> None:
    availability.mamba_ssm_obstacle.cache_clear()
    availability.convolution.cache_clear()


def use_stand_ins(patch: pytest.MonkeyPatch, release: str) -> None:
    """Let the backend mamba_ssm serve CPU tensors, with this release of causal-conv1d."""
    for module in (SelectiveScan(), CausalConv1d(), CausalConv1d("causal_conv1d.cpp_functions")):
        patch.setitem(sys.modules, module.__name__, module)
    forget_caches()
    pretend(patch, {"mamba-ssm": "2.2.2", "causal-conv1d": release})
    patch.setitem(sys.modules, "mamba_ssm", None)
    served = replace(registry._BACKENDS["mamba_ssm"], devices=("cpu",), obstacle=lambda: None)
    patch.setitem(registry._BACKENDS, "mamba_ssm", served)
