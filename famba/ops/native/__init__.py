"""Run the ops on CPUs by compiled kernels."""

from famba.ops.native.kernels import (
    add_rms_norm,
    add_rms_norm_backward,
    causal_conv1d,
    causal_conv1d_backward,
    fuse_tokens,
    fuse_tokens_backward,
    mixer,
    mixer_backward,
    mixer_kept_shapes,
    scan_state_shape,
    selective_scan,
    selective_scan_backward,
)

# A product and a sort, which torch does well on a CPU.
from famba.ops.reference import match_tokens
