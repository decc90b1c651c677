"""The scan's states in whole-tensor operations: steps of all chunks at once, then the chunks one after the other.

A program of torch's own operations has no loop, so a scan over the length l would be l steps long. Cut into about
sqrt(l) chunks of about sqrt(l) steps, it is 2 sqrt(l) steps, and each state is touched three times; a scan of log2(l)
doubling steps would touch each 2 log2(l) times. Nothing is divided and no logarithm taken: decays that underflow to 0
are right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def chunked(delta: Tensor, gain: Tensor, A: Tensor, B: Tensor, C: Tensor, reverse: bool) -> Tensor:
    """Return y[t] = C[t] . h[t] of h[t] = exp(delta[t] A) h[t - 1] + gain[t] B[t], from the last to the first if asked.

    delta, gain, y (b, l, d); A (d, n); B, C (b, l, n).
    """
    length = delta.shape[1]
    steps = max(1, math.isqrt(length - 1) + 1)
    delta, gain, B, C = (_cut(x.flip(1) if reverse else x, steps) for x in (delta, gain, B, C))
    rates = A.t()  # (n, d): with the channels innermost every elementwise operation runs over contiguous memory
    decay = torch.exp(delta.unsqueeze(3) * rates)
    since_start = torch.exp(delta.cumsum(2).unsqueeze(3) * rates)
    alone = torch.stack(_run((gain.unsqueeze(3) * B.unsqueeze(4)).unbind(2), decay.unbind(2)), dim=2)
    ends = _run(alone[:, :, -1].unbind(1), since_start[:, :, -1].unbind(1))
    entering = torch.stack([torch.zeros_like(ends[0]), *ends[:-1]], dim=1)
    states = torch.addcmul(alone, since_start, entering.unsqueeze(2))
    y = torch.matmul(C.unsqueeze(3), states).squeeze(3).flatten(1, 2)[:, :length]
    return y.flip(1) if reverse else y


def _cut(x: Tensor, steps: int) -> Tensor:
    """Chunks (b, chunks, steps, channels) of (b, l, channels); what fills up the last one changes nothing."""
    chunks = -(-x.shape[1] // steps)
    return F.pad(x, (0, 0, 0, chunks * steps - x.shape[1])).unflatten(1, (chunks, steps))


def _run(gains: Sequence[Tensor], decays: Sequence[Tensor]) -> list[Tensor]:
    """States after each step, from one of zero."""
    states = [gains[0]]
    for gain, decay in zip(gains[1:], decays[1:], strict=True):
        states.append(torch.addcmul(gain, decay, states[-1]))
    return states
