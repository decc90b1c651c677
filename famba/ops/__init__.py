"""What the backbone computes: torch custom ops, each with interchangeable backends."""

from famba.ops.add_rms_norm import add_rms_norm
from famba.ops.causal_conv1d import causal_conv1d
from famba.ops.registry import backends, use_backend
from famba.ops.selective_scan import selective_scan

__all__ = ["add_rms_norm", "backends", "causal_conv1d", "selective_scan", "use_backend"]
