# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""End strings end a text at the token that completes them, wherever in it, in all ways of decoding."""

import copy
import random

import pytest
import torch

from tests.support import tiny_chats
from tests.support.awkward_texts import TEXTS, random_texts
from tests.support.stopping import ended
from tests.support.tiny_gpt import HEADS, tiny_model, tiny_model_config
from tests.support.tiny_tokenizer import EOS, save_tiny_tokenizer
from tests.unit.test_generation import NEMO, generated, lengths
from tests.unit.test_generation import TEXTS as PROMPTS

EARLY = dict(threshold=[0.6, 0.5, 0.7], always=True)
WAYS = {
    "exits": (EARLY, {}),
    "full depth": (False, {}),
    "lossless": (dict(threshold=0.3, lossless=True), {}),
    "sampled": (EARLY, dict(use_greedy=False, temperature=1.2, top_k=40)),
}


@pytest.fixture(scope="module")
def nemo_tokenizer(tmp_path_factory):
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer

    return AutoTokenizer(str(save_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


@pytest.fixture(scope="module")
def tokenizer(nemo_tokenizer):
    from nemo_ee.generation.text import TextTokenizer

    return TextTokenizer(nemo_tokenizer)


@pytest.fixture(scope="module")
def model():
    head = HEADS["block, MLP, linear, untied"]
    config = tiny_model_config(head=head, share_embeddings_and_output_weights=False)
    return tiny_model(config, dtype=torch.float64)


@pytest.mark.parametrize(
    "text, end, tokens",
    [
        (" the cat", " ca", [" the", " cat"]),
        (" mat ran", "a", [" mat"]),
        ("cat s", "t s", ["cat", " ", "s"]),
        (" the 漢字 cat", "漢", [" the", " ", "æ", "¼", "¢"]),
        ("é😀 cat", "😀", ["Ã", "©", "ð", "Ł", "ĺ", "Ģ"]),
        (f"cat{EOS}ran", "cat", ["cat"]),
        (f"c{EOS}at", "cat", ["c", EOS]),
        (" the dog", "dog the", None),
        ("the", "the ", None),
    ],
)
def test_the_token_that_completes_it_is_the_last(tokenizer, text, end, tokens):
    ids = tokenizer.encode(text)
    found = ended(tokenizer, ids, [end], tokenizer.encode("the dog"))
    assert found == (None if tokens is None else len(tokens))
    names = [tokenizer.name(token) for token in ids[:found]]
    assert tokens is None or [name.replace("Ġ", " ") for name in names] == tokens


@pytest.mark.parametrize("end", ["r", "at", " the", "1", "e c", "on the", "\n", "i = "])
def test_transformers_stops_at_the_same_token(tokenizer, nemo_tokenizer, end):
    from transformers.generation.stopping_criteria import StopStringCriteria

    theirs, met = StopStringCriteria(nemo_tokenizer.tokenizer, [end]), 0
    for text in [*TEXTS, "the cat sat on the mat", "ran after the dog"]:
        ids = tokenizer.encode("x" + text)
        expected = next(
            (n for n in range(1, len(ids)) if theirs(torch.tensor([ids[: n + 1]]), None).item()), None
        )
        assert ended(tokenizer, ids[1:], [end], ids[:1]) == expected, text
        met += expected is not None
    assert met


@pytest.mark.parametrize("make", ["byte level", "byte tokens"])
def test_whole_texts_say_where(make, tokenizer, tmp_path):
    """The slow reference decodes everything behind each token, and looks at what is no unfinished character."""
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer

    from nemo_ee.generation.text import TextTokenizer

    if make == "byte tokens":
        tiny_chats.llama_tokenizer(tmp_path).save_pretrained(tmp_path)
        tokenizer = TextTokenizer(AutoTokenizer(str(tmp_path)))
    dice, prompt, met = random.Random(0), tokenizer.encode("the cat"), 0
    for text in [*TEXTS, *random_texts(40)]:
        ids = [token for token in tokenizer.nemo.text_to_ids(text) if token not in tokenizer.special]
        whole = [
            tokenizer.decode(prompt + ids[:n])[len(tokenizer.decode(prompt)) :] for n in range(len(ids) + 1)
        ]
        at = dice.randrange(max(1, len(whole[-1])))
        end = whole[-1][at : at + dice.randint(1, 4)] or "none"
        expected = next((n for n, seen in enumerate(whole) if end in seen.rstrip("\ufffd")), None)
        assert ended(tokenizer, ids, [end, "never there"], prompt) == expected, (text, end)
        met += expected is not None
    assert met > 30


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_decoding_ends_there(model, way):
    """A word's beginning is an end string: `w1` in `w17`, which before NeMo's rule goes on behind."""
    early_exit, sampling = WAYS[way]

    def run(prompts, ends):
        options = {"add_BOS": False, "end_strings": ends, **sampling}
        generator = torch.Generator().manual_seed(5)
        return model.generate(prompts, lengths(20), options, early_exit=early_exit, generator=generator)

    free = run(PROMPTS, [])
    words = [[f" {model.tokenizer.ids_to_tokens([t])[0]}" for t in row] for row in generated(model, free)]
    long = next(word for word in words[0][4:] if len(word) > 3)
    for ends in ([long[1:-1]], [long[2:]], [words[0][5][-1] + words[0][6][:3]]):
        expected = []
        for row in words:
            counts = [n for n in range(1, len(row) + 1) if any(end in "".join(row[:n]) for end in ends)]
            expected.append(counts[0] if counts else len(row))
        assert expected[0] < 20
        ended_at = run(PROMPTS, ends)
        assert generated(model, ended_at) == [
            row[:count] for row, count in zip(generated(model, free), expected, strict=True)
        ]
        assert ended_at["sentences"][0].endswith("".join(words[0][: expected[0]])), "as NeMo, the text has it"


def test_nemos_loop_ends_there(model):
    from nemo_ee.generation.strategy import EarlyExitTextGenerationStrategy

    free = model.generate(PROMPTS, lengths(14), NEMO, early_exit=EARLY)
    word = next(w for w in free["tokens"][1][7 + 3 :] if len(w) > 2)
    sampling = {**NEMO, "end_strings": [word[:-1]]}
    ours = model.generate(PROMPTS, lengths(14), sampling, early_exit=EARLY)
    strategy = EarlyExitTextGenerationStrategy(model, threshold=EARLY["threshold"])
    theirs = model.generate(PROMPTS, lengths(14), sampling, strategy=strategy)
    counts = [len(row["exit_layers"]) for row in ours["early_exit"]]
    assert counts[1] < 14
    for b, count in enumerate(counts):
        prompt = len(ours["token_ids"][b]) - count
        assert theirs["token_ids"][b][: prompt + count] == ours["token_ids"][b]
        if count < 14:
            assert theirs["early_exit"][b]["exit_layers"] == ours["early_exit"][b]["exit_layers"]


def test_a_tokenizer_with_a_decoder_of_its_own_keeps_it(nemo_tokenizer):
    from transformers import PreTrainedTokenizerFast

    from nemo_ee.generation.text import TextTokenizer

    class Shouting(PreTrainedTokenizerFast):
        def _decode(self, *args, **kwargs):
            return super()._decode(*args, **kwargs).upper()

    core = nemo_tokenizer.tokenizer.backend_tokenizer
    for kind, expected in ((Shouting, " THE CAT"), (PreTrainedTokenizerFast, " the cat")):
        nemo = copy.copy(nemo_tokenizer)
        nemo.tokenizer = kind(tokenizer_object=core, eos_token=EOS)
        tokenizer = TextTokenizer(nemo)
        assert tokenizer.decode(tokenizer.encode(" the cat")) == expected
