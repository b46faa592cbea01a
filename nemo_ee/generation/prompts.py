# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""From what a caller hands to `generate` to token ids, checked before anything is computed."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from nemo.collections.common.tokenizers.chat_template_mixin import (
    explode_chat_template_input,
    is_chat_input,
    tokenize_with_chat_template,
)
from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
from torch import Tensor

from nemo_ee.data.chats.chat_rendering import RenderingError, prompt_ids
from nemo_ee.errors import GenerationError
from nemo_ee.generation.text import TextTokenizer


def tokenize_prompts(
    inputs: Any, tokenizer: TextTokenizer, add_bos: bool | None, position_limit: int
) -> list[list[int]]:
    """Token ids of every prompt.

    Args:
        inputs: texts; or token ids, a list of them per prompt, or one list for a single prompt; or a tuple of two
            tensors, token ids [B, S] and lengths [B]; or a chat in NeMo's form (a list of turns, each `{"role":
            [...], "content": [...]}` with one entry per conversation); or one conversation, a list of `{"role": str,
            "content": str}`; or a list of conversations.
        tokenizer: the model's.
        add_bos: put BOS before each text that does not begin with it; None for the model's rule. Chats have what
            their template writes, and token ids are taken as they are.
        position_limit: positions of the model.

    Raises:
        GenerationError: inputs of another kind, an empty prompt, one beyond the position limit, token ids
            that the tokenizer does not have, a chat without a template, a BOS that the tokenizer lacks.
    """
    if isinstance(inputs, tuple) and len(inputs) == 2 and all(isinstance(x, torch.Tensor) for x in inputs):
        prompts = _given_tokens(*inputs, tokenizer.vocab_size)
    elif not isinstance(inputs, list | tuple) or not inputs:
        raise GenerationError(
            f"inputs={inputs!r}: must be a non-empty list of prompts; wrap a single prompt in []"
        )
    elif _are_ids(inputs):
        prompts = _known_tokens([list(inputs)], tokenizer.vocab_size)
    elif all(isinstance(x, list | tuple) and (not x or _are_ids(x)) for x in inputs):
        prompts = _known_tokens([list(x) for x in inputs], tokenizer.vocab_size)
    elif is_chat_input(inputs):
        prompts = [chat_tokens(tokenizer.nemo, turns) for turns in _conversations(inputs)]
    elif all(isinstance(x, str) for x in inputs):
        prompts = [_text_tokens(tokenizer, text, add_bos, i) for i, text in enumerate(inputs)]
    elif all(isinstance(x, list) and is_chat_input(x) for x in inputs):
        prompts = [chat_tokens(tokenizer.nemo, turns) for turns in inputs]
    else:
        kinds = sorted({type(x).__name__ for x in inputs})
        raise GenerationError(
            f"inputs: a list of {', '.join(kinds)}; give texts, lists of token ids, chats, or a tuple of two "
            "tensors"
        )
    for i, prompt in enumerate(prompts):
        if (outside := max(prompt, default=0)) >= tokenizer.vocab_size:
            raise GenerationError(
                f"prompt {i}: its token {tokenizer.name(outside)!r} has the id {outside}, and the model reads ids "
                f"below {tokenizer.vocab_size}; leave it out of the prompt"
            )
        if not prompt:
            raise GenerationError(f"prompt {i}: it has no tokens; give at least one, or set add_BOS=true")
        if len(prompt) > position_limit:
            raise GenerationError(
                f"prompt {i}: {len(prompt)} tokens exceed the model's {position_limit} positions; shorten it"
            )
    return prompts


