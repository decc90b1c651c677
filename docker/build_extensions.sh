#!/usr/bin/env bash
# Build wheels of mamba-ssm and causal-conv1d from their sources, only for the GPUs in TORCH_CUDA_ARCH_LIST.
# Usage: build_extensions.sh REQUIREMENTS FOLDER. Needs torch, setuptools, wheel, ninja and the CUDA toolkit of torch.
set -euo pipefail
requirements=$(realpath "$1")
mkdir -p "$2"
folder=$(realpath "$2")
: "${TORCH_CUDA_ARCH_LIST:?names the compute capabilities to build for, such as 8.0;9.0}"
# Without these, both look for a wheel on GitHub first, and later releases of mamba-ssm leave out the scan.
export MAMBA_FORCE_BUILD=TRUE MAMBA_KEEP_CUDA_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE

build() { # NAME==VERSION
    local source
    source=$(mktemp -d)
    pip download --no-deps --no-build-isolation --no-binary "${1%%==*}" --dest "$source" "$1"
    tar -xzf "$source"/*.tar.gz -C "$source" --strip-components=1
    # Both set up to eleven targets themselves, so torch ignores TORCH_CUDA_ARCH_LIST.
    sed -i -E 's/cc_flag\.append\("(-gencode|arch=[^"]*)"\)/pass/' "$source/setup.py"
    if grep -E -- '-gencode|arch=compute' "$source/setup.py"; then
        echo "error: setup.py of $1 names its targets in another way than known" >&2
        return 1
    fi
    pip wheel --no-deps --no-build-isolation --no-cache-dir --wheel-dir "$folder" "$source"
    rm -rf "$source"
}

check() { # WHEEL: fail unless it has code for every capability
    local unpacked architecture code packages
    unpacked=$(mktemp -d)
    python -m zipfile -e "$1" "$unpacked"
    # Triton, which comes with torch, has a cuobjdump; not every image with a toolkit has one.
    packages=$(python -c 'import sysconfig; print(sysconfig.get_path("platlib"))')
    code=$("$packages/triton/backends/nvidia/bin/cuobjdump" --list-elf "$unpacked"/*.so)
    for architecture in ${TORCH_CUDA_ARCH_LIST//[;,]/ }; do
        architecture=sm_$(tr -d . <<< "${architecture%+PTX}")
        if ! grep -q "\.$architecture\." <<< "$code"; then
            echo "error: $1 has no code for $architecture" >&2
            return 1
        fi
    done
    rm -rf "$unpacked"
}

while read -r requirement; do
    build "$requirement"
done < <(grep -v '^#' "$requirements")
for wheel in "$folder"/*.whl; do
    check "$wheel"
done
