# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Texts to token ids and back, beside what transformers and sentencepiece say of the same files."""

import json
from types import SimpleNamespace

import pytest
from tokenizers import AddedToken, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nemo_ee.errors import ConfigError
from nemo_ee.generation.detokenizer import Detokenizer
from tests.support import tiny_chats, tiny_llama

TEXTS = ["the cat", "", " the", "a é漢😀 b", "<s>the cat", "the <tool_call> cat", "zzz  two"]


def ours(folder, **settings):
    from nemo.collections.nlp.modules.common.tokenizer_utils import get_nmt_tokenizer

    from nemo_ee.generation.text import TextTokenizer

    return TextTokenizer(get_nmt_tokenizer("huggingface", str(folder), use_fast=True), settings)


def templated(template, suffix="", **names):
    """A word-level tokenizer with a template of its own."""
    tokenizer = tiny_llama.tokenizer()
    parts = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", "</s>", "w3")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{template} $A {suffix}".strip(), special_tokens=parts
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, **{**tiny_llama.SPECIAL, **names}
    )


MAKERS = {
    "none": lambda _: tiny_llama.tokenizer(),
    "template": lambda _: templated("<s>"),
    "template with EOS": lambda _: templated("<s>", "</s>"),
    "EOS alone": lambda _: templated("", "</s>"),
    "two tokens": lambda _: templated("<s> w3"),
    "BOS is EOS": lambda _: templated("</s>", bos_token="</s>"),
    "add_bos_token": tiny_chats.llama_tokenizer,
    "byte level": lambda _: tiny_chats.qwen_tokenizer(),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_texts_begin_as_the_tokenizer_says(kind, tmp_path):
    from nemo_ee.data.tokenizer import TokenizerConfig
    from nemo_ee.preprocessing.document_tokenizer import DocumentTokenizer

    MAKERS[kind](tmp_path).save_pretrained(tmp_path)
    theirs, mine = AutoTokenizer.from_pretrained(tmp_path), ours(tmp_path)
    documents = DocumentTokenizer(TokenizerConfig(type=str(tmp_path)))
    for text in TEXTS:
        bare, expected = theirs(text, add_special_tokens=False).input_ids, theirs(text).input_ids
        if "EOS" in kind and kind != "BOS is EOS":
            expected = expected[:-1]
        if bare[:1] == [1] and expected[:2] == [1, 1]:
            expected = bare  # which transformers would give two
        assert mine.encode(text) == expected
        assert documents.encode(text) == (expected if bare else [])
        assert mine.encode(text, add_bos=False) == bare
    assert ours(tmp_path, add_bos=False).encode("the") == theirs("the", add_special_tokens=False).input_ids
    if mine.nemo.bos_id is not None:
        assert ours(tmp_path, add_bos=True).encode("the") == (
            mine.before() or [mine.nemo.bos_id]
        ) + mine.encode("the", add_bos=False)


class TestDecoding:
    @pytest.fixture(params=["byte level", "add_bos_token", "none"])
    def pair(self, request, tmp_path):
        MAKERS[request.param](tmp_path).save_pretrained(tmp_path)
        return AutoTokenizer.from_pretrained(tmp_path), ours(tmp_path)

    def test_special_tokens_have_no_text_and_other_added_ones_have(self, pair):
        theirs, mine = pair
        for text in TEXTS:
            ids = theirs(text).input_ids
            mixed = [token for pair in zip(ids, theirs.all_special_ids * 9, strict=False) for token in pair]
            mixed += list(theirs.added_tokens_decoder)
            for each in (ids, mixed):
                assert mine.decode(each) == theirs.decode(each, skip_special_tokens=True)

    def test_ids_without_a_token_have_no_text(self, pair):
        theirs, mine = pair
        ids = theirs("the cat").input_ids
        assert mine.decode([*ids, len(theirs) + 5, 10**6]) == mine.decode(ids)
        assert mine.name(10**6) == "" and mine.name(ids[-1]) == theirs.convert_ids_to_tokens(ids[-1])

    def test_pieces_of_a_stream_join_to_the_whole(self, pair):
        theirs, mine = pair
        prompt, tokens = theirs("the dog").input_ids, theirs("cat é漢😀 and the dog").input_ids
        detokenizer = Detokenizer(mine.decode, prompt)
        pieces = [piece for token in tokens for piece in detokenizer.feed(token)] + detokenizer.close()
        assert mine.decode(prompt) + "".join(pieces) == mine.decode(prompt + tokens)


def test_an_added_token_with_characters_that_stand_for_no_byte(tmp_path):
    """Slow byte-level tokenizers raise KeyError for it in `convert_tokens_to_string`, which NeMo calls."""
    from transformers import GPT2Tokenizer

    from nemo_ee.generation.text import TextTokenizer

    fast = tiny_chats.qwen_tokenizer(tools=False)
    core = json.loads(fast.backend_tokenizer.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(core["vocab"]))
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in core["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(merges))
    slow = GPT2Tokenizer(
        str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), unk_token="<e>", eos_token="<e>"
    )
    slow.add_tokens([AddedToken("<new line>", special=False), AddedToken("<eot>", special=True)])
    slow.save_pretrained(tmp_path)
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer as NemoTokenizer

    mine = TextTokenizer(NemoTokenizer(str(tmp_path), use_fast=False))
    ids = slow("the cat<new line>sat<eot>").input_ids
    assert mine.decode(ids) == "the cat<new line>sat"


def test_what_ends_texts(tmp_path):
    from nemo_ee.decoding.request import GenerationRequest
    from nemo_ee.generation.stopping import StopRule, end_tokens
    from tests.support.stopping import ended

    qwen = tiny_chats.qwen_tokenizer()
    qwen.save_pretrained(tmp_path)
    own, padding, flagged, tool = qwen.convert_tokens_to_ids(
        ["<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<tool_call>"]
    )
    assert ours(tmp_path).eos_ids == (own,)
    several = ours(tmp_path, eos_token_ids=[padding, own, 18])
    assert several.eos_ids == (own, padding, 18)
    stop = StopRule(several, ["<|endoftext|>", "<|vision_start|>", "<tool_call>", "the"])
    assert stop.token_ids == {own, padding, 18, flagged} and stop.texts == ["<tool_call>", "the"]
    assert stop.begin([5], GenerationRequest(), 9).eos == (own, padding, 18)
    assert ended(several, [tool], ["<tool_call>"]) == 1
    several.check_ends(rows=19)  # a token that has a name but no row does no harm
    with pytest.raises(
        ConfigError, match=r"eos_token_ids=\[5, 400\]: id 400 must be below the model's 320 rows"
    ):
        ours(tmp_path, eos_token_ids=[5, 400]).check_ends(rows=320)
    assert end_tokens(several, ["<unknown>"]) == ({own, padding, 18}, ["<unknown>"])


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(eos_token_ids=2), "model.tokenizer.eos_token_ids=2: must be a list of token ids, or null"),
        (dict(eos_token_ids=[2, "</s>"]), r'eos_token_ids=\[2, "</s>"\]: must be a list of token ids'),
        (dict(eos_token_ids=[-1]), r"eos_token_ids=\[-1\]"),
        (dict(add_bos="yes"), "model.tokenizer.add_bos=yes: must be true, false, or null"),
        (
            dict(add_bos=True),
            "add_bos=true: the tokenizer has no BOS token; set model.tokenizer.add_bos=null",
        ),
    ],
)
def test_settings_that_break_a_rule(settings, message):
    from nemo_ee.generation.text import TextTokenizer

    with pytest.raises(ConfigError, match=message):
        TextTokenizer(SimpleNamespace(bos_id=None, eos_id=0), settings)


