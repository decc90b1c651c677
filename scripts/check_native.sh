#!/usr/bin/env bash
# Run the tests of the native kernels on builds that find what the usual one hides: one with AddressSanitizer and
# UndefinedBehaviorSanitizer, one with ThreadSanitizer, and one in which AVX2 has the sixteen lanes of AVX-512. If there
# is a compiler for Arm, the kernels are also compiled for it. Needs Linux, g++ and `make setup`; takes some minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$PWD/.venv/bin/python}
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r configs famba tests LICENSE README.md pyproject.toml setup.py "$copy"
cd "$copy"
sources=famba/ops/native/src
export PYTHONPATH=$copy

# Change a file; fail if it does not change.
change() {
    cp "$2" before
    sed -i "$1" "$2"
    ! cmp -s before "$2"
}

build() {
    rm -rf build
    CXX=g++ CXXFLAGS="-g $*" FAMBA_REQUIRE_KERNELS=1 "$python" setup.py --quiet build_ext --inplace
}

# Python is not instrumented, so the sanitizer's runtime and the C++ library must be loaded first.
with() {
    local library preload=
    for library in "$@" stdc++; do preload+=" $(g++ -print-file-name="lib$library.so")"; done
    # Addresses must not be drawn: ThreadSanitizer cannot run with all that Linux may draw.
    LD_PRELOAD=$preload setarch --addr-no-randomize "$python" -m pytest --quiet -p no:cacheprovider \
        tests/test_{data_batch,ops_kernels,ops_mixer,ops_native_safety}.py -k "$tests"
}

echo "== AddressSanitizer and UndefinedBehaviorSanitizer"
build -fsanitize=address,undefined -fno-sanitize-recover=all
# Leaks of the interpreter do not matter here.
tests="native or compiled" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 with asan ubsan

echo "== sixteen lanes"
change 's/("avx2", 8, /("avx2", 16, /' setup.py
build
tests=native FAMBA_ISA=avx2 with

echo "== ThreadSanitizer"
# The tool cannot see how OpenMP waits, so the kernels start threads of their own, as they do where there is no OpenMP.
change 's/dlsym(RTLD_DEFAULT, "GOMP_parallel")/static_cast<void *>(nullptr)/' $sources/dispatch.cpp
build -fsanitize=thread
tests="native and (threads or same_bits)" TSAN_OPTIONS=ignore_noninstrumented_modules=1:halt_on_error=1 with tsan

if command -v aarch64-linux-gnu-g++ >/dev/null; then
    echo "== Arm"
    aarch64-linux-gnu-g++ -std=c++17 -O3 -Wall -Wextra -Wno-psabi -DFAMBA_ISA=portable -DFAMBA_LANES=4 \
        -c $sources/kernels.cpp -o /dev/null
fi
echo "nothing found"
