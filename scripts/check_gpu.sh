#!/usr/bin/env bash
# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
# Shows on a machine with a GPU what the tests on CPUs cannot: that tokens and losses are the CPU's, that CUDA graphs
# replay, and how fast it decodes. Offline, in at most 8 minutes; each part has its own time limit, and none stops the
# others. Prints one table, writes docs/benchmarks/gpu.md and .png, and ends with 1 if any part failed, naming each.
#
#   bash scripts/check_gpu.sh                                             on a random model of Llama 3.2 1B's shape
#   bash scripts/check_gpu.sh --model smollm2.nemo --adapter exits.nemo   on that model (.nemo or .gguf) as well
#   bash scripts/check_gpu.sh --quick --output DIR                        tiny shapes: do all parts run at all?
#
# Installs nothing. The Python is that of NEMO_EE_VENV (default .venv in the repository), or where there is no such
# environment python3; packages may also lie in PYTHONPATH. What is missing is named in one line.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${NEMO_EE_VENV:-$root/.venv}/bin/python"
if [ ! -x "$python" ]; then
    if [ -n "${NEMO_EE_VENV:-}" ]; then
        echo "error: NEMO_EE_VENV=$NEMO_EE_VENV: holds no Python; name another, or unset it to use python3" >&2
        exit 2
    fi
    python=python3
    command -v "$python" >/dev/null || { echo "error: python3 was not found; set NEMO_EE_VENV to an environment" >&2; exit 2; }
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" "$root/scripts/gpu_check/check.py" "$@"
