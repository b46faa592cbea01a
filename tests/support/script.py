# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The project's scripts, run as users do."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_script(directory: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a script in a directory, in one thread; its result has the text of both streams.

    Args:
        directory: to run in.
        script: its path below `scripts`.
        arguments: of it.
    """
    command, environment = _started_as(script, arguments)
    return subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=400
    )


def start_script(directory: Path, script: str, *arguments: str) -> subprocess.Popen[str]:
    """Starts a script as `run_script` does, in a session of its own; both streams are its `stdout`."""
    command, environment = _started_as(script, arguments)
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, cwd=directory, env=environment, start_new_session=True, **streams)


def _started_as(script: str, arguments: tuple[str, ...]) -> tuple[list[str], dict[str, str]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return [sys.executable, str(ROOT / "scripts" / script), *arguments], environment
