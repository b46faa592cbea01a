# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
# shellcheck shell=bash
# To be sourced by the quickstarts: a work directory that remembers its options, and titles of stages.

# begin WORK SETTINGS: makes the directory; refuses one that was begun with other settings.
begin() {
    local work=$1 settings=$2
    mkdir -p "$work"
    if [ -s "$work/settings" ] && [ "$(cat "$work/settings")" != "$settings" ]; then
        echo "error: --work $work: was begun with $(cat "$work/settings"), not with $settings;" \
            "give these again to go on, or name another directory with --work" >&2
        exit 2
    fi
    echo "$settings" >"$work/settings"
    started=$(date +%s)
}

# stage TITLE: says what comes, and how long it took so far.
stage() { printf '\n=== %s (%d min %02d s since the start)\n' "$1" $((($(date +%s) - started) / 60)) $((($(date +%s) - started) % 60)); }
