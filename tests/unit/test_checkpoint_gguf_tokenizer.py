# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Tokenizers out of GGUF files: which tokens are special, whole or ends of text, BOS, templates, sentencepiece."""

import io

import pytest

from nemo_ee.checkpoint import gguf
from nemo_ee.checkpoint.gguf.pre_tokenizers import RULES
from nemo_ee.checkpoint.gguf.tokenizer import build
from nemo_ee.checkpoint.gguf.vocabulary import Vocabulary
from nemo_ee.errors import CheckpointError
from tests.support import tiny_gguf, tiny_llama
from tests.support.awkward_texts import TEXTS, random_texts
from tests.support.tiny_gguf import reloaded


def vocabulary(**changes):
    """Keys below ``tokenizer.ggml.`` over those of the tiny byte-level vocabulary; None takes one away."""
    values = tiny_gguf.byte_vocabulary() | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return {key: value for key, value in values.items() if value is not None}


def loaded_with(**changes):
    return build(Vocabulary.read(vocabulary(**changes)))


def test_without_a_rule_llama_cpps_default_is_taken():
    assert Vocabulary.read(vocabulary(pre=None)).rule == RULES["default"] != RULES["gpt-2"]


@pytest.mark.parametrize(("pre", "whole"), [("llama-bpe", True), ("tekken", True), ("gpt-2", False)])
def test_a_word_that_is_a_token_is_that_token_where_the_model_ignores_merges(pre, whole):
    values = tiny_gguf.byte_vocabulary()
    tokens, types = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    changed = {"tokens": [*tokens, "abc"], "token_type": [*types, 1], "pre": pre, "add_bos_token": False}
    assert loaded_with(**changed)("abc xyz").tokens() == [
        *(["abc"] if whole else ["a", "b", "c"]),
        "Ġ",
        "xyz",
    ]


@pytest.mark.parametrize(
    ("pre", "add_bos", "expected"),
    [
        ("gpt-2", None, False),
        ("llama-bpe", None, True),
        ("tekken", None, True),
        ("llama-bpe", False, False),
        ("gpt-2", True, True),
    ],
)
def test_bos_by_the_file_or_by_the_rule(tmp_path, pre, add_bos, expected):
    tokenizer = reloaded(loaded_with(pre=pre, add_bos_token=add_bos), tmp_path)
    assert tokenizer("sat").tokens() == (["<s>"] if expected else []) + ["s", "a", "t"]
    assert tokenizer("<s>sat", add_special_tokens=False).input_ids[0] == 1
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token) == ("</s>", "<s>", "</s>")
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "hi</s>"
    assert tokenizer.decode(tokenizer("a  b\n").input_ids, skip_special_tokens=True) == "a  b\n"


MARKED = ["<|eot|>", "<|start_header_id|>", "<tool_call>", "<spare>"]


def marked(**changes):
    values = tiny_gguf.byte_vocabulary()
    return {
        "tokens": values["tokenizer.ggml.tokens"] + MARKED,
        "token_type": values["tokenizer.ggml.token_type"] + [3, 3, 4, 5],
        **changes,
    }


def test_control_tokens_are_special_and_user_defined_ones_whole(tmp_path):
    tokenizer = reloaded(loaded_with(**marked()), tmp_path)
    ids = tokenizer("x<|eot|><tool_call>y<|start_header_id|>").input_ids
    first = 261
    assert ids == [
        tokenizer.convert_tokens_to_ids("x"),
        first,
        first + 2,
        *tokenizer("y").input_ids,
        first + 1,
    ]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "x<tool_call>y"
    assert tokenizer.decode(ids) == "x<|eot|><tool_call>y<|start_header_id|>"
    assert {"<|eot|>", "<|start_header_id|>", "<unk>"} <= set(tokenizer.all_special_tokens)
    assert "<tool_call>" not in tokenizer.all_special_tokens
    assert len(tokenizer) == 264, "an unused token at the end only fills up the embedding"
    assert tokenizer("<spare>").tokens() == list("<spare>")


