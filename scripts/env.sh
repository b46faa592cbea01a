# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
# shellcheck shell=bash
# Makes sure that the Python environment exists and activates it. test.sh and quickstart.sh do this themselves; for the
# other scripts, in bash:
#
#   source scripts/env.sh
#
#   NEMO_EE_PYTHON       the Python 3.11 or 3.12 to make it with; default: the first that is found, 3.11 before 3.12.
#   NEMO_EE_VENV         the environment; default .venv in the repository, or .venv-3.12 with a NEMO_EE_PYTHON of that
#                        version. One that this file did not make is used as it is.
#   NEMO_EE_TORCH_INDEX  an index to take torch from, e.g. https://download.pytorch.org/whl/cpu, which spares a machine
#                        without a GPU the download of CUDA libraries.
#
# What is installed is scripts/requirements/requirements.txt, at the versions of constraints.txt beside it, or of constraints-3.12.txt.
# A second run finds it installed and needs no network. In a NeMo container the environment is laid over the container's
# own packages, and only nemo_ee and what is missing of scripts/requirements/requirements-container.txt are installed.

_nemo_ee_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" # models and tokenizers are local files; never wait for a server
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"

_nemo_ee_platform() { # that there are packages for this machine
    case "$(uname -s) $(uname -m)" in
    "Linux x86_64" | "Linux aarch64") ;;
    Linux\ *) echo "error: Linux on $(uname -m) is not supported: torch is not published for it; use x86_64 or aarch64" >&2 && return 1 ;;
    Darwin\ *) echo "error: macOS is not supported; use Linux or a container (docs/containers.md)" >&2 && return 1 ;;
    *) echo "error: $(uname -s) is not supported; use Linux (on Windows: WSL) or a container (docs/containers.md)" >&2 && return 1 ;;
    esac
}

_nemo_ee_version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

_nemo_ee_fits() { [[ "$(_nemo_ee_version "$1")" =~ ^3\.1[12]$ ]] && "$1" -c 'import venv, ensurepip' 2>/dev/null; }

_nemo_ee_check_given() { # that NEMO_EE_PYTHON is a Python that can be used
    local version remedy='set it to a Python 3.11 or 3.12, or unset it'
    version="$(_nemo_ee_version "$NEMO_EE_PYTHON")"
    if [ -z "$version" ]; then
        echo "error: NEMO_EE_PYTHON=$NEMO_EE_PYTHON: there is no such Python; $remedy" >&2
    elif ! [[ "$version" =~ ^3\.1[12]$ ]]; then
        echo "error: NEMO_EE_PYTHON=$NEMO_EE_PYTHON: is Python $version; $remedy" >&2
    elif ! _nemo_ee_fits "$NEMO_EE_PYTHON"; then
        echo "error: NEMO_EE_PYTHON=$NEMO_EE_PYTHON: lacks its venv module; install it (on Debian and Ubuntu: python$version-venv)" >&2
    else
        NEMO_EE_VENV="${NEMO_EE_VENV:-$_nemo_ee_root/.venv-$version}"
        local there
        there="$(_nemo_ee_version "$NEMO_EE_VENV/bin/python")" || return 0
        [ "$there" != "$version" ] || return 0
        echo "error: NEMO_EE_PYTHON=$NEMO_EE_PYTHON: is Python $version, and NEMO_EE_VENV=$NEMO_EE_VENV holds an environment of $there; name another directory" >&2
    fi
    return 1
}

_nemo_ee_find_python() {
    local candidate
    for candidate in "${NEMO_EE_PYTHON:-python3.11}" python3.12 python3; do
        if _nemo_ee_fits "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.11 or 3.12 with its venv module was found; install Python 3.11, or name one with NEMO_EE_PYTHON" >&2
    return 1
}

