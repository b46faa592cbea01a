# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What tokenizers say of their special tokens, in one form for all libraries. Imports neither NeMo nor transformers."""

from collections.abc import Sequence
from typing import Any


def known_id(token: int | None) -> int | None:
    """A tokenizer's BOS or EOS id; None where it has none, which SentencePiece writes -1."""
    return None if token is None or token < 0 else token


def tokens_before_a_text(tokenizer: Any) -> list[int]:
    """What a transformers tokenizer puts before every text by its own rule: its BOS, or nothing.

    The rule is whatever `tokenizer(text)` does: a template (`<s> $A`), `add_bos_token`, or code. What it puts behind
    texts (an EOS) is left out: a prompt is to be continued.

    Args:
        tokenizer: of transformers.
    """
    bare, whole = (tokenizer("a", add_special_tokens=add).input_ids for add in (False, True))
    if not bare:  # neither that letter nor a token for what is unknown
        return whole[:-1] if whole[-1:] == [tokenizer.eos_token_id] else whole
    starts = (i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return whole[: next(starts, 0)]


def beginning(own_rule: list[int], bos: int | None, add_bos: bool | None) -> list[int]:
    """What texts begin with.

    Args:
        own_rule: what the tokenizer puts there by itself.
        bos: its BOS; None where it has none.
        add_bos: None for its own rule, or what goes before that.

    Raises:
        LookupError: a BOS that there is not.
    """
    if add_bos is None or (add_bos and own_rule):
        return list(own_rule)
    if add_bos and bos is None:
        raise LookupError("the tokenizer has no BOS token")
    return [bos] if add_bos else []


def joined(before: Sequence[int], ids: list[int]) -> list[int]:
    """A text's ids behind what comes before it, which is not put there twice: a text may write its BOS itself."""
    return ids if ids[: len(before)] == list(before) else [*before, *ids]


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Tokens without text of their own: those flagged special in a transformers tokenizer, BOS, EOS, padding and the
    like among them.

    Args:
        tokenizer: of transformers.
    """
    flagged = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return frozenset(flagged | set(tokenizer.all_special_ids))


def named_templates(template: dict | list) -> dict:
    """Chat templates by their names, as transformers holds them; files list them as `{name, template}`."""
    return template if isinstance(template, dict) else {each["name"]: each["template"] for each in template}
