#!/usr/bin/env bash
# Install the Python code of mamba-ssm and causal-conv1d without their CUDA extensions, into the environment of
# `make setup`. The tests of ops put stand-ins in the place of the extensions. Needs PyPI; takes a minute.
# MAMBA_VERSION and CONV_VERSION choose other versions.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$PWD/.venv/bin/python}
"$python" -m pip install -q setuptools wheel packaging einops transformers
# Without FORCE_BUILD, the packages look for a wheel on GitHub.
MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE \
    "$python" -m pip install -q --no-build-isolation --no-deps --no-cache-dir \
    "mamba-ssm==${MAMBA_VERSION:-2.3.2.post1}" "causal-conv1d==${CONV_VERSION:-1.7.0}"
