# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""`model.stream`, token ids as prompts, finish reasons, `trainer.predict`: ways to and from the same engine."""

import json

import pytest
import torch
from torch.utils.data import DataLoader

from nemo_ee.errors import ConfigError, GenerationError
from tests.support.memory_peak import memory_peak
from tests.support.tiny_gpt import HEADS, TEXTS, tiny_model, tiny_model_config
from tests.unit.test_generation import EARLY, GREEDY, generated, lengths

WAYS = {
    "greedy": (EARLY, {}),
    "full depth": (False, {}),
    "lossless": (dict(threshold=0.3, lossless=True), {}),
    "sampled": (EARLY, dict(use_greedy=False, temperature=1.3, top_p=0.9)),
}


@pytest.fixture(scope="module")
def model():
    head = HEADS["block, MLP, linear, untied"]
    config = tiny_model_config(head=head, share_embeddings_and_output_weights=False)
    return tiny_model(config, dtype=torch.float64)


def collected(pieces, count):
    """Of each prompt: text, token ids, exit layers, confidences, finish reasons."""
    found = [["", [], [], [], []] for _ in range(count)]
    for piece in pieces:
        mine = found[piece.index]
        mine[0] += piece.text
        for place, more in enumerate((piece.token_ids, piece.exit_layers, piece.confidences), start=1):
            mine[place] += more
        mine[4].append(piece.finish_reason)
    return found


@pytest.mark.parametrize("way", WAYS)
def test_a_stream_has_what_generate_has_step_by_step(model, way):
    early_exit, sampling = WAYS[way]
    given = lengths(12), {**GREEDY, **sampling, "end_strings": ["<|endoftext|>"]}
    output = model.generate(TEXTS, *given, early_exit=early_exit, generator=torch.Generator().manual_seed(5))
    stream = model.stream(TEXTS, *given, early_exit=early_exit, generator=torch.Generator().manual_seed(5))
    first = next(stream)
    assert (first.index, len(first.token_ids), first.finish_reason) == (0, 1, None)
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
    model.train()
    pieces = [first, *stream]
    assert model.gpt.training
    model.eval()
    tokens, decode = generated(model, output), model.text_tokenizer.decode
    for i, (text, ids, layers, confidences, reasons) in enumerate(collected(pieces, len(TEXTS))):
        prompt = output["token_ids"][i][: len(output["token_ids"][i]) - len(ids)]
        assert (ids, layers) == (tokens[i], output["early_exit"][i]["exit_layers"])
        assert confidences == output["early_exit"][i]["confidences"]
        assert reasons == [None] * (len(reasons) - 1) + [output["finish_reason"][i]]
        assert decode(prompt) + text == output["sentences"][i]
    assert way == "lossless" or len(pieces) >= 12


def test_a_stream_ends_before_an_end_string_and_says_so(model):
    (text, *_), *_ = collected(model.stream(TEXTS[:1], lengths(12), GREEDY, early_exit=False), 1)
    end = text.split()[4]
    (cut, ids, *_, reasons), *_ = collected(
        model.stream(TEXTS[:1], lengths(12), {**GREEDY, "end_strings": [end]}, early_exit=False), 1
    )
    assert cut == text[: text.index(end)] and reasons[-1] == "stop" and set(reasons[:-1]) == {None}
    output = model.generate(TEXTS[:1], lengths(12), {**GREEDY, "end_strings": [end]}, early_exit=False)
    assert generated(model, output) == [ids] and output["finish_reason"] == ["stop"]


def test_a_stream_that_is_left_gives_back_what_it_holds_and_others_may_run_meanwhile(model, monkeypatch):
    from nemo_ee.decoding.decoder import EarlyExitDecoder

    closed, close = [], EarlyExitDecoder.close
    monkeypatch.setattr(EarlyExitDecoder, "close", lambda self: closed.append(1) or close(self))
    stream = model.stream(TEXTS, lengths(12), GREEDY, early_exit=EARLY)
    next(stream)
    between = model.generate(TEXTS, lengths(12), GREEDY, early_exit=EARLY)
    assert len(closed) == 1 and next(stream).index == 1
    stream.close()
    assert len(closed) == 2
    (rest, *_, reasons), *_ = collected(model.stream(TEXTS[:1], lengths(0), GREEDY), 1)
    assert (rest, reasons) == ("", ["length"])
    assert model.generate(TEXTS[:1], lengths(0), GREEDY)["finish_reason"] == ["length"]
    assert between["finish_reason"] == ["length"] * len(TEXTS)


