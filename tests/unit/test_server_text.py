# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Text that is streamed: whole characters, no stop strings, and in the end what decoding everything gives."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from nemo_ee.generation.detokenizer import LONGEST_HELD, UNFINISHED, Detokenizer
from nemo_ee.generation.stop_strings import StopStrings
from nemo_ee.generation.text_stream import TextStream
from tests.support.server import tiny_tokenizer as word_tokenizer
from tests.support.tiny_tokenizer import save_tiny_tokenizer

TEXT = " the cat 😀👍🏽 sat: 漢字かな — naïve\nthe end, 👩‍👩‍👧!"


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """A byte-level tokenizer: every character beyond ASCII is several tokens."""
    return PreTrainedTokenizerFast.from_pretrained(save_tiny_tokenizer(tmp_path_factory.mktemp("bytes")))


@pytest.fixture(scope="module")
def byte_fallback():
    """As Llama's: words with their spaces, and a token for every byte; a leading space is dropped."""
    words = ["▁the", "▁cat", "▁sat", "a", "b", "▁"]
    vocabulary = {name: n for n, name in enumerate(["<unk>", *(f"<0x{n:02X}>" for n in range(256)), *words])}
    core = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


def text_of(tokenizer):
    return lambda ids: tokenizer.convert_tokens_to_string(tokenizer.convert_ids_to_tokens(ids))


def stream(decode, prompt, tokens):
    """The pieces of all tokens, and how many tokens were settled after each."""
    detokenizer, pieces, settled = Detokenizer(decode, prompt), [], []
    for token in tokens:
        pieces += detokenizer.feed(token)
        settled.append(len(pieces))
    return pieces + detokenizer.close(), settled


def added_text(decode, prompt, tokens):
    """The slow reference: everything decoded."""
    return decode(prompt + tokens)[len(decode(prompt)) :]


def test_characters_of_several_tokens_come_whole(byte_level):
    decode, tokens = text_of(byte_level), byte_level(TEXT)["input_ids"]
    pieces, settled = stream(decode, byte_level("the dog")["input_ids"], tokens)
    assert "".join(pieces) == TEXT and len(pieces) == len(tokens)
    assert not any(UNFINISHED in piece for piece in pieces)
    assert all(0 <= n + 1 - count <= LONGEST_HELD for n, count in enumerate(settled))