class TestSentencePiece:
    @pytest.fixture(scope="class", params=["bpe", "unigram"])
    def file(self, request, tmp_path_factory):
        symbols = dict(control_symbols=["<turn>"], user_defined_symbols=["<tool>"], pad_id=3)
        return tiny_chats.train_sentencepiece(tmp_path_factory.mktemp("sp"), request.param, **symbols)

    def tokenizer(self, file, legacy, special_tokens=None, **settings):
        from nemo.collections.common.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

        from nemo_ee.generation.text import TextTokenizer
        from nemo_ee.runtime.upstream.legacy_sentencepiece import name_special_pieces

        nemo = SentencePieceTokenizer(str(file), special_tokens=special_tokens, legacy=legacy)
        name_special_pieces(nemo)
        return TextTokenizer(nemo, settings)

    @pytest.mark.parametrize("legacy", [False, True])
    def test_ids_and_texts_are_sentencepieces(self, file, legacy):
        tokenizer = self.tokenizer(file, legacy)
        theirs = tokenizer.nemo.tokenizer
        assert (tokenizer.nemo.bos_id, tokenizer.nemo.eos_id, tokenizer.nemo.pad_id) == (1, 2, 3)
        assert tokenizer.eos_ids == (2,) and tokenizer.before() == []
        turn, tool = theirs.piece_to_id("<turn>"), theirs.piece_to_id("<tool>")
        assert tokenizer.special == {1, 2, 3, turn}
        assert tokenizer.special_id("<turn>") == turn and tokenizer.special_id("<tool>") is None
        for text in [*TEXTS, "the <tool> cat"]:
            ids = theirs.encode(text)
            assert tokenizer.encode(text) == ids
            assert tokenizer.encode(text, add_bos=True) == [1, *ids]
            assert (
                tokenizer.decode([1, *ids, turn, 2])
                == theirs.decode([1, *ids, turn, 2])
                == theirs.decode(ids)
            )
        assert "<tool>" in tokenizer.decode([tool]) and tokenizer.decode([10**6]) == ""

    def test_a_stream_is_the_whole(self, file):
        tokenizer = self.tokenizer(file, True)
        decode, encode = tokenizer.nemo.tokenizer.decode, tokenizer.encode
        tokens = encode(" sat é漢😀 and the  dog")
        for prompt in (encode("the cat"), [1], []):
            detokenizer = Detokenizer(tokenizer.decode, prompt)
            pieces = [piece for token in tokens for piece in detokenizer.feed(token)] + detokenizer.close()
            assert decode(prompt) + "".join(pieces) == decode(prompt + tokens)

    def test_special_tokens_of_the_configuration(self, file):
        """Those beyond the file get ids behind its pieces; they end texts, and have none."""
        named = {"eos_token": "<|stop|>", "bos_token": "<s>"}
        tokenizer = self.tokenizer(file, True, named)
        pieces = tokenizer.nemo.tokenizer.get_piece_size()
        assert tokenizer.eos_ids == (pieces,) and tokenizer.nemo.bos_id == 1 and tokenizer.nemo.pad_id == 3
        ids = tokenizer.encode("the cat<|stop|>")
        assert (
            ids[-1] == pieces and tokenizer.decode(ids) == "the cat" and tokenizer.name(pieces) == "<|stop|>"
        )
        assert tokenizer.special_id("<|stop|>") == pieces
        listed = self.tokenizer(file, True, ["<extra_id_1>"])
        assert listed.eos_ids == (2,) and listed.special_id("<extra_id_1>") == pieces

    def test_preprocessing_loads_it_as_nemo_does(self, file):
        from nemo_ee.data.tokenizer import TokenizerConfig
        from nemo_ee.preprocessing.document_tokenizer import DocumentTokenizer

        plain = dict(library="sentencepiece", model=str(file))
        for settings in ({}, dict(sentencepiece_legacy=False), dict(sentencepiece_legacy=True)):
            loaded = DocumentTokenizer(TokenizerConfig(**plain, **settings))
            assert loaded.eod == 2 and loaded.before == []
        added = dict(special_tokens={"eos_token": "<|stop|>"}, additional_special_tokens=["<mark>"])
        loaded = DocumentTokenizer(TokenizerConfig(**plain, **added, add_bos=True))
        assert loaded.eod == loaded.vocab_size - 2 and loaded.encode("the<mark>")[-1] == loaded.vocab_size - 1
        assert loaded.encode("the")[0] == 1 and loaded.encode("") == []