# The Python that a NeMo container brings, with NeMo's nlp collection and megatron-core. The variable is set by NVIDIA's
# images alone; whether the node has a GPU does not matter, and torch, whose import takes seconds, is not asked.
_nemo_ee_container_python() {
    [ -n "${NVIDIA_PYTORCH_VERSION:-}" ] && "${NEMO_EE_PYTHON:-python3}" -c '
import importlib.util, sys
try:
    sys.exit(not all(map(importlib.util.find_spec, ("torch", "nemo.collections.nlp", "megatron.core"))))
except ModuleNotFoundError:  # a package above one of them
    sys.exit(1)' 2>/dev/null && echo "${NEMO_EE_PYTHON:-python3}"
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
    (cd "$_nemo_ee_root" && cat scripts/requirements/*.txt setup.py scripts/env.sh && pwd) | sha256sum | cut -d' ' -f1
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

# Lays the environment over the packages that the given Python sees, of which all keep their versions; adds what is missing.
_nemo_ee_over_container() {
    local installed="$NEMO_EE_VENV/container_packages.txt"
    _nemo_ee_make_venv "$1" --system-site-packages || return 1
    # A container's Python may be a virtual environment's itself, whose packages --system-site-packages does not mean.
    "$1" -c 'import sys, sysconfig
if sys.prefix != sys.base_prefix:
    print(*{f"import site; site.addsitedir({sysconfig.get_path(kind)!r})" for kind in ("purelib", "platlib")}, sep="\n")' \
        >"$("$NEMO_EE_VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/container.pth" || return 1
    "$NEMO_EE_VENV/bin/python" -m pip list --format freeze --disable-pip-version-check 2>/dev/null >"$installed"
    if ! _nemo_ee_pip "what nemo_ee needs beyond NeMo" -c "$installed" -r "$_nemo_ee_root/scripts/requirements/requirements-container.txt"; then
        echo "Going on without: only GGUF files and the server need these packages."
    fi
}

_nemo_ee_install() {
    local python scripts="$_nemo_ee_root/scripts" pins
    if python="$(_nemo_ee_container_python)"; then
        echo "NeMo container found: laying $NEMO_EE_VENV over its packages"
        _nemo_ee_over_container "$python" || return 1
    else
        _nemo_ee_platform && python="$(_nemo_ee_find_python)" || return 1
        echo "installing into $NEMO_EE_VENV with $("$python" --version); this takes 3 to 10 minutes, once"
        if ! "$NEMO_EE_VENV/bin/python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            _nemo_ee_make_venv "$python" || return 1
        fi
        pins="$scripts/requirements/constraints.txt"
        if [ "$(_nemo_ee_version "$NEMO_EE_VENV/bin/python")" = 3.12 ]; then
            pins="$scripts/requirements/constraints-3.12.txt"
            if ! command -v c++ >/dev/null; then
                echo "error: megatron-core 0.13.0, which belongs to Python 3.12, comes as source: install a C++ compiler (g++) and Python's headers, or use Python 3.11" >&2
                return 1
            fi
        fi
        _nemo_ee_pip "build tools" -c "$pins" setuptools wheel || return 1
        _nemo_ee_pip "torch" ${NEMO_EE_TORCH_INDEX:+--index-url "$NEMO_EE_TORCH_INDEX"} "$(grep '^torch==' "$pins")" || return 1
        _nemo_ee_pip "NeMo, megatron-core and what they need" -c "$pins" -r "$scripts/requirements/requirements.txt" || return 1
    fi
    _nemo_ee_pip "nemo_ee" --no-deps --no-build-isolation -e "$_nemo_ee_root" || return 1
    _nemo_ee_wanted >"$NEMO_EE_VENV/nemo_ee_installed"
    echo "installed"
}

if [ -n "${NEMO_EE_PYTHON:-}" ]; then
    _nemo_ee_check_given || return 1 2>/dev/null || exit 1
fi
NEMO_EE_VENV="${NEMO_EE_VENV:-$_nemo_ee_root/.venv}"
if [ -d "$NEMO_EE_VENV" ] && [ ! -e "$NEMO_EE_VENV/nemo_ee_made_this" ] && [ -x "$NEMO_EE_VENV/bin/python" ]; then
    export PYTHONPATH="$_nemo_ee_root${PYTHONPATH:+:$PYTHONPATH}"
elif [ "$(cat "$NEMO_EE_VENV/nemo_ee_installed" 2>/dev/null)" != "$(_nemo_ee_wanted)" ]; then
    _nemo_ee_install || return 1 2>/dev/null || exit 1
fi
export PATH="$NEMO_EE_VENV/bin:$PATH"