@pytest.mark.parametrize("which", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize("seed", range(5))
def test_any_tokens_give_what_decoding_everything_gives(which, seed, request):
    tokenizer = request.getfixturevalue(which)
    decode, dice = text_of(tokenizer), random.Random(seed)
    prompt = [dice.randrange(len(tokenizer)) for _ in range(3)] + tokenizer.convert_tokens_to_ids(
        ["a", "b"] if which == "byte_level" else ["▁the", "▁cat"]
    )
    for _ in range(40):
        tokens = [dice.randrange(len(tokenizer)) for _ in range(30)]
        pieces, _ = stream(decode, prompt, tokens)
        assert len(pieces) == len(tokens)
        if (
            which == "byte_level"
        ):  # a run of byte tokens that is broken anywhere is decoded otherwise afterwards
            assert "".join(pieces) == added_text(decode, prompt, tokens)


def test_bytes_as_tokens_beside_words(byte_fallback):
    decode = text_of(byte_fallback)
    names = [
        "▁the",
        *(f"<0x{byte:02X}>" for byte in "😀漢é".encode()),
        "▁cat",
        *(f"<0x{b:02X}>" for b in "…".encode()),
    ]
    tokens = byte_fallback.convert_tokens_to_ids(names)
    pieces, _ = stream(decode, byte_fallback.convert_tokens_to_ids(["▁sat"]), tokens)
    assert pieces == [" the", "", "", "", "😀", "", "", "漢", "", "é", " cat", "", "", "…"]


def test_words_keep_their_spaces_and_special_tokens_have_no_text():
    tokenizer = word_tokenizer()
    decode, prompt = tokenizer.ids_to_text, tokenizer.text_to_ids("w1 w2")
    tokens = [
        *tokenizer.text_to_ids("w3"),
        tokenizer.eos_id,
        tokenizer.eos_id,
        *tokenizer.text_to_ids("w4 w5"),
    ]
    pieces, _ = stream(decode, prompt, tokens)
    assert pieces == [" w3", "", "", " w4", " w5"]
    assert "".join(pieces) == added_text(decode, prompt, tokens)
    assert stream(decode, [tokenizer.eos_id], tokens[:1])[0] == ["w3"], "nothing stands before it"


def test_an_unfinished_character_at_the_end_shows_as_such(byte_level):
    tokens = byte_level("the 😀")["input_ids"][:-1]
    pieces, _ = stream(text_of(byte_level), [], tokens)
    assert "".join(pieces) == "the " + UNFINISHED and len(pieces) == len(tokens)


def test_decoding_looks_at_a_short_window_only(byte_level):
    decode, lengths = text_of(byte_level), []

    def measured(ids):
        lengths.append(len(ids))
        return decode(ids)

    dice = random.Random(0)
    tokens = [dice.randrange(len(byte_level)) for _ in range(500)] + [byte_level.eos_token_id] * 50
    stream(measured, byte_level(TEXT)["input_ids"], tokens)
    assert max(lengths) <= 2 * (LONGEST_HELD + 1) and len(lengths) <= 4 * len(tokens)


def first_stop(text, stops):
    """The slow reference: the text before the stop string that is complete first; None without one."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return None


def test_stop_strings_against_a_search_of_the_whole_text():
    dice, found = random.Random(0), 0
    for _ in range(3000):
        stops = ["".join(dice.choices("abc", k=dice.randint(1, 4))) for _ in range(dice.randint(0, 3))]
        pieces = ["".join(dice.choices("abc", k=dice.randint(0, 4))) for _ in range(6)]
        stop, settled = StopStrings(stops), []
        for count, piece in enumerate(pieces, start=1):
            settled += stop.feed(piece)
            sofar = "".join(pieces[:count])
            assert first_stop(sofar, stops) is None or stop.stopped
            assert "".join(settled) == sofar[: len("".join(settled))], "nothing is taken back"
            if stop.stopped:
                break
            longest = max(map(len, stops), default=1)
            assert len(sofar) - len("".join(settled)) < longest + 4, (
                "no more waits than may begin a stop string"
            )
        settled += [] if stop.stopped else stop.close()
        expected = first_stop("".join(pieces), stops)
        assert "".join(settled) == ("".join(pieces) if expected is None else expected)
        assert len(settled) == count, "every piece is settled"
        found += stop.stopped
    assert 500 < found < 2500


def test_several_pieces_at_once_are_as_one_by_one():
    dice, found = random.Random(1), 0
    for _ in range(500):
        stops = ["".join(dice.choices("ab", k=dice.randint(1, 4))) for _ in range(2)]
        pieces = ["".join(dice.choices("abc", k=dice.randint(0, 3))) for _ in range(6)]
        single, together = StopStrings(stops), StopStrings(stops)
        expected = [piece for each in pieces if not single.stopped for piece in single.feed(each)]
        settled = together.feed(*pieces)
        assert together.stopped == single.stopped and settled[: len(expected)] == expected
        assert not any(settled[len(expected) :]), "what follows a stop string has no text"
        found += single.stopped
    assert 100 < found < 490


def test_pieces_that_cannot_begin_a_stop_string_do_not_wait():
    stop = StopStrings(["\n\n", "END"])
    assert stop.feed("the") == ["the"] and stop.feed(" E") == [] and stop.feed("xit") == [" E", "xit"]
    assert stop.feed("\n") == [] and stop.feed("") == [] and stop.feed("\n ") == ["", "", ""] and stop.stopped


def test_a_stop_string_within_characters_that_wait(byte_level):
    decode, tokens = text_of(byte_level), byte_level("the 漢字 cat")["input_ids"]
    text = TextStream(decode, [], ["字"])
    fed = next(n for n, token in enumerate(tokens, start=1) if text.feed(token))
    assert "".join(text.pieces) == "the 漢" and len(text.pieces) == fed < len(tokens)


def test_the_beginning_of_a_stop_string_shows_at_the_end(byte_level):
    tokens = byte_level("the cat sat")["input_ids"]
    text = TextStream(text_of(byte_level), [], [" cat sat on"])
    assert not any([text.feed(token) for token in tokens]) and "".join(text.pieces) == "the"
    assert not text.close() and "".join(text.pieces) == "the cat sat"


def test_a_stop_string_that_the_end_completes(byte_level):
    """The last tokens are an unfinished character, and the stop string is what it shows as."""
    tokens = byte_level("the 😀")["input_ids"][:-1]
    text = TextStream(text_of(byte_level), [], [UNFINISHED])
    assert not any([text.feed(token) for token in tokens]) and text.close()
    assert "".join(text.pieces) == "the " and len(text.pieces) == len(tokens)
