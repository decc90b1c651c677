#!/usr/bin/env bash
# Check how the native kernels use memory: the tests and a C++ driver with AddressSanitizer and
# UndefinedBehaviorSanitizer, and the driver with ThreadSanitizer and, if it is installed, valgrind.
# Needs Linux, g++ and the environment of `make setup`; takes a few minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$PWD/.venv/bin/python}
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r configs famba scripts tests LICENSE README.md pyproject.toml setup.py "$copy"
cd "$copy"
sources=famba/ops/native/src

# Build the library with more flags, and the driver that uses it.
build() {
    rm -rf build
    CXX=g++ CXXFLAGS="-g -fno-omit-frame-pointer $*" FAMBA_REQUIRE_KERNELS=1 "$python" setup.py --quiet build_ext --inplace
    # shellcheck disable=SC2068
    g++ -std=c++17 -O1 -g -Wall -Wextra $@ -I$sources scripts/native_driver.cpp famba/ops/native/libfamba_kernels.so \
        -Wl,-rpath,"$copy/famba/ops/native" -pthread -o driver
}

echo "== valgrind: the driver"
build
if command -v valgrind > /dev/null; then
    valgrind --quiet --error-exitcode=1 --leak-check=full --errors-for-leak-kinds=definite ./driver
else
    echo "skipped: valgrind is not installed"
fi

echo "== ThreadSanitizer: the driver"
build -fsanitize=thread
./driver

echo "== AddressSanitizer and UndefinedBehaviorSanitizer: the driver, then the tests"
build -fsanitize=address,undefined -fno-sanitize-recover=all
./driver
# Python is not instrumented, so the sanitizer's runtime and the C++ library must be loaded first.
# Leaks of the interpreter do not matter here; valgrind has looked for leaks of the kernels.
preload="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so) $(g++ -print-file-name=libstdc++.so)"
LD_PRELOAD=$preload ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
    "$python" -m pytest --quiet -p no:cacheprovider -k native tests/test_ops_{scan,conv,norm,mixer,fuse,native_safety}.py
echo "nothing found"
