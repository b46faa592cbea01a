# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What ends a sequence: a token that ends texts, or an end string, wherever in a token it is complete."""

from collections.abc import Sequence

from nemo_ee.decoding.generated_sequence import GeneratedSequence
from nemo_ee.decoding.request import GenerationRequest
from nemo_ee.generation.text import TextTokenizer
from nemo_ee.generation.text_stream import TextStream

END_OF_SEQUENCE = "<|endoftext|>"
"""The end string that stands for EOS, whatever the tokenizer calls it (NeMo's convention)."""


class StopRule:
    """Begins sequences that end by end strings; the prompt never counts.

    Args:
        tokenizer: the model's.
        end_strings: see `SamplingOptions`.
        always_text: sequences have a `TextStream` also where there is no end string to look for.

    Attributes:
        token_ids: tokens that end a sequence.
        texts: end strings to look for in decoded text.
    """

    def __init__(self, tokenizer: TextTokenizer, end_strings: Sequence[str], always_text: bool = False):
        self._tokenizer, self._always = tokenizer, always_text
        said = [text for text in end_strings if text != END_OF_SEQUENCE or not tokenizer.eos_ids]
        self.token_ids, self.texts = end_tokens(tokenizer, said)

    def begin(
        self, prompt: list[int], request: GenerationRequest, limit: int, seed: int = 0
    ) -> GeneratedSequence:
        """A sequence that is still to be generated; see there."""
        text = TextStream(self._tokenizer.decode, prompt, self.texts) if self.texts or self._always else None
        return GeneratedSequence(prompt, request, self.token_ids, self._tokenizer.eos_ids, limit, seed, text)


def end_tokens(
    tokenizer: TextTokenizer, strings: Sequence[str], ignore_eos: bool = False
) -> tuple[frozenset[int], list[str]]:
    """Tokens that end a sequence: those that end every text, and strings that are special tokens, whose text nobody
    sees; and the other strings.

    Args:
        tokenizer: the model's.
        strings: end strings.
        ignore_eos: tokens that end every text do not end this one, unless a string names them.
    """
    special = {text: tokenizer.special_id(text) for text in strings}
    ids = {token for token in special.values() if token is not None}
    always = () if ignore_eos else tokenizer.eos_ids
    return frozenset({*always, *ids}), [text for text, token in special.items() if token is None]
