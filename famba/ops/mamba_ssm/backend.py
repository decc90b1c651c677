"""The functions of the backend "mamba_ssm".

Not reproducible to the bit: mamba-ssm's backward scan, and causal-conv1d's backward convolution unless torch is asked
for deterministic algorithms, add partial sums in whatever order they arrive.
"""

from famba.ops.mamba_ssm.kernels import (
    causal_conv1d,
    causal_conv1d_backward,
    scan_state_shape,
    selective_scan,
    selective_scan_backward,
)
from famba.ops.mamba_ssm.mixer import mixer, mixer_backward, mixer_kept_shapes
from famba.ops.mamba_ssm.norm import add_rms_norm, add_rms_norm_backward

# Neither package knows of tokens that fuse. Both need Triton themselves.
from famba.ops.triton import fuse_tokens, fuse_tokens_backward, match_tokens

__all__ = [
    "add_rms_norm",
    "add_rms_norm_backward",
    "causal_conv1d",
    "causal_conv1d_backward",
    "fuse_tokens",
    "fuse_tokens_backward",
    "match_tokens",
    "mixer",
    "mixer_backward",
    "mixer_kept_shapes",
    "scan_state_shape",
    "selective_scan",
    "selective_scan_backward",
]
