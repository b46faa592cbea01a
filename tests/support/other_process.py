# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A second Python process for tests of what two do at once, or of what one leaves when it is killed."""

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]


class OtherProcess:
    """Runs `code` with the arguments in `sys.argv[1:]`.

    Args:
        code: what it does; it hears from us through its standard input.
        arguments: for it.
        environment: variables beside ours.
    """

    def __init__(self, code: str, *arguments: object, **environment: str):
        self._process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @property
    def number(self) -> int:
        """Of the process."""
        return self._process.pid

    def line(self) -> str:
        """The next line that it prints."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().rstrip("\n")

    def say(self, text: str) -> None:
        """Gives it a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(text + "\n")
        self._process.stdin.flush()

    def go_on(self) -> None:
        """Ends its standard input, which it waits for."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def wait(self) -> int:
        """Its exit status."""
        return self._process.wait(timeout=60)

    def kill(self) -> None:
        """Sends SIGKILL, and waits for its end."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(timeout=60)

    def close(self) -> None:
        """Ends it, however it is."""
        if self._process.poll() is None:
            self.kill()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()


@contextmanager
def other_process(code: str, *arguments: object, **environment: str) -> Iterator[OtherProcess]:
    """An `OtherProcess` that ends with the body."""
    process = OtherProcess(code, *arguments, **environment)
    try:
        yield process
    finally:
        process.close()
