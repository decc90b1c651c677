"""Scan, convolution and mixer on GPUs by kernels in CUDA C++, compiled at first use by the NVRTC that torch brings."""