@pytest.mark.parametrize(
    "sampling, error, names",
    [
        (dict(all_probs=True), ConfigError, "sampling_params.all_probs=true: a stream has log-prob"),
        (dict(compute_logprob=True), ConfigError, "sampling_params.compute_logprob"),
        (dict(top_p=2.0), ConfigError, "sampling_params.top_p=2.0"),
    ],
)
def test_a_streams_faults_are_raised_by_the_call(model, sampling, error, names):
    with pytest.raises(error, match=names):
        model.stream(TEXTS, lengths(3), sampling)
    with pytest.raises(GenerationError, match="prompt 0: token id 201"):
        model.stream([[201]], lengths(3))


def test_token_ids_are_prompts(model):
    ids = [model.tokenizer.text_to_ids(text) for text in TEXTS]
    expected = model.generate(TEXTS, lengths(6), GREEDY, early_exit=EARLY)
    assert model.generate(ids, lengths(6), GREEDY, early_exit=EARLY) == expected
    assert model.generate(tuple(map(tuple, ids)), lengths(6), GREEDY, early_exit=EARLY) == expected
    single = model.generate(ids[0], lengths(6), GREEDY, early_exit=EARLY)
    assert single["token_ids"] == expected["token_ids"][:1]
    assert model.generate(ids, dict(), dict(compute_logprob=True))["token_ids"] == ids
    for wrong, message in (
        ([[1, -1]], "prompt 0: token id -1"),
        ([[1], []], "prompt 1: it has no tokens"),
        ([[1], ["w1"]], "give texts, lists of token ids"),
        ([[True]], "give texts, lists of token ids"),
        (["w1", [1]], "a list of list, str; give texts, lists of token ids"),
    ):
        with pytest.raises(GenerationError, match=message):
            model.generate(wrong, lengths(1))


def test_prompts_log_probabilities_keep_no_vocabulary_of_all_tokens(model, monkeypatch):
    from nemo_ee.generation import generate

    texts = [" ".join(f"w{(7 * i + j) % 190}" for j in range(40)) for i in range(4)]
    whole = model.generate(texts, dict(), dict(compute_logprob=True, all_probs=True))
    assert [len(rows) for rows in whole["full_logprob"]] == [40] * 4
    monkeypatch.setattr(generate, "FED", 80)
    monkeypatch.setattr(generate, "POSITIONS", 16)
    peak, lean = memory_peak(lambda: model.generate(texts, dict(), dict(compute_logprob=True)))
    assert lean["full_logprob"] is None and lean["token_ids"] == whole["token_ids"]
    for one, other, rows, ids in zip(
        lean["logprob"], whole["logprob"], whole["full_logprob"], whole["token_ids"], strict=True
    ):
        torch.testing.assert_close(one, other)
        torch.testing.assert_close(other[:-1], rows[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0])
        torch.testing.assert_close(other[-1], rows[-1].max())
    more, _ = memory_peak(lambda: model.generate(texts * 4, dict(), dict(compute_logprob=True)))
    logits = 16 * 40 * 201 * 8 / 2**20
    assert more - peak < 0.5 * logits, "four times the prompts take no more logits at a time"


SECTION = dict(  # NeMo 2.4.1's evaluation script hands these over
    greedy=True,
    top_k=0,
    top_p=0.9,
    temperature=1.0,
    add_BOS=False,
    tokens_to_generate=8,
    all_probs=False,
    repetition_penalty=1.2,
    min_tokens_to_generate=2,
    compute_logprob=False,
    end_strings=["<|endoftext|>"],
    compute_attention_mask=True,
    batch_size=2,
    outfile_path="out.txt",
)


