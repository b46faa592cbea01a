# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Where the program waits for the device.

On a GPU the program queues kernels and runs ahead of them. Whatever needs a value on the host, or copies between
host and device outright, waits until the queue is empty: the device then idles until the next kernel is queued.
What counts is what `torch.cuda.set_sync_debug_mode` would name, and waiting for streams and events.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

OURS = "/nemo_ee/"
"""In the paths of the package's files."""

SKIPPED = ("/torch/", "/tests/support/pretend_gpu/", "<frozen ", "<string>")
"""In the paths of files that wait on somebody's behalf."""


@dataclass(frozen=True)
class Wait:
    """One wait.

    Attributes:
        kind: the operation, e.g. ``aten.nonzero.default``, or "upload", "download", "synchronize".
        line: the innermost line of the package, as ``file:line function``; else the innermost outside torch.
        caller: the innermost line outside torch, which may be NeMo's or Megatron's.
    """

    kind: str
    line: str
    caller: str


class _State:
    watchers: list[list[Wait]] = []
    total = 0
    capturing = 0


def record(kind: str) -> None:
    """Notes a wait.

    Raises:
        RuntimeError: a graph is being captured, which cannot record one.
    """
    if _State.capturing:
        raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing: {kind}")
    _State.total += 1
    if _State.watchers:
        wait = Wait(kind, *_lines())
        for watcher in _State.watchers:
            watcher.append(wait)


def total() -> int:
    """Waits of this process so far."""
    return _State.total


@contextmanager
def counting() -> Iterator[list[Wait]]:
    """Collects the waits within, in all threads."""
    seen: list[Wait] = []
    _State.watchers = [*_State.watchers, seen]
    try:
        yield seen
    finally:
        _State.watchers = [watcher for watcher in _State.watchers if watcher is not seen]


def begin_capture() -> None:
    """A graph records from now on."""
    _State.capturing += 1


def end_capture() -> None:
    """It records no longer."""
    _State.capturing -= 1


def is_capturing() -> bool:
    """Whether a graph records."""
    return _State.capturing > 0


class Window:
    """The waits from the first call of `start` to the last one of `mark`.

    Attributes:
        counting: `start` was called.
        marks: how often `mark` was.
    """

    def __init__(self) -> None:
        self.counting, self.marks = False, 0
        self._seen: list[Wait] = []
        self._first = self._last = 0

    def start(self, *_: Any) -> None:
        """The first call counts."""
        if not self.counting:
            self.counting, self._first = True, len(self._seen)

    def mark(self, *_: Any) -> None:
        """The last call counts."""
        self.marks, self._last = self.marks + 1, len(self._seen)

    def between(self) -> list[str]:
        """What waited, and where."""
        return describe(self._seen[self._first : self._last]).splitlines()

    @contextmanager
    def watching(self) -> Iterator["Window"]:
        """Watches all threads."""
        with counting() as self._seen:
            yield self


def of_steps(kind: type) -> type:
    """A model class whose training steps note in `waits` what waits between first forward and last backward."""

    class Watched(kind):
        waits: list[list[str]]

        def fwd_bwd_step(self, dataloader_iter: Any, forward_only: bool, *more: Any) -> Any:
            if forward_only:
                return super().fwd_bwd_step(dataloader_iter, forward_only, *more)
            seen = Window()
            handles = [self.gpt.decoder.register_forward_pre_hook(seen.start)]
            for parameter in self.gpt.parameters():
                if parameter.requires_grad:
                    handles.append(parameter.register_post_accumulate_grad_hook(seen.mark))
            try:
                with seen.watching():
                    result = super().fwd_bwd_step(dataloader_iter, forward_only, *more)
            finally:
                for handle in handles:
                    handle.remove()
            assert seen.counting and seen.marks, "a forward and a backward pass were seen"
            self.waits = [*getattr(self, "waits", []), seen.between()]
            return result

    return Watched


def describe(waits: list[Wait]) -> str:
    """One line per place and kind, the most frequent first."""
    counts = Counter((wait.line, wait.kind, wait.caller) for wait in waits)
    return "\n".join(f"{n} x {kind} at {line} ({caller})" for (line, kind, caller), n in counts.most_common())


def _lines() -> tuple[str, str]:
    frame: FrameType | None = sys._getframe(2)
    caller = ""
    while frame is not None:
        path = frame.f_code.co_filename
        if not any(part in path for part in SKIPPED):
            line = f"{'/'.join(path.rsplit('/', 3)[1:])}:{frame.f_lineno} {frame.f_code.co_name}"
            caller = caller or line
            if OURS in path:
                return line, caller
        frame = frame.f_back
    return caller, caller
