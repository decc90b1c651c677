#!/usr/bin/env bash
# Fail if something does not work in an image that needs no GPU. Usage: check_image.sh cpu|cuda
set -euo pipefail
# By default, doctor skips a backend that cannot be used. A backend chosen by name must work.
FAMBA_BACKEND=native famba doctor
# Triton and torch.compile compile Python modules at run time.
headers=$(python -c 'import sysconfig; print(sysconfig.get_path("include"))')
printf '#include <Python.h>\n' | g++ -fsyntax-only -x c++ -I"$headers" -
if [ "$1" = cuda ]; then
    # The imports of the backend "mamba_ssm". The extensions need torch's libraries to be loaded first.
    python -c 'import torch, selective_scan_cuda, causal_conv1d.cpp_functions'
    python -c 'import torch; assert torch.version.cuda, "torch is built without CUDA"'
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
famba train data=digits model=vim_micro recipe=quick fusion=upper trainer.device=cpu trainer.max_steps=1 \
    "run_dir=$folder/run"
famba report "$folder/run"
