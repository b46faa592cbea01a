#!/usr/bin/env bash
# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
# Runs the tests on the CPU, in an environment that is made first if it is missing (see env.sh).
#
#   bash scripts/test.sh                      all but the slow tests
#   bash scripts/test.sh --slow               all tests
#   bash scripts/test.sh tests/unit -k ridge  any pytest arguments
#   NEMO_EE_PYTHON=python3.12 bash scripts/test.sh   the same with another Python, in an environment of its own
#
# GPUs are hidden from them. On the first GPU, the tests that need one:
#
#   CUDA_VISIBLE_DEVICES=0 bash scripts/test.sh -m gpu
#
# Three pytest processes share the files of tests, also on two cores, since most tests wait for processes of their own;
# -n 0 is one, which a debugger needs. In a container that has no pytest-xdist it is one, too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES-}" # empty unless set: all but the tests marked gpu mean the CPU
source scripts/env.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # distributed tests run a process per rank
share=()
if python -c 'import xdist' 2>/dev/null; then
    share=(-n 3 --dist loadfile)
else
    echo "pytest-xdist is not installed: the tests run in one process"
fi
exec python -m pytest -q --durations=15 "${share[@]}" "$@"
