"""Provide the functions of the backend "cuda"."""

from famba.ops.cuda.conv import convolve, convolve_backward
from famba.ops.cuda.scan import scan, scan_backward
from famba.ops.directional import Directional
from famba.ops.reference import scan_state_shape

# Bound by memory and small: Triton does as well there.
from famba.ops.triton import add_rms_norm, add_rms_norm_backward, fuse_tokens, fuse_tokens_backward, match_tokens

_directional = Directional("cuda", convolve, convolve_backward, scan, scan_backward)
causal_conv1d, causal_conv1d_backward = _directional.causal_conv1d, _directional.causal_conv1d_backward
selective_scan, selective_scan_backward = _directional.selective_scan, _directional.selective_scan_backward
mixer, mixer_backward = _directional.mixer, _directional.mixer_backward
mixer_kept_shapes = _directional.mixer_kept_shapes
