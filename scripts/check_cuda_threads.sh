#!/usr/bin/env bash
# Runs the CUDA kernels on a CPU with a thread of the system for each thread of a block, under ThreadSanitizer: it finds
# what threads read and write without a barrier in between. Needs Linux, g++ and the environment of `make setup`; takes
# 7 minutes on 2 cores. Further arguments go to pytest, such as -k two_directions.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$PWD/.venv/bin/python}
export PYTHONPATH=$PWD OMP_NUM_THREADS=1 FAMBA_EMULATOR_FLAGS="-g -fsanitize=thread -DEMULATE_BY_THREADS"
# What is not compiled here, Python and torch among it, is not looked at.
export TSAN_OPTIONS="ignore_noninstrumented_modules=1:halt_on_error=1${TSAN_OPTIONS:+:$TSAN_OPTIONS}"
tests="cuda and (scans_work_is_cut or half_of_a_projection or that_need_no_padding or measures)"
# Addresses must not be drawn: the tool cannot run with all that Linux may draw.
LD_PRELOAD=$(g++ -print-file-name=libtsan.so) setarch --addr-no-randomize \
    "$python" -m pytest --quiet --capture=no -p no:cacheprovider tests/test_ops_kernels.py tests/test_ops_mixer.py -k "$tests" "$@"
echo "nothing found"
