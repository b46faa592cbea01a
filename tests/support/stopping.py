# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Where a sequence ends that a model generates."""

from collections.abc import Sequence
from typing import Any


def ended(
    tokenizer: Any, tokens: Sequence[int], end_strings: Sequence[str], prompt: Sequence[int] = ()
) -> int | None:
    """How many of the tokens there are when the sequence ends; None if it does not."""
    from nemo_ee.decoding.request import GenerationRequest
    from nemo_ee.generation.stopping import StopRule

    sequence = StopRule(tokenizer, end_strings).begin(list(prompt), GenerationRequest(), len(tokens) + 1)
    for count, token in enumerate(tokens, start=1):
        if not sequence.commit(token, 8, 0.5):
            return count
    return None
