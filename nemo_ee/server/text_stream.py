# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""One sequence's text as it grows: a piece per token, whole characters, nothing of a stop string."""

from collections.abc import Callable, Sequence

from nemo_ee.generation.detokenizer import Detokenizer
from nemo_ee.server.stop_strings import StopStrings


class TextStream:
    """Pieces in the order of tokens, one for each; some tokens later than they were fed.

    Args:
        decode: see `Detokenizer`.
        prompt: see `Detokenizer`.
        stop: see `StopStrings`.
        end_tokens: each ends the text, and has none of its own even where it is a word.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        prompt: Sequence[int],
        stop: Sequence[str] = (),
        end_tokens: frozenset[int] = frozenset(),
    ):
        self._detokenizer, self._stop, self._end_tokens = (
            Detokenizer(decode, prompt),
            StopStrings(stop),
            end_tokens,
        )

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found: the text has ended, and no token may be fed."""
        return self._stop.stopped

    def feed(self, token: int) -> list[str]:
        """Adds a token; returns the pieces that are settled now."""
        if token in self._end_tokens:
            return self._through_stop([*self._detokenizer.close(), ""])
        return self._through_stop(self._detokenizer.feed(token))

    def close(self) -> list[str]:
        """All pieces that are left, at the end of the sequence."""
        pieces = self._through_stop(self._detokenizer.close())
        return pieces if self.stopped else pieces + self._stop.close()

    def _through_stop(self, pieces: list[str]) -> list[str]:
        settled: list[str] = []
        for i, piece in enumerate(pieces):
            settled += self._stop.feed(piece)
            if self.stopped:
                return settled + [""] * (len(pieces) - i - 1)
        return settled
