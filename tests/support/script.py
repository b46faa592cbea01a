# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The project's scripts, run as users do: in processes of their own.

`start_script` is the command itself. `run_script` and `fork_script` run the same file as `__main__` with the same
arguments, directory and environment, in a process forked from a server that has imported NeMo, which saves each run
the ten seconds of that.
"""

import atexit
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

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
}
"""Variables that trainers in a test's own process leave there, and that a user's shell does not have."""


def run_script(
    directory: Path, script: str, *arguments: str, **more: str
) -> subprocess.CompletedProcess[str]:
    """Runs a script in a directory, in one thread; its result has the text of both streams.

    Args:
        directory: to run in.
        script: its path below `scripts`.
        arguments: of it.
        more: variables of its environment.
    """
    command, environment = _started_as(script, arguments, more)
    with tempfile.TemporaryDirectory() as folder:
        out, error = Path(folder, "out"), Path(folder, "error")
        process = ForkedScript(command, directory, environment, out, error)
        try:
            process.wait(400)
        finally:
            process.kill()
        texts = (path.read_text(errors="replace") for path in (out, error))
        return subprocess.CompletedProcess(command, process.returncode, *texts)


def fork_script(directory: Path, script: str, *arguments: str, **more: str) -> "ForkedScript":
    """Starts a script as `start_script` does; both streams are its `stdout`."""
    command, environment = _started_as(script, arguments, more)
    folder = tempfile.mkdtemp()
    pipe = Path(folder, "out")
    os.mkfifo(pipe)
    try:
        process = ForkedScript(command, directory, environment, pipe, pipe)
        process.stdout = open(pipe, errors="replace")
    finally:
        pipe.unlink()
        os.rmdir(folder)
    return process


def start_script(directory: Path, script: str, *arguments: str) -> subprocess.Popen[str]:
    """Starts a script's command in a session of its own, in one thread; both streams are its `stdout`."""
    command, environment = _started_as(script, arguments, {})
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, cwd=directory, env=environment, start_new_session=True, **streams)


class ForkedScript:
    """A forked script, with as much of `subprocess.Popen` as tests need.

    Args:
        command: Python, the script, its arguments.
        directory: to run in.
        environment: of it, whole.
        out: file that gets its output.
        error: file that gets its errors.
    """

    def __init__(
        self, command: list[str], directory: Path, environment: dict[str, str], out: Path, error: Path
    ):
        start_server()
        self.args, self.stdout, self.returncode = command, None, None
        streams = (str(out), str(error))
        self._process = context.Process(target=_run, args=(command[1:], str(directory), environment, streams))
        self._process.start()
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """The exit status, of a signal as a negative number; None while it runs."""
        self.returncode = self._process.exitcode
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Waits for it. Raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """All that it has written, when it has ended and closed its stream."""
        del timeout  # the stream ends with the processes that hold it
        text = self.stdout.read()
        self.wait()
        return text, None

    def send_signal(self, number: int) -> None:
        """To the process, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends it, if it still runs."""
        self._process.kill()
        self._process.join()


def _run(arguments: list[str], directory: str, environment: dict[str, str], streams: tuple[str, str]) -> None:
    """In the forked process: becomes `python arguments…`, as far as the script can see."""
    os.setsid()
    opened = {path: os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600) for path in streams}
    for path, number in zip(streams, (1, 2), strict=True):
        os.dup2(opened[path], number)
    for descriptor in opened.values():
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


def _started_as(
    script: str, arguments: tuple[str, ...], more: dict[str, Any]
) -> tuple[list[str], dict[str, str]]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        **more,
    }
    return [sys.executable, str(ROOT / "scripts" / script), *arguments], environment
