#!/usr/bin/env bash
# Test the native kernels with the sixteen lanes of AVX-512 on a processor that only has AVX2. The compiler turns each
# instruction into two, so this tests the arithmetic of the wide build, not its instructions.
# Needs Linux, g++ and the environment of `make setup`; takes about two minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$PWD/.venv/bin/python}
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r configs famba tests LICENSE README.md pyproject.toml setup.py "$copy"
cd "$copy"
sed -i 's/("avx2", 8, /("avx2", 16, /' setup.py
grep -q '("avx2", 16, ' setup.py
FAMBA_REQUIRE_KERNELS=1 "$python" setup.py --quiet build_ext --inplace
PYTHONPATH=$copy FAMBA_ISA=avx2 "$python" -m pytest -q -p no:cacheprovider -k native \
    tests/test_ops_{scan,conv,norm,mixer,fuse,native_safety}.py
