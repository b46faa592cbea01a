# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""When a sequence ends: EOS, or generated text that ends with one of the end strings."""

from collections.abc import Callable, Sequence
from typing import Any

from nemo_ee.inference.text import known_id, text_decoder

END_OF_SEQUENCE = "<|endoftext|>"
"""The end string that stands for EOS, whatever the tokenizer calls it (NeMo's convention)."""
TAIL_TOKENS = 16
"""Tokens decoded beyond an end string's bytes, for those that decode to nothing."""


class StopRule:
    """Decides whether generated tokens end a sequence.

    End strings that are one special token of the tokenizer are compared by id, as its text may be empty, others
    by decoding the tail of what was generated; the prompt never counts.

    Args:
        tokenizer: NeMo's.
        end_strings: see `SamplingOptions`.

    Attributes:
        eos: EOS token id; None where the tokenizer has none.
        token_ids: tokens that end a sequence, EOS among them.
        texts: end strings to look for in decoded text.
    """

    def __init__(self, tokenizer: Any, end_strings: Sequence[str]):
        self.eos = known_id(tokenizer.eos_id)
        self.token_ids, self.texts = {self.eos} - {None}, []
        self._decode = text_decoder(tokenizer)
        for text in end_strings:
            if text == END_OF_SEQUENCE and self.eos is not None:
                continue
            token = unseen_token_id(tokenizer, text, self._decode)
            if token is None:
                self.texts.append(text)
            else:
                self.token_ids.add(token)
        self._tail = max((len(text.encode()) for text in self.texts), default=0) + TAIL_TOKENS

    def __call__(self, generated: Sequence[int]) -> bool:
        """Whether a sequence ends after these generated tokens, at least one."""
        if generated[-1] in self.token_ids:
            return True
        if not self.texts:
            return False
        text = self._decode(generated[-self._tail :])
        return any(text.endswith(end) for end in self.texts)


def special_token_id(tokenizer: Any, text: str) -> int | None:
    """The id of `text` if it is one token behind other text, else None (NeMo's rule)."""
    before = tokenizer.text_to_ids("<extra_id_1>")
    both = tokenizer.text_to_ids(f"<extra_id_1>{text}")
    return both[-1] if len(both) == len(before) + 1 and both[:-1] == before else None


def unseen_token_id(tokenizer: Any, text: str, decode: Callable[[list[int]], str]) -> int | None:
    """The id of the special token of that name, if it has no text; else None.

    An ordinary word that is one token may also come as part of others, and what is not in the vocabulary is one token
    too, the unknown one.

    Args:
        tokenizer: NeMo's.
        text: the name.
        decode: token ids to text.
    """
    token = special_token_id(tokenizer, text)
    if token is None or decode([token]):
        return None
    return token if tokenizer.ids_to_tokens([token]) == [text] else None
