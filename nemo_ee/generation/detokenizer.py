# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""From tokens, one by one, to the text that each adds, in time that does not grow with the text."""

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"
"""What a tokenizer decodes a part of a multi-byte character to."""
LONGEST_HELD = 3
"""Tokens that may wait for the rest of their character: of UTF-8's at most four bytes the last completes it."""
LONGEST_CONTEXT = 32
"""Tokens of the prompt that are looked through for a context."""


class Detokenizer:
    """Decodes a short window at the end of the text: the last tokens that gave text, and those behind them.

    A decoder may treat the beginning of a text differently (drop a leading space), and may decode the bytes of
    a character only together. So what a token adds is the difference of two decoded windows, and tokens whose
    text ends within a character wait for the next. The pieces together are what decoding everything gives,
    less the decoded prompt.

    Args:
        decode: token ids to text, e.g. `ids_to_text` of NeMo's tokenizers.
        prompt: token ids before the first.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt: Sequence[int]):
        self._decode = decode
        self._context = _context(decode, prompt)
        self._context_text = decode(self._context)
        self._held: list[int] = []

    def feed(self, token: int) -> list[str]:
        """Adds a token. Returns the pieces of all tokens that are settled now, oldest first.

        The tokens of one character give "" but for its last one; so does a special token.
        """
        self._held.append(token)
        text = self._decode(self._context + self._held)
        if not text.endswith(UNFINISHED):
            return self._release(len(self._held), text)
        if len(self._held) <= LONGEST_HELD:
            return []
        return self._release(1)  # no character is that long: these bytes are broken

    def close(self) -> list[str]:
        """The pieces of the tokens that still wait; an unfinished character shows as U+FFFD."""
        return self._release(len(self._held)) if self._held else []

    def _release(self, count: int, text: str | None = None) -> list[str]:
        """The pieces of the first tokens that wait; `text` is theirs behind the context, where that is known."""
        group, self._held = self._held[:count], self._held[count:]
        piece = (self._decode(self._context + group) if text is None else text)[len(self._context_text) :]
        if piece:  # tokens without text would leave the next one at the beginning of a text
            self._context, self._context_text = group, self._decode(group)
        elif (
            not self._context_text
        ):  # the text begins with what has none: a space that is dropped there, or BOS
            self._context = (self._context + group)[-LONGEST_CONTEXT:]
        return [""] * (count - 1) + [piece]


def _context(decode: Callable[[list[int]], str], prompt: Sequence[int]) -> list[int]:
    """The fewest last tokens of the prompt that give whole characters; none if there are no such."""
    for count in range(1, min(len(prompt), LONGEST_CONTEXT) + 1):
        tokens = list(prompt[-count:])
        text = decode(tokens)
        if text and UNFINISHED not in text:
            return tokens
    return []
