"""The residual addition and RMS norm by mamba-ssm's Triton kernels, or by ours where mamba_ssm cannot be imported.

The package's public functions keep their backward to themselves, so these are the two that they call; their arguments
are the same from mamba-ssm 2.2 to 2.3.2. They lie in a package whose import draws in transformers, and fails in some
releases with a current one: that is no reason to do without its scan, and is logged.
"""

from __future__ import annotations

import importlib
import logging
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from famba.errors import ConfigError
from famba.ops import triton

_log = logging.getLogger(__name__)
# One program holds a row of up to 64 KiB; the backward's are float32.
_MOST_CHANNELS = 2**14


@cache
def package() -> ModuleType | None:
    """mamba-ssm's module of norms; None where it cannot be imported."""
    try:
        return importlib.import_module("mamba_ssm.ops.triton.layer_norm")
    except Exception as error:  # an import of that size fails in many ways
        _log.warning("RMS norm by famba.ops.triton: mamba_ssm cannot be imported: %s", error)
        return None


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the normed sum and the sum."""
    layer_norm = package()
    if layer_norm is None:
        return triton.add_rms_norm(x, residual, weight, eps)
    if x.shape[2] > _MOST_CHANNELS:
        raise ConfigError(
            f"add_rms_norm: {x.shape[2]} channels, mamba-ssm takes at most {_MOST_CHANNELS}; use backend 'triton'"
        )
    if x.numel() == 0:
        return x.new_empty(x.shape), x.new_empty(x.shape, dtype=torch.float32)
    rows = _rows(x)
    before = None if residual is None else _rows(residual.to(torch.float32))
    normed, _, _, _, total, *_ = layer_norm._layer_norm_fwd(
        rows, weight.contiguous(), None, eps, before, residual_dtype=torch.float32, is_rms_norm=True
    )
    # Where nothing is added and nothing cast, the sum is the input itself, which an op must not return.
    total = total.clone() if total is rows else total
    return normed.view(x.shape), total.view(x.shape)


def add_rms_norm_backward(
    dnormed: Tensor, dtotal: Tensor, total: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of the sum and of weight."""
    layer_norm = package()
    if layer_norm is None:
        return triton.add_rms_norm_backward(dnormed, dtotal, total, weight, eps)
    if total.numel() == 0:
        return torch.zeros_like(total), torch.zeros_like(weight)
    rows = _rows(total)
    inverse = torch.rsqrt(torch.linalg.vector_norm(rows, dim=1).square() / rows.shape[1] + eps)
    grad, dweight, *_ = layer_norm._layer_norm_bwd(
        _rows(dnormed), rows, weight.contiguous(), None, eps, None, inverse, dresidual=_rows(dtotal), is_rms_norm=True
    )
    return grad.view(total.shape), dweight


def _rows(x: Tensor) -> Tensor:
    """(b, l, c) as (b l, c), contiguous."""
    return x.reshape(-1, x.shape[2]).contiguous()
