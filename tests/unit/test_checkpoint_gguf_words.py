# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The rules of ``tokenizer.ggml.pre`` against the models' own tokenizer.json, and against the module ``regex``."""

import json

import pytest
import regex

from nemo_ee.checkpoint.gguf.pre_tokenizers import RULES, pre_tokenizer
from nemo_ee.checkpoint.gguf.tokenizer import build
from nemo_ee.checkpoint.gguf.vocabulary import Vocabulary
from tests.support import tiny_gguf
from tests.support.awkward_texts import TEXTS, random_texts

# as the models' tokenizer.json files have them
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

GPT2_STEP = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BYTES_STEP = {**GPT2_STEP, "use_regex": False}
DIGITS_STEP = {"type": "Digits", "individual_digits": True}


def split_step(expression):
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}


# name: (steps of tokenizer.json, the same as expressions that each cut what the former left)
OWN_RULES = {
    "gpt-2": ([GPT2_STEP], [GPT2]),
    "llama-bpe": ([split_step(LLAMA3), BYTES_STEP], [LLAMA3]),
    "smollm": ([DIGITS_STEP, GPT2_STEP], [r"\p{N}", GPT2]),
    "qwen2": ([split_step(QWEN2), BYTES_STEP], [QWEN2]),
    "tekken": ([split_step(TEKKEN), BYTES_STEP], [TEKKEN]),
    "gpt-4o": ([split_step(GPT4O), BYTES_STEP], [GPT4O]),
    "deepseek-coder": (
        [
            split_step("[\r\n]"),
            split_step(r"\s?\p{L}+"),
            split_step(r"\s?\p{P}+"),
            split_step("[一-龥ࠀ-一가-퟿]+"),
            DIGITS_STEP,
            BYTES_STEP,
        ],
        ["[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"],
    ),
    # llama.cpp's own; no model publishes it
    "default": (None, [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"]),
}


def pieces(text, expressions):
    """The slow reference: each expression cuts what the former left, by the module ``regex``."""
    parts = [text] if text else []
    for expression in expressions:
        cut = []
        for part in parts:
            end = 0
            for match in regex.finditer(expression, part):
                cut += [part[end : match.start()], match.group()]
                end = match.end()
            cut.append(part[end:])
        parts = [part for part in cut if part]
    return parts


def in_bytes(piece):
    from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

    alphabet = bytes_to_unicode()
    return "".join(alphabet[byte] for byte in piece.encode())


@pytest.mark.parametrize("name", OWN_RULES)
def test_words_are_those_of_the_published_expressions(name):
    split = pre_tokenizer(RULES[name])
    for text in TEXTS + random_texts():
        found = [piece for piece, _ in split.pre_tokenize_str(text)] if text else []
        assert found == [in_bytes(piece) for piece in pieces(text, OWN_RULES[name][1])], repr(text)


def trained(name, size=420):
    """A byte-level tokenizer with a model's own rule, as its tokenizer.json would be, trained on `TEXTS`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    empty = json.loads(Tokenizer(models.BPE(ignore_merges=RULES[name].ignore_merges)).to_str())
    empty["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": OWN_RULES[name][0]}
    empty["normalizer"] = {"type": "NFC"} if name == "qwen2" else None
    empty["decoder"] = GPT2_STEP
    backend = Tokenizer.from_str(json.dumps(empty))
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    return backend


@pytest.mark.parametrize("name", [name for name, (steps, _) in OWN_RULES.items() if steps])
def test_ids_are_those_of_the_models_own_tokenizer(tmp_path, name):
    own = trained(name)
    path = tiny_gguf.write(
        tmp_path / "m.gguf", vocabulary=tiny_gguf.vocabulary_of(own, name), keys={"llama.vocab_size": None}
    )
    loaded = build(Vocabulary.read(values_of(path)))
    again = tiny_gguf.reloaded(loaded, tmp_path)
    changed = 0
    gpt2 = build(Vocabulary.read(values_of(path) | {"tokenizer.ggml.pre": "gpt-2"}))
    for text in TEXTS + random_texts():
        ids = own.encode(text, add_special_tokens=False).ids
        assert loaded(text).input_ids == again(text).input_ids == ids, repr(text)
        assert loaded.decode(ids) == own.decode(ids)
        changed += gpt2(text).input_ids != ids
    assert name == "gpt-2" or changed > 0, "the rule is of consequence here"


def values_of(path):
    from gguf import GGUFReader

    return {key: field.contents() for key, field in GGUFReader(path).fields.items()}


def test_names_that_share_a_rule():
    assert RULES["llama3"] == RULES["llama-v3"] == RULES["llama-bpe"] != RULES["dbrx"]
    assert RULES["starcoder"] == RULES["refact"] == RULES["command-r"] == RULES["smollm"]
    assert RULES["deepseek-r1-qwen"].expressions == RULES["qwen2"].expressions
    assert (RULES["llama-bpe"].add_bos, RULES["tekken"].add_bos, RULES["qwen2"].add_bos) == (
        True,
        True,
        False,
    )
