# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Generated tokens as NeMo's `OutputType`, with the exits that they came from."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_ee.decoding.generated_sequence import GeneratedSequence
from nemo_ee.generation.text import TextTokenizer

SPECIAL_TOKENS = ("pad_token", "eos_token", "bos_token", "cls_token", "unk_token", "sep_token", "mask_token")


def to_output(results: Sequence[GeneratedSequence], tokenizer: TextTokenizer) -> dict[str, Any]:
    """NeMo's dictionary for generated text.

    `sentences`, `tokens`, `token_ids` and `offsets` cover prompt and continuation, each sentence up to its
    own end. `logprob` and `full_logprob` are None, or with `all_probs` per sentence [n] and [n, V] for the n generated
    tokens. `logprobs` and `prompt_logprobs` are None, or per sentence a list of `TokenLogprobs.plain`, of the n
    generated tokens, and of the prompt's with None for its first.
    `finish_reason` has per sentence "stop" or "length".
    `early_exit` has per sentence the `exit_layers` and `confidences` of the n generated tokens, and the fields
    of `SequenceStatistics`.
    """
    ids = [result.prompt + result.tokens for result in results]
    output = text_fields(ids, tokenizer)
    output["logprob"] = output["full_logprob"] = None
    if any(result.full_logprobs for result in results):
        whole = output["full_logprob"] = [torch.stack(r.full_logprobs) for r in results]
        output["logprob"] = [
            torch.stack([row[token] for row, token in zip(rows, r.tokens, strict=True)])
            for rows, r in zip(whole, results, strict=True)
        ]
    sampling = results[0].request.sampling
    for name in ("logprobs", "prompt_logprobs"):
        kept = [[each and each.plain() for each in getattr(r, name)] for r in results]
        output[name] = None if getattr(sampling, name) is None else kept
    output["finish_reason"] = [result.finish_reason for result in results]
    output["early_exit"] = [
        {"exit_layers": result.exit_layers, "confidences": result.confidences, **vars(result.statistics)}
        for result in results
    ]
    return output


def to_prompt_logprobs(
    prompts: Sequence[list[int]],
    logprobs: Sequence[Tensor],
    full_logprobs: Sequence[Tensor] | None,
    tokenizer: TextTokenizer,
    texts: list[str] | None = None,
) -> dict[str, Any]:
    """NeMo's dictionary for `compute_logprob`: the prompts alone, of n tokens each, with their
    log-probabilities.

    Args:
        prompts: token ids.
        logprobs: per prompt [n]: entry i is that of token i + 1, the last one that of the most probable token after
            the prompt (as in NeMo 2.4.1).
        full_logprobs: [n, V] per prompt; row i predicts token i + 1. None where they are not asked for.
        tokenizer: the model's.
        texts: the prompts as they were given, for `sentences`; None decodes them.
    """
    output = text_fields(list(prompts), tokenizer)
    output["logprob"] = list(logprobs)
    output["full_logprob"] = None if full_logprobs is None else list(full_logprobs)
    if texts is not None:
        output["sentences"] = texts
    return output


def text_fields(ids: list[list[int]], tokenizer: TextTokenizer) -> dict[str, Any]:
    """`sentences`, `tokens`, `token_ids` and `offsets` (where each token starts, in characters).

    Special tokens have their names in `tokens`, as in NeMo, and no text in `sentences`.
    """
    named = {getattr(tokenizer.nemo, name, None) for name in SPECIAL_TOKENS} - {None}
    tokens = [token_texts(sequence, tokenizer) for sequence in ids]
    offsets = []
    for sequence, words in zip(ids, tokens, strict=True):
        starts = [0]
        for token, word in zip(sequence[:-1], words, strict=False):
            starts.append(starts[-1] + (0 if word in named or token in tokenizer.special else len(word)))
        offsets.append(starts)
    sentences = [tokenizer.decode(sequence) for sequence in ids]
    return {"sentences": sentences, "tokens": tokens, "token_ids": ids, "offsets": offsets}


def token_texts(ids: Sequence[int], tokenizer: TextTokenizer) -> list[str]:
    """Each token's own text as the tokenizer stores it; bytes are decoded where the tokenizer tells how.

    Added tokens are not stored as bytes and may have characters that stand for none, e.g. spaces.
    """
    words = [tokenizer.name(token) for token in ids]
    decoder = getattr(getattr(tokenizer.nemo, "tokenizer", None), "byte_decoder", None)
    if decoder is None:
        return words
    return [
        bytes(decoder[c] for c in word).decode("utf-8", errors="replace")
        if all(c in decoder for c in word)
        else word
        for word in words
    ]
