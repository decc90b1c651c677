"""Run the ops on CPUs by compiled kernels."""
