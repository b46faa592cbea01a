# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
# Makes sure that the Python environment exists and activates it. test.sh and quickstart.sh do this themselves; for the
# other scripts, in bash:
#
#   source scripts/env.sh
#
#   NEMO_EE_VENV         the environment; default .venv in the repository. One that this file did not make is used as it is.
#   NEMO_EE_TORCH_INDEX  an index to take torch from, e.g. https://download.pytorch.org/whl/cpu, which spares a machine
#                        without a GPU the download of CUDA libraries.
#
# The installed set is scripts/requirements.txt, and for Python 3.11 all of scripts/constraints.txt. A second run finds
# it installed and needs no network. Inside a NeMo container (CUDA and NeMo present) the environment is laid over the
# container's own packages, and nothing but nemo_ee is installed.

_nemo_ee_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
NEMO_EE_VENV="${NEMO_EE_VENV:-$_nemo_ee_root/.venv}"
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" # models and tokenizers are local files; never wait for a server
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"

_nemo_ee_find_python() {
    local candidate
    for candidate in python3.11 python3.12 python3; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.11 or 3.12 with its venv module was found; install Python 3.11 (tested)" >&2
    return 1
}

_nemo_ee_in_nemo_container() { # CUDA, NeMo's nlp collection and megatron-core are already there
    "$1" -c '
import importlib.util, sys
if any(importlib.util.find_spec(name) is None for name in ("torch", "nemo", "megatron")):
    sys.exit(1)
import torch
sys.exit(not (torch.cuda.is_available() and importlib.util.find_spec("nemo.collections.nlp")))' 2>/dev/null
}

_nemo_ee_pip() { # what is installed, then pip's arguments
    echo "  $1"
    shift
    if ! "$NEMO_EE_VENV/bin/python" -m pip install -q --disable-pip-version-check "$@" >>"$NEMO_EE_VENV/install.log" 2>&1; then
        tail -n 15 "$NEMO_EE_VENV/install.log" >&2
        echo "error: the installation failed; the lines above and $NEMO_EE_VENV/install.log say why." >&2
        echo "If a download failed, check the network and run the same command again; what was downloaded is kept." >&2
        return 1
    fi
}

_nemo_ee_wanted() { # a word that changes with anything that decides what is installed
    (cd "$_nemo_ee_root" && cat scripts/requirements.txt scripts/constraints.txt setup.py scripts/env.sh && pwd) | sha256sum | cut -d' ' -f1
}

# Creates the environment with the Python and venv options given. It is marked as ours before anything is in it, and the
# mark outlives what is deleted, so an interruption at any moment leaves a directory that the next run knows it may redo.
_nemo_ee_make_venv() {
    local python=$1
    shift
    if [ ! -e "$NEMO_EE_VENV/nemo_ee_made_this" ] && [ -n "$(ls -A "$NEMO_EE_VENV" 2>/dev/null)" ]; then
        echo "error: NEMO_EE_VENV=$NEMO_EE_VENV: holds files but no Python environment; name a new or an empty directory" >&2
        return 1
    fi
    mkdir -p "$NEMO_EE_VENV" && touch "$NEMO_EE_VENV/nemo_ee_made_this" || return 1
    find "$NEMO_EE_VENV" -mindepth 1 -maxdepth 1 ! -name nemo_ee_made_this -exec rm -rf {} + || return 1
    "$python" -m venv "$@" "$NEMO_EE_VENV"
}

_nemo_ee_install() {
    local python scripts="$_nemo_ee_root/scripts" pins=()
    python="$(_nemo_ee_find_python)" || return 1
    if _nemo_ee_in_nemo_container "$python"; then
        echo "NeMo and CUDA found: laying $NEMO_EE_VENV over the installed packages"
        _nemo_ee_make_venv "$python" --system-site-packages || return 1
    else
        echo "installing into $NEMO_EE_VENV with $("$python" --version); this takes 3 to 10 minutes, once"
        if ! "$NEMO_EE_VENV/bin/python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            _nemo_ee_make_venv "$python" || return 1
        fi
        if "$NEMO_EE_VENV/bin/python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
            pins=(-c "$scripts/constraints.txt")
        fi
        _nemo_ee_pip "build tools" "${pins[@]}" setuptools wheel || return 1
        _nemo_ee_pip "torch" ${NEMO_EE_TORCH_INDEX:+--index-url "$NEMO_EE_TORCH_INDEX"} "$(grep '^torch==' "$scripts/requirements.txt")" || return 1
        _nemo_ee_pip "NeMo, megatron-core and what they need" "${pins[@]}" -r "$scripts/requirements.txt" || return 1
    fi
    _nemo_ee_pip "nemo_ee" --no-deps --no-build-isolation -e "$_nemo_ee_root" || return 1
    _nemo_ee_wanted >"$NEMO_EE_VENV/nemo_ee_installed"
    echo "installed"
}

if [ -d "$NEMO_EE_VENV" ] && [ ! -e "$NEMO_EE_VENV/nemo_ee_made_this" ] && [ -x "$NEMO_EE_VENV/bin/python" ]; then
    export PYTHONPATH="$_nemo_ee_root${PYTHONPATH:+:$PYTHONPATH}"
elif [ "$(cat "$NEMO_EE_VENV/nemo_ee_installed" 2>/dev/null)" != "$(_nemo_ee_wanted)" ]; then
    _nemo_ee_install || return 1 2>/dev/null || exit 1
fi
export PATH="$NEMO_EE_VENV/bin:$PATH"
