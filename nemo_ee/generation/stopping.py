# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""When a sequence ends: a token that ends texts, or generated text that ends with one of the end strings."""

from collections.abc import Sequence

from nemo_ee.generation.text import TextTokenizer

END_OF_SEQUENCE = "<|endoftext|>"
"""The end string that stands for EOS, whatever the tokenizer calls it (NeMo's convention)."""
TAIL_TOKENS = 16
"""Tokens decoded beyond an end string's bytes, for those that decode to nothing."""


class StopRule:
    """Decides whether generated tokens end a sequence.

    End strings that are one special token of the tokenizer are compared by id, as it has no text, others
    by decoding the tail of what was generated; the prompt never counts.

    Args:
        tokenizer: the model's.
        end_strings: see `SamplingOptions`.

    Attributes:
        eos: tokens that end every text; empty where the model has none.
        token_ids: tokens that end a sequence, those among them.
        texts: end strings to look for in decoded text.
    """

    def __init__(self, tokenizer: TextTokenizer, end_strings: Sequence[str]):
        self.eos = tokenizer.eos_ids
        self._decode = tokenizer.decode
        said = [text for text in end_strings if text != END_OF_SEQUENCE or not self.eos]
        self.token_ids, self.texts = end_tokens(tokenizer, said)
        self._tail = max((len(text.encode()) for text in self.texts), default=0) + TAIL_TOKENS

    def __call__(self, generated: Sequence[int]) -> bool:
        """Whether a sequence ends after these generated tokens, at least one."""
        if generated[-1] in self.token_ids:
            return True
        if not self.texts:
            return False
        text = self._decode(generated[-self._tail :])
        return any(text.endswith(end) for end in self.texts)


def end_tokens(tokenizer: TextTokenizer, strings: Sequence[str]) -> tuple[frozenset[int], list[str]]:
    """Tokens that end a sequence: those that end every text, and strings that are special tokens, whose text nobody
    sees; and the other strings.

    Args:
        tokenizer: the model's.
        strings: end strings.
    """
    special = {text: tokenizer.special_id(text) for text in strings}
    ids = {token for token in special.values() if token is not None}
    return frozenset({*tokenizer.eos_ids, *ids}), [text for text, token in special.items() if token is None]
