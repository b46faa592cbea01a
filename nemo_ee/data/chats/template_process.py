# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A program that renders chat templates within limits of time, memory and length; see :mod:`chat_rendering`.

A template is a program by whoever made the tokenizer. Jinja's sandbox keeps it from the machine's files, but not from
its time and memory: `range` in `range`, `'x' * 10**10`, `'%1000000000d' % 1` and a dozen filters. Limits that hold for
all of them are the kernel's. It ends this process where a template takes too long, and refuses it memory.

Run as a script, with its parent's `sys.path` in its argument. It reads a request in a line of JSON from standard
input and writes its answer in one to standard output, until the former ends or the parent is gone.
"""

import json
import os
import resource
import select
import signal
import sys
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from typing import Any

SECONDS, SECONDS_PER_MILLION = 0.5, 0.5
"""Of the processor, for each rendering; and more for each million characters of the conversation."""
PATIENCE = 60.0
"""Seconds of the clock, should the machine have no processor to spare."""
MEMORY, MEMORY_PER_CHARACTER = 64 * 2**20, 40
"""Bytes that a rendering may take beside the program itself."""
LENGTH, LENGTH_PER_CHARACTER = 100_000, 4
"""Characters that come out at most, and more for each of the conversation."""


@lru_cache(maxsize=8)
def compiled(template: str) -> Any:
    """The template with what transformers 4.51.3 offers to templates (`utils/chat_template_utils.py`)."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`: notes where in the text its content stands."""

        tags = {"generation"}

        def __init__(self, environment: Any):
            super().__init__(environment)
            environment.extend(track=self.track)
            self._blocks: list[str] | None = None
            self._places: list[tuple[int, int]] = []

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

        @jinja2.pass_eval_context
        def _content(self, context: Any, caller: Any) -> str:
            text = caller()
            if self._blocks or self._places:
                start = len("".join(self._blocks or ()))
                self._places.append((start, start + len(text)))
            return text

        @contextmanager
        def track(self, blocks: list[str], places: list[tuple[int, int]]):
            self._blocks, self._places = blocks, places
            try:
                yield
            finally:
                self._blocks, self._places = None, []

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def render(template: str, values: dict[str, Any], most: int) -> tuple[str, list[tuple[int, int]]]:
    """The text, and where in it the content of `{% generation %}` stands.

    Args:
        template: Jinja's.
        values: what it is given.
        most: characters that may come out.

    Raises:
        ValueError: more come out.
        Exception: what the template raises.
    """
    program = compiled(template)
    blocks: list[str] = []
    places: list[tuple[int, int]] = []
    length = 0
    with program.environment.track(blocks, places):
        for block in program.generate(**values):
            blocks.append(block)
            length += len(block)
            if length > most:
                raise ValueError(f"it writes more than {most} characters")
    return "".join(blocks), places


def answer(line: str) -> dict[str, Any]:
    """What is rendered for a request, or the error.

    The limits depend on what the conversation alone has in characters: the template is not to raise its own.
    """
    request = json.loads(line)
    size = request["size"]
    _limit(SECONDS + SECONDS_PER_MILLION * size / 1e6, MEMORY + MEMORY_PER_CHARACTER * (size + len(line)))
    try:
        most = LENGTH + LENGTH_PER_CHARACTER * size
        text, places = render(request["template"], request["values"], most)
        return {"text": text, "places": places}
    except MemoryError:
        return {"error": f"it takes more than {MEMORY >> 20} MiB"}
    except RecursionError:
        return {"error": "it is nested too deeply"}
    except Exception as error:  # it raises what it likes
        return {"error": str(error)[:1000] or type(error).__name__}


def _limit(seconds: float, memory: int) -> None:
    """Ends this process after so much of the processor's time, and gives it so much more memory."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + memory, resource.RLIM_INFINITY))


def _unlimited() -> None:
    for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
        signal.setitimer(timer, 0)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def main() -> None:
    """Answers requests."""
    sys.path[:] = json.loads(sys.argv[1])
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        # meant for the parent, from the terminal or whoever ends the job; the parent may need this process still
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    parent = os.getppid()
    import jinja2.ext
    import jinja2.sandbox  # noqa: F401, so that the first request need not import them

    while os.getppid() == parent:
        # standard input ends with the parent, unless a process that was forked from it has it open, too
        if not select.select([sys.stdin.buffer], [], [], 1.0)[0]:
            continue
        line = sys.stdin.buffer.readline()
        if not line:
            return
        found = answer(line.decode())
        _unlimited()
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