def test_preprocessing_names_what_is_wrong(tmp_path):
    from nemo_ee.data.tokenizer import TokenizerConfig
    from nemo_ee.preprocessing.document_tokenizer import DocumentTokenizer
    from nemo_ee.preprocessing.preprocess_config import PreprocessConfig

    tiny_chats.qwen_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match="tokenizer.add_bos=true: the tokenizer has no BOS.*tokenizer.add_bos=false"
    ):
        DocumentTokenizer(TokenizerConfig(type=str(tmp_path), add_bos=True))
    values = dict(input="a.txt", output_prefix="out", tokenizer=dict(type=str(tmp_path), add_bos="yes"))
    with pytest.raises(ConfigError, match="tokenizer.add_bos=yes: expected bool or null, got str"):
        PreprocessConfig.from_dict(values)


class TestChatTemplates:
    TURNS = [{"role": "user", "content": "the cat"}]

    def check(self, folder, theirs):
        from nemo_ee.generation.prompts import chat_tokens

        expected = theirs.apply_chat_template(self.TURNS, add_generation_prompt=True)
        assert expected == chat_tokens(ours(folder).nemo, self.TURNS)
        return expected

    def test_of_several_the_default_counts(self, tmp_path):
        tokenizer = tiny_chats.llama_tokenizer(tmp_path)
        tokenizer.chat_template = {"default": tiny_chats.MISTRAL, "tool_use": "{{ 'x' }}"}
        tokenizer.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"]
        assert isinstance(saved, list), "as files hold them"
        assert self.check(tmp_path, tokenizer)[0] == 1

    def test_a_file_of_its_own(self, tmp_path):
        tokenizer = tiny_chats.llama_tokenizer(tmp_path)
        tokenizer.chat_template = None
        tokenizer.save_pretrained(tmp_path)
        (tmp_path / "chat_template.jinja").write_text(tiny_chats.MISTRAL)
        tokenizer.chat_template = tiny_chats.MISTRAL
        assert self.check(tmp_path, tokenizer).count(1) == 1
