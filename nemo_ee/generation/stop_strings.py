# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Stop strings in a text that arrives in pieces: nothing of them is passed on."""

from collections.abc import Sequence
from itertools import accumulate


class StopStrings:
    """Cuts a text in front of the stop string that is complete first, and holds back what may begin one.

    Args:
        strings: stop strings, none of them empty.

    Attributes:
        stopped: whether one was found; nothing may be fed then.
    """

    def __init__(self, strings: Sequence[str]):
        self._strings = tuple(strings)
        self._held: list[str] = []
        self.stopped = False

    def feed(self, *pieces: str) -> list[str]:
        """Adds pieces. Returns those that are settled now, oldest first, cut if the text has ended."""
        self._held += pieces
        text = "".join(self._held)
        found = [(start + len(stop), start) for stop in self._strings if (start := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._settle(len(self._held), end=min(found)[1])
        safe = len(text) - max((_overlap(text, stop) for stop in self._strings), default=0)
        ends = accumulate(map(len, self._held))
        return self._settle(sum(end <= safe for end in ends), end=safe)

    def close(self) -> list[str]:
        """The pieces that are held back, at the end of the text."""
        return self._settle(len(self._held), end=sum(map(len, self._held)))

    def _settle(self, count: int, end: int) -> list[str]:
        """The first pieces, and of them the text before `end`."""
        pieces, self._held = self._held[:count], self._held[count:]
        settled = []
        for piece in pieces:
            settled.append(piece[: max(end, 0)])
            end -= len(piece)
        return settled


def _overlap(text: str, stop: str) -> int:
    """Characters of the longest end of `text` that begins `stop`, less than all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
