"""The ops on CUDA by the packages mamba-ssm and causal-conv1d; `backend` is what the registry sees."""
