#!/usr/bin/env bash
# Fails where an image lacks something that has to work without a GPU. Usage: check_image.sh cpu|cuda
set -euo pipefail
# By itself, doctor passes over a backend that cannot be used; one that is asked for by name has to work.
FAMBA_BACKEND=native famba doctor
# Triton and torch.compile compile modules of Python's at run time.
headers=$(python -c 'import sysconfig; print(sysconfig.get_path("include"))')
printf '#include <Python.h>\n' | g++ -fsyntax-only -x c++ -I"$headers" -
if [ "$1" = cuda ]; then
    # What the backend "mamba_ssm" imports; the extensions need torch's libraries to be loaded before them.
    python -c 'import torch, selective_scan_cuda, causal_conv1d.cpp_functions'
    python -c 'import torch; assert torch.version.cuda, "torch is built without CUDA"'
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
famba train data=digits model=vim_micro recipe=quick fusion=upper trainer.device=cpu trainer.max_steps=1 \
    "run_dir=$folder/run"
famba report "$folder/run"
