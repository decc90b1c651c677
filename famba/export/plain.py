"""famba's ops in torch's own, for programs that run where famba is not.

Each form takes what its op takes and returns the same. Those whose reference is already a sequence of whole-tensor
operations are their reference; a convolution is torch's; a scan is `famba.export.recurrence`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from famba.ops import reference

Recurrence = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, bool], Tensor]
"""From delta (b, l, d), delta u (b, l, d), A (d, n), B, C (b, l, n) and whether it runs backward to y (b, l, d)."""

Form = Callable[..., Any]


class PlainOps(TorchFunctionMode):
    """Within the block, famba's ops are computed by torch's own, so that tracing finds nothing else.

    recurrence: what computes the scan's states.
    """

    def __init__(self, recurrence: Recurrence) -> None:
        super().__init__()
        self._forms = _forms(recurrence)

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        form = self._forms.get(func)
        return func(*args, **(kwargs or {})) if form is None else form(*args, **(kwargs or {}))


def _forms(recurrence: Recurrence) -> dict[Any, Form]:
    """Each op's form; the last argument of an op names a backend, which does not matter here."""

    def selective_scan(
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        delta_bias: Tensor | None,
        delta_softplus: bool,
        reverse: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        if delta_bias is not None:
            delta = delta + delta_bias
        if delta_softplus:
            delta = F.softplus(delta)
        y = recurrence(delta, delta * u, A, B, C, reverse)
        if D is not None:
            y = y + D * u
        if z is not None:
            y = y * F.silu(z)
        return y, u.new_empty((0,))

    ops = torch.ops.famba
    return {
        ops.add_rms_norm.default: _without_backend(reference.add_rms_norm),
        ops.causal_conv1d.default: _causal_conv1d,
        ops.selective_scan.default: selective_scan,
        ops.match_tokens.default: _without_backend(reference.match_tokens),
        ops.fuse_tokens.default: _without_backend(reference.fuse_tokens),
    }


def _without_backend(function: Form) -> Form:
    return lambda *args: function(*args[:-1])


def _causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool, backend: str) -> Tensor:
    before = weight.shape[1] - 1
    padded = F.pad(x.transpose(1, 2), (0, before) if reverse else (before, 0))
    taps = (weight.flip(1) if reverse else weight).unsqueeze(1)
    y = F.conv1d(padded, taps, bias, groups=weight.shape[0]).transpose(1, 2)
    return F.silu(y) if silu else y
