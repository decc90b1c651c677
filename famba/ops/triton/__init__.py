"""Run the ops on GPUs by Triton kernels, which need nothing compiled when the package is installed."""

from famba.ops.directional import Directional
from famba.ops.reference import scan_state_shape
from famba.ops.triton import conv, scan
from famba.ops.triton.norm import add_rms_norm, add_rms_norm_backward
from famba.ops.triton.tokens import fuse_tokens, fuse_tokens_backward, match_tokens

_directional = Directional("triton", conv.convolve, conv.convolve_backward, scan.scan, scan.scan_backward)
causal_conv1d, causal_conv1d_backward = _directional.causal_conv1d, _directional.causal_conv1d_backward
selective_scan, selective_scan_backward = _directional.selective_scan, _directional.selective_scan_backward
mixer, mixer_backward = _directional.mixer, _directional.mixer_backward
mixer_kept_shapes = _directional.mixer_kept_shapes
