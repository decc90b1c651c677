"""Compute what the backbone needs: torch custom ops, each with interchangeable backends."""

from famba.ops.add_rms_norm import add_rms_norm
from famba.ops.bidirectional_mixer import Direction, bidirectional_mixer
from famba.ops.causal_conv1d import causal_conv1d
from famba.ops.inputs import TokenMeasures
from famba.ops.registry import backends, use_backend
from famba.ops.selective_scan import selective_scan
from famba.ops.tokens import fuse_tokens, match_tokens

__all__ = [
    "Direction",
    "TokenMeasures",
    "add_rms_norm",
    "backends",
    "bidirectional_mixer",
    "causal_conv1d",
    "fuse_tokens",
    "match_tokens",
    "selective_scan",
    "use_backend",
]
