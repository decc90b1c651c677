"""Stand-ins for the CUDA extensions of mamba-ssm and causal-conv1d: their checks, and the reference as arithmetic.

They take and refuse what the C++ does, but for the device, and give tensors of the strides and dtypes that it gives.
"""

from __future__ import annotations

import importlib.metadata
import sys
import types
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
    """`selective_scan_cuda`, as of mamba-ssm 2.2 to 2.3.2; `calls` lists (name, strides of u, groups, has a gate)."""

    def __init__(self) -> None:
        super().__init__("selective_scan_cuda")
        self.calls: list[tuple[str, tuple[int, ...], int, bool]] = []

    def fwd(self, *args: Any) -> list[Tensor]:
        u, delta, A, B, C, D, z, delta_bias, delta_softplus = args
        self._check("fwd", u, delta, A, B, C, D, z, delta_bias)
        out = torch.empty_like(delta)
        out.copy_(self._run(u, delta, A, B, C, D, None, delta_bias, delta_softplus))
        if z is None:
            return [out, self._states(u, A)]
        gated = torch.empty_like(z)
        gated.copy_(self._run(u, delta, A, B, C, D, z, delta_bias, delta_softplus))
        return [out, self._states(u, A), gated]

    def bwd(self, *args: Any) -> list[Tensor | None]:
        u, delta, A, B, C, D, z, delta_bias, dout, x, out, dz, delta_softplus, recompute_out_z = args
        self._check("bwd", u, delta, A, B, C, D, z, delta_bias)
        demand(dout.dtype == u.dtype and dout.shape == u.shape, "dout like u")
        demand(dout.stride(-1) == 1 or dout.shape[-1] == 1, "dout.stride(-1) == 1")
        demand(dz is None and not recompute_out_z, "dz is None")
        if -(-u.shape[2] // STEPS_PER_CHUNK) > 1 or x is not None:
            demand(x is not None and x.is_contiguous() and torch.equal(x, self._states(u, A)), "x from fwd")
        if z is not None:
            demand(out is not None and out.dtype == u.dtype and out.shape == u.shape, "out like u")
            ungated = self._run(u, delta, A, B, C, D, None, delta_bias, delta_softplus)
            demand(torch.allclose(out, ungated), "out from before the gate")
        groups, parts = B.shape[1], []
        for g in range(groups):
            d = slice(g * u.shape[1] // groups, (g + 1) * u.shape[1] // groups)
            inputs = [_turn(u[:, d]), _turn(delta[:, d]), A[d], _turn(B[:, g]), _turn(C[:, g])]
            inputs += [_part(D, d), None if z is None else _turn(z[:, d]), _part(delta_bias, d)]
            parts.append(
                reference.selective_scan_backward(
                    _turn(dout[:, d]), ScanInputs(*inputs, delta_softplus, False), u.new_empty(0)
                )
            )
        du, ddelta, dA, dB, dC, dD, dgate, dbias = zip(*parts, strict=True)
        grads = [
            torch.empty_like(u).copy_(_turn(torch.cat(du, -1))),
            torch.empty_like(delta).copy_(_turn(torch.cat(ddelta, -1))),
            torch.cat(dA),
            torch.zeros_like(B, dtype=torch.float32).copy_(_turn(torch.stack(dB, 1))).to(B.dtype),
            torch.zeros_like(C, dtype=torch.float32).copy_(_turn(torch.stack(dC, 1))).to(C.dtype),
            None if D is None else torch.cat(dD),
            None if delta_bias is None else torch.cat(dbias),
        ]
        return grads if z is None else [*grads, torch.empty_like(z).copy_(_turn(torch.cat(dgate, -1)))]

    def _check(self, name: str, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *optional: Any) -> None:
        D, z, delta_bias = optional
        batch, channels, length = u.shape
        self.calls.append((name, u.stride(), B.shape[1], z is not None))
        demand(u.dtype in HALF_OR_FLOAT, "a known input type")
        demand(A.dtype == torch.float32 and A.shape[0] == channels and A.shape[1] <= 256, "A of float32")
        for x in (delta, z):
            demand(x is None or (x.dtype == u.dtype and x.shape == u.shape), "delta and z like u")
        for x in (B, C):
            demand(x.dtype == u.dtype and x.shape == (batch, B.shape[1], A.shape[1], length), "B and C of four axes")
            demand(channels % x.shape[1] == 0, "groups of equal size")
        for x in (u, delta, B, C, z):
            demand(x is None or x.stride(-1) == 1 or x.shape[-1] == 1, "stride(-1) == 1")
        for x in (D, delta_bias):
            demand(x is None or (x.dtype == torch.float32 and x.shape == (channels,)), "float32 of (d,)")
            demand(x is None or x.stride(-1) == 1 or x.shape[-1] == 1, "stride(-1) == 1")
        if length % 128 == 0:
            for x in (u, delta, B, C, z):
                demand(x is None or x.data_ptr() % 16 == 0, "addresses that vectors are read from")

    def _run(
        self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Any, z: Any, bias: Any, softplus: bool
    ) -> Tensor:
        groups, parts = B.shape[1], []
        for g in range(groups):
            d = slice(g * u.shape[1] // groups, (g + 1) * u.shape[1] // groups)
            inputs = [_turn(u[:, d]), _turn(delta[:, d]), A[d], _turn(B[:, g]), _turn(C[:, g])]
            gate = None if z is None else _turn(z[:, d])
            one = ScanInputs(*inputs, _part(D, d), gate, _part(bias, d), softplus, False)
            parts.append(reference.selective_scan(one)[0])
        return _turn(torch.cat(parts, -1))

    @staticmethod
    def _states(u: Tensor, A: Tensor) -> Tensor:
        """Something of the right shape that only this input gives."""
        batch, channels, length = u.shape
        chunks = -(-length // STEPS_PER_CHUNK)
        return u.float().sum(2).reshape(batch, channels, 1, 1).repeat(1, 1, chunks, 2 * A.shape[1])


class CausalConv1d(types.ModuleType):
    """`causal_conv1d_cuda`; `writes` since 1.5.1, where it fills memory that it is given. `calls` lists the names."""

    def __init__(self, writes: bool) -> None:
        super().__init__("causal_conv1d_cuda")
        self.calls: list[str] = []
        self.causal_conv1d_fwd = self._fwd_into if writes else self._fwd
        self.causal_conv1d_bwd = self._bwd_into if writes else self._bwd

    def _fwd(self, *args: Any) -> Tensor:
        x, weight, bias, seq_idx, initial_states, final_states_out, silu = args
        out = torch.empty_like(x)
        self._fwd_into(x, weight, bias, seq_idx, initial_states, out, final_states_out, silu)
        return out

    def _fwd_into(self, *args: Any) -> None:
        x, weight, bias, seq_idx, initial_states, out, final_states_out, silu = args
        self._check("fwd", x, weight, bias)
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
        self._check("bwd", x, weight, bias)
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

    def _check(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.calls.append(name)
        demand(x.dtype in HALF_OR_FLOAT and weight.dtype in HALF_OR_FLOAT, "known types")
        demand(weight.shape[0] == x.shape[1] and 2 <= weight.shape[1] <= 4, "width between 2 and 4")
        demand(x.stride(2) == 1 or x.stride(1) == 1, "x.stride(2) == 1 || x.stride(1) == 1")
        demand(not (x.stride(1) == 1 and x.stride(2) > 1), "steps side by side, the layout of the adapter")
        if bias is not None:
            demand(bias.dtype == weight.dtype and bias.shape == weight.shape[:1], "bias of weight's dtype")
            demand(bias.stride(-1) == 1, "bias.stride(-1) == 1")


def _turn(x: Tensor) -> Tensor:
    return x.transpose(-1, -2)


def _part(x: Tensor | None, channels: slice) -> Tensor | None:
    return None if x is None else x[channels]


class Extensions:
    """The stand-ins in use, and whether the installed packages' Python is what calls them."""

    def __init__(self, installed: bool) -> None:
        self.installed = installed
        release = availability.CAUSAL_CONV1D.version() if installed else None
        writes = release is not None and availability._numbers(release) >= (1, 5, 1)
        self.scan, self.conv = SelectiveScan(), CausalConv1d(writes)

    def forget(self) -> None:
        self.scan.calls.clear()
        self.conv.calls.clear()


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


def use_stand_ins(patch: pytest.MonkeyPatch, installed: bool) -> Extensions:
    """Let the backend mamba_ssm serve CPU tensors: as of 2.2 and 1.4, or through the Python of what is installed."""
    made = Extensions(installed)
    for module in (made.scan, made.conv):
        patch.setitem(sys.modules, module.__name__, module)
    forget_caches()
    if installed:
        # It keeps the extension that it found when it was first imported.
        functions = importlib.import_module("causal_conv1d.cpp_functions")
        patch.setattr(functions, made.conv.__name__, made.conv)
    if not installed:
        pretend(patch, {"mamba-ssm": "2.2.2", "causal-conv1d": "1.4.0"})
        patch.setitem(sys.modules, "mamba_ssm", None)
    serving = registry.Backend("famba.ops.mamba_ssm", ("cpu",), lambda: None, HALF_OR_FLOAT)
    patch.setitem(registry._BACKENDS, "mamba_ssm", serving)
    return made
