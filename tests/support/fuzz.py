# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Running a check of hypothesis's examples, few of them always and many on request, each within a time and memory."""

import os
import re
import resource
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy

FEW, MANY = 200, 10_000
EXAMPLES = [pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=pytest.mark.slow)]
"""Parameters of a test of examples."""
MOST_MS = 1000
"""Of the processor's time that a check may take of one example."""
MOST_BYTES = 100 * 2**20
"""Of memory that it may take."""
_DATA = re.compile(rb"VmData:\s+(\d+) kB")


class OutOfBoundsError(BaseException):
    """A check took too long. No parser takes it for a damaged file, as it would an Exception."""


def fuzz(
    strategy: SearchStrategy, check: Callable[[Any], Any], examples: int, first: Iterable[Any] = ()
) -> int:
    """Checks examples; where they are few, always the same ones. Prints how many there were, and the time.

    Args:
        strategy: makes them.
        check: raises for those that it does not stand; true for those that are fine, if that matters.
        examples: how many.
        first: known ones, checked before those.

    Returns:
        How many of the strategy's examples were fine.
    """
    fine: list[bool] = []
    begin = time.monotonic()
    known = sum(1 for example in first if _check(check, example) or True)

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=examples < MANY,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(example: Any) -> None:
        fine.append(bool(_check(check, example)))

    run()
    seconds = time.monotonic() - begin
    print(f"{known} known and {len(fine)} made examples, {sum(fine)} of these fine, in {seconds:.1f} s")
    return sum(fine)


def _check(check: Callable[[Any], Any], example: Any) -> Any:
    try:
        with _bounds():
            return check(example)
    except OutOfBoundsError as error:
        raise AssertionError(f"takes more than {MOST_MS} ms of the processor's time") from error


@contextmanager
def _bounds() -> Iterator[None]:
    """Ends what takes too long, and has what takes too much memory fail."""

    def end(*_: Any) -> None:
        raise OutOfBoundsError

    before = signal.signal(signal.SIGPROF, end)
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    with open("/proc/self/status", "rb") as status:
        (used,) = _DATA.search(status.read()).groups()
    resource.setrlimit(resource.RLIMIT_DATA, (int(used) * 1024 + MOST_BYTES, hard))
    signal.setitimer(signal.ITIMER_PROF, MOST_MS / 1000)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def refusal_of(
    read: Callable[[], Any], kind: type[Exception], path: Path, lines: int = 1
) -> tuple[Any, str | None]:
    """Reads a file as a user's command does.

    Args:
        read: it.
        kind: of the error that says what is wrong with it.
        path: that the error must name.
        lines: that the error may have.

    Returns:
        What was read and None, or None and what the error says.
    """
    before = sorted(os.listdir(path.parent))
    try:
        return read(), None
    except kind as error:
        text = str(error)
        each = text.splitlines()
        assert each and len(each) <= lines and all(str(path) in line for line in each), text
        assert len(text) < 2000 * lines, text
        cause: BaseException | None = error
        while cause is not None:
            assert not isinstance(cause, MemoryError) and "not enough memory" not in str(cause), text
            cause = cause.__cause__ or cause.__context__
        return None, text
    finally:
        assert sorted(os.listdir(path.parent)) == before
