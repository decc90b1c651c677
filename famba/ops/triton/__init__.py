"""Run the ops on GPUs by Triton kernels, which need nothing compiled when the package is installed."""

from famba.ops.triton.conv import causal_conv1d, causal_conv1d_backward
from famba.ops.triton.fuse import fuse_tokens, fuse_tokens_backward
from famba.ops.triton.match import match_tokens
from famba.ops.triton.mixer import mixer, mixer_backward, mixer_kept_shapes
from famba.ops.triton.norm import add_rms_norm, add_rms_norm_backward
from famba.ops.triton.scan import scan_state_shape, selective_scan, selective_scan_backward
