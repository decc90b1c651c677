#!/usr/bin/env bash
# Compile the portable kernels for 64-bit Arm and run the driver in emulation; no Arm machine is needed.
# Needs, on Debian or Ubuntu: apt-get install g++-aarch64-linux-gnu qemu-user-static
set -euo pipefail
cd "$(dirname "$0")/.."
sources=famba/ops/native/src
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
# The same as in setup.py on a processor that is not x86.
compile() { aarch64-linux-gnu-g++ -std=c++17 -O3 -Wall -Wextra -Wno-psabi -I$sources "$@"; }
compile -c $sources/dispatch.cpp -o "$folder/dispatch.o"
compile -DFAMBA_ISA=portable -DFAMBA_LANES=4 -c $sources/kernels.cpp -o "$folder/portable.o"
compile -c scripts/native_driver.cpp -o "$folder/driver.o"
# With torch, OpenMP creates the threads. Without OpenMP the kernels create their own. Try both.
root=$(dirname "$(dirname "$(aarch64-linux-gnu-g++ -print-file-name=libc.so.6)")")
for openmp in "" -fopenmp; do
    aarch64-linux-gnu-g++ "$folder"/*.o -pthread -Wl,--no-as-needed $openmp -ldl -o "$folder/driver"
    qemu-aarch64-static -L "$root" "$folder/driver"
done
echo "nothing found"