def test_trainer_predict_is_our_engine_with_its_exits():
    head = HEADS["block, MLP, linear, untied"]
    model = tiny_model(
        tiny_model_config(head=head, share_embeddings_and_output_weights=False), dtype=torch.float64
    )
    assert model.predict_step(TEXTS, 0) is None
    model.set_inference_config({**SECTION, "early_exit": EARLY})
    batches = model.trainer.predict(model, DataLoader(TEXTS, batch_size=2))
    sampling = dict(use_greedy=True, add_BOS=False, repetition_penalty=1.2, end_strings=["<|endoftext|>"])
    expected = model.generate(TEXTS, lengths(8, 2), sampling, early_exit=EARLY)
    found = [batch["early_exit"][i] for batch in batches for i in range(len(batch["early_exit"]))]
    assert [ids for batch in batches for ids in batch["token_ids"]] == expected["token_ids"]
    assert [row["exit_layers"] for row in found] == [row["exit_layers"] for row in expected["early_exit"]]
    assert {n for row in found for n in row["exit_layers"]} > {8}, "some tokens leave"

    model.set_inference_config({**SECTION, "compute_logprob": True})
    (scored, *_) = model.trainer.predict(model, DataLoader(TEXTS[:2], batch_size=2))
    assert scored["sentences"] == TEXTS[:2] and scored["full_logprob"][0].shape[1] == 201

    model.set_inference_config({**SECTION, "greedy": False, "random_seed": 3})
    first, again = (model.predict_step(TEXTS, 0)["token_ids"] for _ in range(2))
    model.set_inference_config({**SECTION, "greedy": False, "random_seed": 4})
    assert first == again != model.predict_step(TEXTS, 0)["token_ids"]
    ids = torch.tensor([[7, 8, 9], [5, 6, 0]])
    assert [x[:2] for x in model.predict_step([ids, torch.tensor([3, 2])], 0)["token_ids"]] == [
        [7, 8],
        [5, 6],
    ]

    model.set_inference_config({**SECTION, "tokens_to_generate": -1, "top_k": -2, "repetition_penality": 1.0})
    with pytest.raises(ConfigError) as caught:
        model.predict_step(TEXTS, 0)
    text = str(caught.value)
    for key in (
        "inference_config.tokens_to_generate=-1",
        "inference_config.top_k=-2",
        "inference_config.repetition_penality",
    ):
        assert key in text
    model.set_inference_config({**SECTION, "random_seed": "x"})
    with pytest.raises(ConfigError, match="inference_config.random_seed"):
        model.predict_step(TEXTS, 0)


def test_greedy_ignores_a_temperature_of_0_and_all_is_minus_1(model):
    usual = model.generate(TEXTS, lengths(5), GREEDY)
    assert model.generate(TEXTS, lengths(5), {**GREEDY, "temperature": 0, "top_k": -1}) == usual
    with pytest.raises(
        ConfigError, match="temperature=0.0: must be at least 1e-06 to sample; .*decode greedily"
    ):
        model.generate(TEXTS, lengths(5), dict(use_greedy=False, temperature=0))
    with pytest.raises(ConfigError, match="temperature=-1.0: must be 0 or more"):
        model.generate(TEXTS, lengths(5), {**GREEDY, "temperature": -1})
    drawn = [
        model.generate(
            TEXTS,
            lengths(5),
            dict(use_greedy=False, top_k=k),
            generator=torch.Generator().manual_seed(1),
        )
        for k in (0, -1)
    ]
    assert drawn[0] == drawn[1]


def test_equal_prompts_get_different_samples_that_their_seed_repeats(model):
    def drawn():
        sampling = dict(use_greedy=False, temperature=1.5)
        prompts = [TEXTS[0]] * 6
        return model.generate(prompts, lengths(6), sampling, generator=torch.Generator().manual_seed(7))[
            "token_ids"
        ]

    texts = drawn()
    assert len({json.dumps(ids) for ids in texts}) == 6 and texts == drawn()


@pytest.mark.parametrize("asked", [dict(threshold=0.5), dict(lossless=True), dict(max_pending=2)], ids=str)
def test_what_is_asked_of_exits_that_are_not_there_is_an_error(model, asked):
    from nemo_ee.config import EarlyExitConfig
    from nemo_ee.decoding.request import parse_request

    name = next(iter(asked))
    with pytest.raises(ConfigError, match=rf"early_exit.{name}=.*: early_exit.exits=\[\] uses no exit"):
        parse_request(None, None, dict(exits=[], **asked), model.early_exit)
    with pytest.raises(ConfigError, match=rf"early_exit.{name}=.*: the model has no exits; .*adapter_file"):
        parse_request(None, None, asked, EarlyExitConfig(layers=()))
    for off in (False, None, {}, dict(exits=[]), dict(threshold=1.0), dict(threshold=None, lossless=False)):
        assert parse_request(None, None, off, EarlyExitConfig(layers=())).exits == {}