def test_an_unused_token_that_pads_is_kept():
    assert loaded_with(**marked(padding_token_id=264)).pad_token == "<spare>"


def test_types_of_no_token_are_of_no_consequence():
    types = tiny_gguf.byte_vocabulary()["tokenizer.ggml.token_type"]
    assert len(loaded_with(token_type=[*types, 3, 1])) == len(types)


def test_nemos_tokenizer_sees_the_same(tmp_path):
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer

    loaded_with(**marked()).save_pretrained(tmp_path / "saved")
    tokenizer = AutoTokenizer(str(tmp_path / "saved"), use_fast=True)
    ids = tokenizer.text_to_ids("x<|eot|><tool_call>y")
    assert ids[1:3] == [261, 263]
    assert tokenizer.ids_to_text(ids) == "x<tool_call>y"
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id) == (264, 2, 1)


def ends(tokens, **changes):
    """Tokens that end a text, of a vocabulary with these control tokens at its end."""
    values = tiny_gguf.byte_vocabulary()
    given = {
        "tokens": values["tokenizer.ggml.tokens"] + tokens,
        "token_type": values["tokenizer.ggml.token_type"] + [3] * len(tokens),
        **changes,
    }
    if given.get("eos_token_id") in tokens:
        given["eos_token_id"] = given["tokens"].index(given["eos_token_id"])
    read = Vocabulary.read(vocabulary(**given))
    return [read.tokens[number] for number in read.eos_token_ids]


@pytest.mark.parametrize(
    ("tokens", "eos", "expected"),
    [  # as llama.cpp lists them when it loads Llama 3.2, Qwen2.5, SmolLM2, gpt-oss
        (
            ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"],
            "<|eot_id|>",
            {"<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"},
        ),
        (
            ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"],
            "<|im_end|>",
            {"<|endoftext|>", "<|im_end|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"},
        ),
        (
            ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>"],
            "<|im_end|>",
            {"<|endoftext|>", "<|im_end|>", "<reponame>"},
        ),
        (["<|return|>", "<|call|>", "<|end|>"], "<|return|>", {"<|return|>", "<|call|>"}),
        (["<|end|>", "<|user|>"], "<|end|>", {"<|end|>"}),
    ],
)
def test_ends_of_text_by_name(tokens, eos, expected):
    found = ends(tokens, eos_token_id=eos)
    assert found[0] == eos and set(found) == expected | {"</s>"}


def test_ends_of_text_by_key():
    first = 261
    assert ends(["<a>", "<b>", "<c>"], eot_token_id=first, eom_token_id=first + 2) == ["</s>", "<a>", "<c>"]
    assert ends(["<a>"]) == ["</s>"]


def test_an_end_of_text_is_special_whatever_its_type():
    values = tiny_gguf.byte_vocabulary()
    tokens = values["tokenizer.ggml.tokens"]
    tokenizer = loaded_with(tokens=[*tokens, "<|im_end|>"], token_type=[1] * (len(tokens) + 1))
    assert tokenizer("<|im_end|>").input_ids == [261]
    assert tokenizer.decode([261], skip_special_tokens=True) == ""


