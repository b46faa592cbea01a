# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Token ids to text, often and quickly."""

from collections.abc import Callable, Sequence
from typing import Any

from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer


def known_id(token: int | None) -> int | None:
    """A tokenizer's BOS or EOS id; None where it has none, which SentencePiece writes -1."""
    return None if token is None or token < 0 else token


def text_decoder(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    """`ids_to_text` of NeMo's tokenizers; special tokens have no text.

    That of Hugging Face tokenizers asks for all special tokens once per token, which takes most of its time;
    here they are asked for once.

    Args:
        tokenizer: NeMo's.
    """
    if not isinstance(tokenizer, AutoTokenizer):
        return lambda ids: tokenizer.ids_to_text(list(ids))
    special = frozenset(tokenizer.tokenizer.all_special_ids)
    return lambda ids: tokenizer.ids_to_text(
        [token for token in ids if token not in special], remove_special_tokens=False
    )
