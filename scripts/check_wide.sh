#!/usr/bin/env bash
# Runs the tests of the native kernels with sixteen lanes, as AVX-512 has them, on a processor that has only AVX2: the
# compiler makes two instructions of each. What that shows is the arithmetic of the wide build, not its instructions.
# Needs Linux, g++ and the environment of `make setup`; takes about two minutes and leaves nothing behind.
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