def test_named_chat_templates(tmp_path):
    named = {"tokenizer.chat_template.tool_use": "tools", "tokenizer.chat_templates": ["tool_use"]}
    tokenizer = reloaded(build(Vocabulary.read(vocabulary() | named)), tmp_path)
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "hi</s>"
    assert tokenizer.apply_chat_template(chat, tokenize=False, chat_template="tool_use") == "tools"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pre": "nonsense"}, "tokenizer.ggml.pre=nonsense: must be one of default, gpt-2"),
        ({"eos_token_id": None}, "tokenizer.ggml.eos_token_id=null"),
        ({"bos_token_id": None, "add_bos_token": True}, "tokenizer.ggml.bos_token_id=null"),
        ({"bos_token_id": 5000}, "tokenizer.ggml.bos_token_id=5000: must be one of 261 tokens"),
        ({"merges": None}, "tokenizer.ggml.merges=null"),
        ({"merges": ["x q"]}, "'x q' joins no two tokens to one"),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, "'a' is there twice"),
        ({"token_type": [1]}, "tokenizer.ggml.token_type=[1]: must be a list with an entry for each token"),
        ({"model": "llama"}, "tokenizer.ggml.scores=null"),
    ],
)
def test_vocabularies_that_make_no_tokenizer_are_refused(changes, words):
    with pytest.raises(CheckpointError) as error:
        Vocabulary.read(vocabulary(**changes))
    assert words in str(error.value)


@pytest.fixture(scope="module")
def sentencepiece_models():
    """Trained models with and without a space before the text, by that."""
    import sentencepiece

    trained_models = {}
    for prefix in (True, False):
        content = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS * 3 + ["the cat sat on the mat and the dog ran on and on"] * 5),
            model_writer=content,
            model_type="bpe",
            vocab_size=520,
            byte_fallback=True,
            character_coverage=0.98,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=prefix,
            split_digits=True,
            control_symbols=["[INST]"],
            minloglevel=2,
        )
        trained_models[prefix] = sentencepiece.SentencePieceProcessor(model_proto=content.getvalue())
    return trained_models


def spm_vocabulary(model, **changes):
    count = model.get_piece_size()
    types = [
        2 if model.is_unknown(n) else 3 if model.is_control(n) else 6 if model.is_byte(n) else 1
        for n in range(count)
    ]
    values = {
        "model": "llama",
        "pre": "default",
        "tokens": [model.id_to_piece(n) for n in range(count)],
        "scores": [model.get_score(n) for n in range(count)],
        "token_type": types,
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


@pytest.mark.parametrize("prefix", [True, False])
def test_ids_are_those_of_sentencepiece(tmp_path, sentencepiece_models, prefix):
    model = sentencepiece_models[prefix]
    read = Vocabulary.read(spm_vocabulary(model, add_space_prefix=prefix, add_bos_token=False))
    tokenizer = reloaded(build(read), tmp_path)
    texts = [*TEXTS, *random_texts(), "the cat and the dog", "日本 unseen ж"]
    for text in texts:
        ids = model.encode(text)
        assert tokenizer(text).input_ids == ids, repr(text)
        assert tokenizer.decode(ids) == text, repr(text)
    assert any(model.is_byte(n) for text in texts for n in model.encode(text)), (
        "bytes are of consequence here"
    )


def test_sentencepieces_defaults(sentencepiece_models):
    """A BOS, ids 1, 2 and 0, and a space before a text and behind each special token, as in llama.cpp."""
    read = Vocabulary.read(spm_vocabulary(sentencepiece_models[True]))
    tokenizer = build(read)
    assert (read.eos_token_ids, read.special) == ((2,), {"bos_token": 1, "eos_token": 2, "unk_token": 0})
    tokens = tokenizer("the[INST]the").tokens()
    assert tokens == ["<s>", "▁the", "[INST]", "▁the"]
    assert tokenizer.decode(tokenizer("the[INST]").input_ids, skip_special_tokens=True) == "the"


def test_a_whole_file_gives_its_tokenizer_and_ends(tmp_path):
    network = tiny_llama.model(tiny_gguf.config(vocab_size=265, num_hidden_layers=1))
    given = {f"tokenizer.ggml.{key}": value for key, value in marked(eot_token_id=261).items()}
    file = gguf.inspect(tiny_gguf.write(tmp_path / "m.gguf", network, keys=given))
    assert file.eos_token_ids == (2, 261)
    assert len(file.load_tokenizer()) == 264 < file.config.vocab_size
