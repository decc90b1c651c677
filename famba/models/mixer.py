"""Vim's bidirectional Mamba mixer (Zhu et al. 2024, arXiv 2401.09417, Algorithm 1)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from famba.ops import Direction, bidirectional_mixer

_DELTA_RANGE = (0.001, 0.1)
_DELTA_FLOOR = 1e-4


class VimMixer(nn.Module):
    """Mixes tokens by two selective scans, one in each direction, each with its own parameters.

    Parameter names are those of the official checkpoints; d_inner = expand * d_model, dt_rank = ceil(d_model / 16).
    """

    def __init__(self, d_model: int, d_state: int = 16, d_conv: int = 4, expand: int = 2) -> None:
        super().__init__()
        self.d_inner = expand * d_model
        self.d_state = d_state
        self.dt_rank = math.ceil(d_model / 16)
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=False)
        # Forward, and with "_b" backward.
        self.conv1d, self.conv1d_b = (self._conv(d_conv) for _ in range(2))
        self.x_proj, self.x_proj_b = (self._projection() for _ in range(2))
        self.dt_proj, self.dt_proj_b = (nn.Linear(self.dt_rank, self.d_inner) for _ in range(2))
        self.A_log, self.A_b_log = (self._log_rates() for _ in range(2))
        self.D, self.D_b = (nn.Parameter(torch.ones(self.d_inner)) for _ in range(2))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

    def _conv(self, width: int) -> nn.Conv1d:
        return nn.Conv1d(self.d_inner, self.d_inner, width, groups=self.d_inner, padding=width - 1)

    def _projection(self) -> nn.Linear:
        return nn.Linear(self.d_inner, self.dt_rank + 2 * self.d_state, bias=False)

    def _log_rates(self) -> nn.Parameter:
        return nn.Parameter(torch.arange(1, self.d_state + 1).float().log().repeat(self.d_inner, 1))

    def init_weights(self, depth: int) -> None:
        """Initialise as Vim does: step sizes log-uniform in [0.001, 0.1], the output scaled by 1 / sqrt(depth)."""
        for projection in (self.dt_proj, self.dt_proj_b):
            nn.init.uniform_(projection.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
            low, high = (math.log(x) for x in _DELTA_RANGE)
            delta = torch.empty(self.d_inner).uniform_(low, high).exp().clamp(min=_DELTA_FLOOR)
            with torch.no_grad():
                projection.bias.copy_(delta + torch.log(-torch.expm1(-delta)))  # the inverse of softplus
        nn.init.kaiming_uniform_(self.out_proj.weight, a=math.sqrt(5))
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(depth)

    def forward(self, x: Float[Tensor, "b l d_model"]) -> Float[Tensor, "b l d_model"]:
        """Mix normed tokens (b, l, d_model)."""
        return bidirectional_mixer(x, self.in_proj.weight, *self._directions(), self.out_proj.weight)

    def scan(self, x: Float[Tensor, "b l d_model"]) -> Float[Tensor, "b l d_inner"]:
        """Everything but the output projection: the mean of the two gated scans (b, l, d_inner)."""
        return bidirectional_mixer(x, self.in_proj.weight, *self._directions())

    def _directions(self) -> tuple[Direction, Direction]:
        forward = (self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D)
        backward = (self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b)
        return self._direction(*forward), self._direction(*backward)

    def _direction(self, conv: nn.Conv1d, x_proj: nn.Linear, dt_proj: nn.Linear, A_log: Tensor, D: Tensor) -> Direction:
        assert conv.bias is not None
        A = -A_log.to(torch.promote_types(A_log.dtype, torch.float32)).exp()
        return Direction(conv.weight.squeeze(1), conv.bias, x_proj.weight, dt_proj.weight, dt_proj.bias, A, D)
