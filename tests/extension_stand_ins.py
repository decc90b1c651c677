"""Stand-ins for the CUDA extensions of mamba-ssm and causal-conv1d: their checks, and the reference as arithmetic.

They take and refuse what the C++ does, but for the device, and give tensors of the strides and dtypes that it gives.
"""

from __future__ import annotations

import importlib
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
        found = reference.selective_scan_backward(_turn(dout), inputs, u.new_empty(0))
        du, ddelta, dA, dB, dC, dD, dgate, dbias = found
        grads = [
            torch.empty_like(u).copy_(_turn(du)),
            torch.empty_like(delta).copy_(_turn(ddelta)),
            dA,
            *(_turn(grad).unsqueeze(1).contiguous() for grad in (dB, dC)),
            dD,
            dbias,
        ]
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
        gate = None if z is None else _turn(z)
        return ScanInputs(
            _turn(u), _turn(delta), A, _turn(B[:, 0]), _turn(C[:, 0]), D, gate, delta_bias, softplus, False
        )

    def _run(self, *args: Any) -> Tensor:
        return _turn(reference.selective_scan(self._turned(*args))[0])

    @staticmethod
    def _states(u: Tensor, A: Tensor) -> Tensor:
        """Something of the right shape that only this input gives."""
        chunks = -(-u.shape[2] // STEPS_PER_CHUNK)
        return u.float().sum(2).reshape(*u.shape[:2], 1, 1).repeat(1, 1, chunks, 2 * A.shape[1])


class CausalConv1d(types.ModuleType):
    """`causal_conv1d_cuda`; `writes` since 1.5.1, where it fills memory that it is given."""

    def __init__(self, writes: bool) -> None:
        super().__init__("causal_conv1d_cuda")
        self.causal_conv1d_fwd = self._fwd_into if writes else self._fwd
        self.causal_conv1d_bwd = self._bwd_into if writes else self._bwd

    def _fwd(self, *args: Any) -> Tensor:
        x, weight, bias, seq_idx, initial_states, final_states_out, silu = args
        out = torch.empty_like(x)
        self._fwd_into(x, weight, bias, seq_idx, initial_states, out, final_states_out, silu)
        return out

    def _fwd_into(self, *args: Any) -> None:
        x, weight, bias, seq_idx, initial_states, out, final_states_out, silu = args
        self._check(x, weight, bias)
        demand(seq_idx is None and initial_states is None and final_states_out is None, "no states")
        out.copy_(_turn(reference.causal_conv1d(_turn(x), weight, bias, silu, False)))

    def _bwd(self, *args: Any) -> list[Tensor | None]:
        x, weight, bias, dout, seq_idx, initial_states, dfinal_states, dx, return_dinitial_states, silu = args
        demand(dx is None and not return_dinitial_states, "nothing else asked for")
        dx, dweight = torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32)
        dbias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        self._bwd_into(x, weight, bias, dout, seq_idx, initial_states, dfinal_states, dx, dweight, dbias, None, silu)
        return [dx, dweight.to(weight.dtype), None if dbias is None else dbias.to(bias.dtype), None]

    def _bwd_into(self, *args: Any) -> None:
        x, weight, bias, dout, seq_idx, initial_states, dfinal_states, dx, dweight, dbias, dinitial, silu = args
        self._check(x, weight, bias)
        demand(dout.shape == x.shape and dx.shape == x.shape and dx.dtype == x.dtype, "dout and dx like x")
        demand((bias is None) == (dbias is None), "bias_.has_value() == dbias_.has_value()")
        demand(all(s is None for s in (seq_idx, initial_states, dfinal_states, dinitial)), "no states")
        # The kernel reads dout as x's dtype, unchecked.
        demand(dout.dtype == x.dtype, "dout of x's dtype")
        gx, gweight, gbias = reference.causal_conv1d_backward(_turn(dout), _turn(x), weight, bias, silu, False)
        dx.copy_(_turn(gx))
        dweight += gweight
        if dbias is not None:
            dbias += gbias

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


def use_stand_ins(patch: pytest.MonkeyPatch, installed: bool) -> None:
    """Let the backend mamba_ssm serve CPU tensors: as of 2.2 and 1.4, or through the Python of what is installed."""
    release = availability.CAUSAL_CONV1D.version() if installed else None
    writes = release is not None and availability._numbers(release) >= (1, 5, 1)
    scan, conv = SelectiveScan("selective_scan_cuda"), CausalConv1d(writes)
    for module in (scan, conv):
        patch.setitem(sys.modules, module.__name__, module)
    forget_caches()
    if installed:
        # It keeps the extension that it found when it was first imported.
        functions = importlib.import_module("causal_conv1d.cpp_functions")
        patch.setattr(functions, conv.__name__, conv)
    else:
        pretend(patch, {"mamba-ssm": "2.2.2", "causal-conv1d": "1.4.0"})
        patch.setitem(sys.modules, "mamba_ssm", None)
    served = replace(registry._BACKENDS["mamba_ssm"], devices=("cpu",), obstacle=lambda: None)
    patch.setitem(registry._BACKENDS, "mamba_ssm", served)
