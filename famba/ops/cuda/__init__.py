"""Run scan, convolution and mixer on GPUs by kernels in CUDA C++, which the NVRTC that torch brings compiles."""
