# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The project's scripts, run as users do: in processes of their own.

`start_script` is the command itself. `run_script` runs the same file as `__main__` with the same arguments, directory
and environment, in a process forked from a server that has imported NeMo, which saves each run the ten seconds of that.
"""

import atexit
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.distributed import context, start_server

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = {
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "NODE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
}
"""Variables that trainers in a test's own process leave there, and that a user's shell does not have."""


def run_script(
    directory: Path, script: str, *arguments: str, timeout: float = 400
) -> subprocess.CompletedProcess[str]:
    """Runs a script in a directory, in one thread; its result has the text of both streams.

    Args:
        directory: to run in.
        script: its path below `scripts`.
        arguments: of it.
        timeout: seconds until it is killed. Raises subprocess.TimeoutExpired then.
    """
    start_server()
    command, environment = _started_as(script, arguments)
    with tempfile.TemporaryDirectory() as folder:
        streams = [f"{folder}/out", f"{folder}/error"]
        process = context.Process(target=_run, args=(command[1:], str(directory), environment, streams))
        process.start()
        try:
            process.join(timeout)
            if process.exitcode is None:
                raise subprocess.TimeoutExpired(command, timeout)
        finally:
            process.kill()
            process.join()
        out, error = (Path(stream).read_text(errors="replace") for stream in streams)
        return subprocess.CompletedProcess(command, process.exitcode, out, error)


def start_script(directory: Path, script: str, *arguments: str) -> subprocess.Popen[str]:
    """Starts a script's command in a session of its own, in one thread; both streams are its `stdout`."""
    command, environment = _started_as(script, arguments)
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, cwd=directory, env=environment, start_new_session=True, **streams)


def _run(arguments: list[str], directory: str, environment: dict[str, str], streams: list[str]) -> None:
    """In the forked process: becomes `python arguments…`, as far as the script can see."""
    os.setsid()
    for path, number in zip(streams, (1, 2), strict=True):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    sys.argv[:] = arguments
    sys.path[0] = os.path.dirname(arguments[0])
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out


def _started_as(script: str, arguments: tuple[str, ...]) -> tuple[list[str], dict[str, str]]:
    own = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
    environment = {**own, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return [sys.executable, str(ROOT / "scripts" / script), *arguments], environment
