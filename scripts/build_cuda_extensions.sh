#!/usr/bin/env bash
# Builds the CUDA extensions of mamba-ssm and causal-conv1d for one GPU architecture and calls them through the adapter
# with tensors on the CPU, which has to get as far as the extensions' own "is_cuda" check: that proves, without a GPU,
# that they build, import and take the arguments that the adapter gives them. It does not prove what they compute.
# Usage: build_cuda_extensions.sh [FOLDER [ARCHITECTURE]], by default a temporary folder and 80 (A100). What a former
# call built in FOLDER is kept. Needs Linux, g++, nvcc, the environment of `make setup` and PyPI. About half an hour on
# one core; MAX_JOBS sets how many compilers run at once (each takes up to 6 GB).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$PWD/.venv/bin/python}
folder=${1:-$(mktemp -d)}
architecture=${2:-80}
mamba=${MAMBA_VERSION:-2.3.2.post1}
conv=${CONV_VERSION:-1.7.0}

mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
# `which nvcc` may be a link or a wrapper elsewhere; the toolkit is where nvcc itself says that it lies.
export CUDA_HOME=${CUDA_HOME:-$(nvcc --dryrun -x cu /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p' | xargs realpath)}
export MAX_JOBS=${MAX_JOBS:-1} PYTHONPATH=$folder/tools PATH=$folder/tools/bin:$PATH
# Without these the packages first look for a wheel of theirs on GitHub; the third is asked for by later releases.
export MAMBA_FORCE_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE MAMBA_KEEP_CUDA_BUILD=TRUE
"$CUDA_HOME/bin/nvcc" --version | tail -2
"$python" -c 'import torch; print("torch", torch.__version__, "of CUDA", torch.version.cuda)'

[ -d "$folder/tools" ] || "$python" -m pip install -q --target "$folder/tools" 'setuptools<81' 'wheel<0.46' ninja packaging

# What the headers of this torch ask for; both packages may ask the compiler for less.
standard=17
headers=$("$python" -c 'import torch; print(torch.__path__[0])')/include
grep -q 'C++20 or later' "$headers/ATen/ATen.h" && standard=20

build() { # name version
    local name=$1 version=$2
    local source=$folder/${name//-/_}-$version
    if ! ls "$folder/wheels/${name//-/_}-$version"-*.whl > /dev/null 2>&1; then
        MAMBA_SKIP_CUDA_BUILD=TRUE CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE MAMBA_KEEP_CUDA_BUILD=FALSE \
            "$python" -m pip download -q --no-deps --no-binary "$name" --no-build-isolation -d "$folder" "$name==$version"
        rm -rf "$source"
        tar -xzf "$source.tar.gz" -C "$folder"
        # Their targets are fixed, nine of them; TORCH_CUDA_ARCH_LIST has no effect.
        sed -i -e "s/-std=c++17/-std=c++$standard/" \
            -e "s/+ cc_flag\$/+ [\"-gencode\", \"arch=compute_$architecture,code=sm_$architecture\"]/" "$source/setup.py"
        echo "building $name $version for sm_$architecture"
        time "$python" -m pip wheel -v --no-deps --no-build-isolation --no-cache-dir -w "$folder/wheels" "$source"
    fi
    "$python" -m pip install -q --upgrade --no-deps --target "$folder/site" "$folder/wheels/${name//-/_}-$version"-*.whl
}

build causal-conv1d "$conv"
build mamba-ssm "$mamba"
PYTHONPATH=$folder/site:$PWD exec "$python" scripts/call_cuda_extensions.py