def chat_tokens(tokenizer: Any, turns: list[dict[str, str]]) -> list[int]:
    """Token ids of a conversation in the tokenizer's chat template, up to where the assistant answers.

    Args:
        tokenizer: NeMo's; a Hugging Face one uses its own (Jinja) template, others NeMo's.
        turns: `{"role": …, "content": …}` each.

    Raises:
        GenerationError: without a template, or if it refuses the turns.
    """
    require_chat_template(tokenizer)
    _conversations(turns)
    if isinstance(tokenizer, AutoTokenizer):
        try:
            return prompt_ids(tokenizer.tokenizer, turns)
        except RenderingError as error:
            raise GenerationError(f"chat: the tokenizer's template refuses these turns: {error}") from error
    names = {
        name.lower(): name for name in tokenizer.chat_template["roles"]
    }  # NeMo's are "User", "Assistant"
    if unknown := [turn["role"] for turn in turns if turn["role"].lower() not in names]:
        known = ", ".join(names.values())
        raise GenerationError(
            f"chat: the tokenizer's template refuses these turns: role {unknown[0]}; it has {known}"
        )
    known_turns = [{**turn, "role": names[turn["role"].lower()]} for turn in turns]
    # Not `text_to_ids(turns)`: of NeMo 2.4.1's tokenizers it reaches a method that is not implemented.
    try:
        ids = tokenize_with_chat_template(tokenizer, known_turns, tokenizer.chat_template)
    except Exception as error:  # it asks the tokenizer for attributes of any name
        raise GenerationError(f"chat: the tokenizer's template cannot be used: {error}") from error
    if not all(type(token) is int for token in ids):
        raise GenerationError("chat: the tokenizer's template names tokens that the tokenizer does not have")
    return ids


def require_chat_template(tokenizer: Any) -> None:
    """Raises GenerationError if the tokenizer has no chat template, or one of another form than its library's."""
    inner = tokenizer.tokenizer if isinstance(tokenizer, AutoTokenizer) else tokenizer
    if (template := getattr(inner, "chat_template", None)) is None:
        raise GenerationError(
            "chat: the tokenizer has no chat template; give plain texts, or another tokenizer"
        )
    if inner is tokenizer and "roles" not in template:
        raise GenerationError(
            "chat: model.tokenizer.chat_template has no roles; for this library NeMo's form is needed, e.g. "
            "{prefix: '', roles: {user: '{_content_} ', assistant: '{_content_} '}}"
        )


def _text_tokens(tokenizer: TextTokenizer, text: str, add_bos: bool | None, i: int) -> list[int]:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise GenerationError(
            f"prompt {i}: it is no valid Unicode ({error.reason}); leave that out"
        ) from error
    return tokenizer.encode(text, add_bos)


def _given_tokens(tokens: Tensor, lengths: Tensor, vocabulary: int) -> list[list[int]]:
    """Each prompt of token ids [B, S] and lengths [B]."""
    if tokens.dim() != 2 or lengths.shape != tokens.shape[:1] or not len(tokens):
        raise GenerationError(
            f"inputs: tensors of shapes {list(tokens.shape)} and {list(lengths.shape)}; give token ids [B, S] and "
            "lengths [B], at least one prompt"
        )
    if any(x.is_floating_point() or x.is_complex() or x.dtype == torch.bool for x in (tokens, lengths)):
        raise GenerationError(f"inputs: tensors of {tokens.dtype} and {lengths.dtype}; give whole numbers")
    prompts = []
    for i, (row, length) in enumerate(zip(tokens.tolist(), lengths.tolist(), strict=True)):
        if not 0 <= length <= len(row):
            raise GenerationError(
                f"prompt {i}: its length is {length}; give 1 to the tensor's {len(row)} tokens"
            )
        prompts.append(row[:length])
    return _known_tokens(prompts, vocabulary)


def _are_ids(values: Sequence[Any]) -> bool:
    """Whether they are whole numbers, one at least."""
    return bool(values) and all(isinstance(x, Integral) and not isinstance(x, bool) for x in values)


def _known_tokens(prompts: Sequence[Sequence[int]], vocabulary: int) -> list[list[int]]:
    for i, prompt in enumerate(prompts):
        if outside := [token for token in prompt if not 0 <= token < vocabulary]:
            raise GenerationError(
                f"prompt {i}: token id {outside[0]} is not in the vocabulary; use 0 to {vocabulary - 1}"
            )
    return [[int(token) for token in prompt] for prompt in prompts]


def _conversations(turns: Sequence[dict]) -> list[list[dict[str, str]]]:
    """Conversations from one list of turns: one where roles are strings, several in NeMo's form of lists."""
    for turn in turns:
        if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
            raise GenerationError(f"chat: turn {turn!r} must have role and content")
    if all(isinstance(turn["role"], str) for turn in turns):
        return [list(turns)]
    columns = [turn[key] for turn in turns for key in ("role", "content")]
    if not all(isinstance(column, list | tuple) for column in columns) or len({*map(len, columns)}) != 1:
        raise GenerationError("chat: every turn must list one role and one content per conversation")
    return list(explode_chat_template_input(list(turns)))
