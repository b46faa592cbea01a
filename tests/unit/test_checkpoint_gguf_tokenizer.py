# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Tokenizers out of GGUF files: the ids of the models' own tokenizer.json, of sentencepiece, or of llama.cpp."""

import io
import json
import random

import pytest
import regex

from nemo_ee.checkpoint import gguf
from nemo_ee.checkpoint.gguf.pre_tokenizers import RULES, pre_tokenizer
from nemo_ee.checkpoint.gguf.tokenizer import build
from nemo_ee.checkpoint.gguf.vocabulary import Vocabulary
from nemo_ee.errors import CheckpointError
from tests.support import tiny_gguf, tiny_llama

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

TEXTS = [
    "x  1",
    "    12 = 3",
    "1234",
    "(f",
    ";\n",
    "for (i = 0; i < 10; ++i) {\n\t\tf(i);\n}\n\n\n",
    "漢字かな交じり文、1969年。한국어 문장",
    "🙂👩\u200d👩\u200d👧 a🙂b ¡olé!",
    "e\u0301 A\u030a n\u0303o",
    "I'M don'T he'LL they're 'Sam's",
    "٣٤٥ १२३ Ⅷ ½ ²",
    "a\tb \t c\r\n d\u00a0e\u2003f",
    "ÉCOLE École ÀaBcDé LaTeX GPTmodel",
    "http://example.org/a/b?c=1&d=2/\n/",
    "price: $1,234.56 + 7^2 <= 100 | ~x",
    "  leading and trailing  ",
    "\n\n \n",
    "नमस्ते สวัสดี שלום",
    "snake_case camelCase2 x_1y",
    "",
]


def random_texts(count=150):
    source = random.Random(0)
    letters = list("aZéÉß漢한ǅ'stLL  \t\n\r12٣½.,;$<_/(🙂\u0301\u00a0ſ")
    return ["".join(source.choices(letters, k=12)) for _ in range(count)]


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
    path = tiny_gguf.write(tmp_path / "m.gguf", vocabulary=tiny_gguf.vocabulary_of(own, name), keys=NO_ROWS)
    loaded = build(Vocabulary.read(values_of(path)))
    again = reloaded(loaded, tmp_path)
    changed = 0
    gpt2 = build(Vocabulary.read(values_of(path) | {"tokenizer.ggml.pre": "gpt-2"}))
    for text in TEXTS + random_texts():
        ids = own.encode(text, add_special_tokens=False).ids
        assert loaded(text).input_ids == again(text).input_ids == ids, repr(text)
        assert loaded.decode(ids) == own.decode(ids)
        changed += gpt2(text).input_ids != ids
    assert name == "gpt-2" or changed > 0, "the rule is of consequence here"


NO_ROWS = {"llama.vocab_size": None}


def values_of(path):
    from gguf import GGUFReader

    return {key: field.contents() for key, field in GGUFReader(path).fields.items()}


def reloaded(tokenizer, folder):
    """As every user of a converted file gets it."""
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(folder / "saved")
    return AutoTokenizer.from_pretrained(folder / "saved", local_files_only=True)


def test_names_that_share_a_rule():
    assert RULES["llama3"] == RULES["llama-v3"] == RULES["llama-bpe"] != RULES["dbrx"]
    assert RULES["starcoder"] == RULES["refact"] == RULES["command-r"] == RULES["smollm"]
    assert RULES["deepseek-r1-qwen"].expressions == RULES["qwen2"].expressions
    assert (RULES["llama-bpe"].add_bos, RULES["tekken"].add_bos, RULES["qwen2"].add_bos) == (
        True,
        True,
        False,
    )


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
