# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""One sequence's text as it grows: a piece per token, whole characters, nothing of a stop string."""

from collections.abc import Callable, Sequence

from nemo_ee.generation.detokenizer import Detokenizer
from nemo_ee.generation.stop_strings import StopStrings


class TextStream:
    """The `GrowingText` of a sequence.

    Args:
        decode: see `Detokenizer`.
        prompt: see `Detokenizer`.
        stop: see `StopStrings`.

    Attributes:
        pieces: that are settled, one for each of the first tokens.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt: Sequence[int], stop: Sequence[str] = ()):
        self._detokenizer, self._stop = Detokenizer(decode, prompt), StopStrings(stop)
        self.pieces: list[str] = []

    def feed(self, token: int | None) -> bool:
        """Adds a token, None for one without text; returns whether a stop string is complete: none may follow."""
        new = [*self._detokenizer.close(), ""] if token is None else self._detokenizer.feed(token)
        self.pieces += self._stop.feed(*new)
        return self._stop.stopped

    def close(self) -> bool:
        """Settles what waits, at the end of the sequence; returns whether a stop string is complete."""
        if not self._stop.stopped:
            self.pieces += self._stop.feed(*self._detokenizer.close())
        if not self._stop.stopped:
            self.pieces += self._stop.close()
        return self._stop.stopped
