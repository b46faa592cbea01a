# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Builds a fast tokenizer that gives the ids llama.cpp gives for the same GGUF file."""

from typing import Any

from nemo_ee.checkpoint.gguf.pre_tokenizers import pre_tokenizer
from nemo_ee.checkpoint.gguf.vocabulary import BYTE, CONTROL, UNKNOWN, UNUSED, USER_DEFINED, Vocabulary

_SPACE = "▁"


def build(vocabulary: Vocabulary) -> Any:
    """A ``PreTrainedTokenizerFast``; tokens that the file calls control are special, user-defined are whole.

    transformers' own conversion of GGUF files uses GPT-2's rule for every byte-level model, splits
    user-defined tokens and puts BOS where EOS belongs.
    """
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    backend = _sentencepiece(vocabulary) if vocabulary.rule is None else _byte_level(vocabulary)
    types = list(zip(vocabulary.tokens, vocabulary.types, strict=True))
    special = [token for token, type_ in types if type_ in (CONTROL, UNKNOWN)]
    whole = [token for token, type_ in types if type_ == USER_DEFINED]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in whole])
    if vocabulary.add_bos:
        bos = vocabulary.special["bos_token"]
        backend.post_processor = _bos_first(vocabulary.tokens[bos], bos)
    named = {name: vocabulary.tokens[number] for name, number in vocabulary.special.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        chat_template=vocabulary.chat_template,
        # by their flag alone NeMo would not know them: it asks for all_special_tokens
        additional_special_tokens=[token for token in special if token not in named.values()],
        **named,
    )


def _bos_first(token: str, number: int) -> Any:
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token}:1 $B:1", special_tokens=[(token, number)]
    )


def _byte_level(vocabulary: Vocabulary) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    rule = vocabulary.rule
    assert rule is not None
    ids = {token: number for number, token in enumerate(vocabulary.tokens)}
    backend = Tokenizer(models.BPE(ids, list(vocabulary.merges), ignore_merges=rule.ignore_merges))
    if rule.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizer(rule)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend


def _sentencepiece(vocabulary: Vocabulary) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    ids = {token: number for number, token in enumerate(vocabulary.tokens)}
    unknown = next(
        (token for token, type_ in zip(ids, vocabulary.types, strict=True) if type_ == UNKNOWN), None
    )
    backend = Tokenizer(
        models.BPE(ids, _merges(vocabulary), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = [normalizers.Prepend(_SPACE)] if vocabulary.space_prefix else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if vocabulary.space_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """sentencepiece joins the pair that makes the token of the highest score; BPE the first merge in a list."""
    ordinary = {
        token: score
        for token, score, type_ in zip(vocabulary.tokens, vocabulary.scores, vocabulary.types, strict=False)
        if type_ not in (CONTROL, UNKNOWN, USER_DEFINED, UNUSED, BYTE)
    }
    merges = []
    for token, score in ordinary.items():
        for cut in range(1, len(token)):
            if (left := token[:cut]) in ordinary and (right := token[cut:]) in ordinary:
                merges.append((-score, left, right))
    merges.sort(key=lambda merge: merge[0])  # stable: equal scores in order of ids
    return [(left, right) for _, left, right in merges]
