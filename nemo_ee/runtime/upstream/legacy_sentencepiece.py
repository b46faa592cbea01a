# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What NeMo's legacy mode of SentencePiece tokenizers lacks."""

from typing import Any


def name_special_pieces(tokenizer: Any) -> None:
    """Gives a SentencePiece tokenizer of NeMo's legacy mode the special tokens that its own file has.

    That mode knows BOS, EOS and padding only as far as `special_tokens` names them, and otherwise raises
    AttributeError where NeMo's loops and data sets ask for their ids.

    Args:
        tokenizer: NeMo's; of another kind it stays as it is.
    """
    if not getattr(tokenizer, "legacy", False) or not hasattr(tokenizer, "id_to_special_token"):
        return
    for name in ("bos", "eos", "pad"):
        token = getattr(tokenizer.tokenizer, f"{name}_id")()  # -1: none
        if token >= 0 and getattr(tokenizer, f"{name}_token", None) is None:
            setattr(tokenizer, f"{name}_token", tokenizer.tokenizer.id_to_piece(token))
