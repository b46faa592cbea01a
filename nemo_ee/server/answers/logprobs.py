# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Log-probabilities in OpenAI's two forms: lists side by side for completions, one object per token for chats."""

from collections.abc import Callable, Sequence
from typing import Any

from nemo_ee.decoding.logprobs import TokenLogprobs

Json = dict[str, Any]
Spell = Callable[[int], bytes]
"""The bytes of a token, see `TextTokenizer.token_bytes`."""


def token_text(spelt: bytes) -> str:
    """How a token is written: its text, or where it ends within a character `bytes:` and its bytes, as OpenAI does."""
    try:
        return spelt.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelt)


def of_completion(
    kept: Sequence[TokenLogprobs | None], tokens: Sequence[int], offsets: Sequence[int], spell: Spell
) -> Json:
    """The `logprobs` of a completion.

    The token itself is among `top_logprobs`, as OpenAI says, also where it is not one of the most probable.

    Args:
        kept: of n tokens; None for a prompt's first, of which nothing is known.
        tokens: [n] their ids.
        offsets: [n] where they begin in the text, in characters.
        spell: names them.
    """
    return {
        "tokens": [token_text(spell(token)) for token in tokens],
        "token_logprobs": [each and each.logprob for each in kept],
        "top_logprobs": [each and _top(each, spell) for each in kept],
        "text_offset": list(offsets),
    }


def _top(said: TokenLogprobs, spell: Spell) -> dict[str, float]:
    """By text; where several tokens have one, the most probable counts."""
    found: dict[str, float] = {}
    for token, value in (*said.top, (said.token, said.logprob)):
        found.setdefault(token_text(spell(token)), value)
    return found


def of_chat(kept: Sequence[TokenLogprobs], spell: Spell) -> Json:
    """The `logprobs` of a chat's choice."""
    content = [
        {
            **_token(each.token, each.logprob, spell),
            "top_logprobs": [_token(*one, spell) for one in each.top],
        }
        for each in kept
    ]
    return {"content": content, "refusal": None}


def _token(token: int, logprob: float, spell: Spell) -> Json:
    spelt = spell(token)
    return {"token": token_text(spelt), "bytes": list(spelt), "logprob": logprob}
