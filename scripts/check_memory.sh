#!/usr/bin/env bash
# Runs the native kernels under tools that watch memory: the tests and a driver in C++ with AddressSanitizer and
# UndefinedBehaviorSanitizer, the driver with ThreadSanitizer and under valgrind, if that is installed.
# Needs Linux, g++ and the environment of `make setup`; takes a few minutes and leaves nothing behind.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$PWD/.venv/bin/python}
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r configs famba scripts tests LICENSE README.md pyproject.toml setup.py "$copy"
cd "$copy"
sources=famba/ops/native/src

# Builds the library with further flags, and the driver against it.
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
    echo "left out: valgrind is not installed"
fi

echo "== ThreadSanitizer: the driver"
build -fsanitize=thread
./driver

echo "== AddressSanitizer and UndefinedBehaviorSanitizer: the driver, then the tests"
build -fsanitize=address,undefined -fno-sanitize-recover=all
./driver
# Python itself is not instrumented: the sanitizer's runtime and the C++ library that it watches have to come first.
# Leaks of the interpreter are none of ours; valgrind has looked for those of the kernels.
preload="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so) $(g++ -print-file-name=libstdc++.so)"
LD_PRELOAD=$preload ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
    "$python" -m pytest --quiet -p no:cacheprovider -k native tests/test_ops_{scan,conv,norm,mixer,fuse,native_safety}.py
echo "nothing found"
