# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Odd inputs and parameters of `model.generate`, and the pieces of it that need no weights."""

import random

import pytest
import torch

from nemo_ee.errors import ConfigError, GenerationError
from tests.support.tiny_gpt import HEADS, tiny_model, tiny_model_config, tokenizer_folder
from tests.support.tiny_tokenizer import save_tiny_tokenizer

GREEDY = dict(use_greedy=True, add_BOS=False)


def words():
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer

    from nemo_ee.generation.text import TextTokenizer

    return TextTokenizer(AutoTokenizer(tokenizer_folder()))


@pytest.fixture(scope="module")
def bytes_tokenizer(tmp_path_factory):
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer

    from nemo_ee.generation.text import TextTokenizer

    return TextTokenizer(
        AutoTokenizer(str(save_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), eos=False)))
    )


@pytest.fixture(scope="module")
def model():
    return tiny_model(tiny_model_config(head=HEADS["MLP, untied"]))


IDS = torch.tensor([[7, 8, 9], [10, 11, 0]])


@pytest.mark.parametrize(
    "inputs, message",
    [
        ((IDS, torch.tensor([3, 4])), "prompt 1: its length is 4; give 1 to the tensor's 3 tokens"),
        ((IDS, torch.tensor([-1, 2])), "prompt 0: its length is -1"),
        ((IDS, torch.tensor([3, 0])), "prompt 1: it has no tokens"),
        ((IDS, torch.tensor([3])), r"tensors of shapes \[2, 3\] and \[1\]"),
        ((IDS[0], torch.tensor([3])), r"tensors of shapes \[3\] and \[1\]"),
        ((IDS[:0], torch.tensor([]).long()), "at least one prompt"),
        ((IDS.float(), torch.tensor([3, 2])), "tensors of torch.float32 and torch.int64; give whole numbers"),
        ((IDS + 193, torch.tensor([3, 2])), "prompt 0: token id 201 is not in the vocabulary; use 0 to 200"),
        ((IDS - 8, torch.tensor([3, 2])), "prompt 0: token id -1 is not in"),
        (
            [IDS, torch.tensor([3, 2])],
            "a list of Tensor; give texts, lists of token ids, chats, or a tuple of two",
        ),
        (["w1", "w2 \ud800"], "prompt 1: it is no valid Unicode"),
        ([{"role": ["user"], "content": 3}], "every turn must list one role and one content"),
    ],
)
def test_inputs_that_are_refused(inputs, message):
    from nemo_ee.generation.prompts import tokenize_prompts

    with pytest.raises(GenerationError, match=message):
        tokenize_prompts(inputs, words(), False, 64)


@pytest.mark.parametrize("bos", [None, -1])
def test_a_tokenizer_without_bos_is_refused(bos):
    from nemo_ee.generation.prompts import tokenize_prompts
    from nemo_ee.generation.text import TextTokenizer

    class Tokenizer:
        bos_id, vocab_size = bos, 10

        def text_to_ids(self, text):
            return [5]

    with pytest.raises(GenerationError, match="add_BOS=true: the tokenizer has no BOS"):
        tokenize_prompts(["a"], TextTokenizer(Tokenizer()), True, 64)
    for add_bos in (None, False):
        assert tokenize_prompts(["a"], TextTokenizer(Tokenizer()), add_bos, 64) == [[5]]


@pytest.mark.parametrize(
    "length, sampling, key",
    [
        (30, None, "length_params=30: must be a mapping"),
        (None, ["greedy"], r"sampling_params=\[greedy\]: must be a mapping"),
        (None, dict(end_strings=["a", ""]), "end_strings=.*: every text ends with an empty one"),
        (None, dict(use_greedy=False, temperature=1e-30), "temperature=1e-30: must be at least 1e-06"),
    ],
)
def test_parameters_that_are_refused(model, length, sampling, key):
    from nemo_ee.decoding.request import parse_request

    with pytest.raises(ConfigError, match=key):
        parse_request(length, sampling, None, model.early_exit)


@pytest.mark.parametrize("rule", ["similarity", "patience"])
def test_lossless_decoding_refuses_rules_that_compare_exits(model, rule):
    from nemo_ee.decoding.request import parse_request

    options = {"lossless": True, "confidence": rule, "threshold": 0.5}
    with pytest.raises(ConfigError, match=f"confidence='?{rule}.*asks one exit per token.*max_probability"):
        parse_request(None, None, options, model.early_exit)


def test_lossless_requests_draft_above_a_threshold_of_their_own(model):
    from nemo_ee.decoding.request import DRAFTS_ABOVE, parse_request

    def thresholds(**options):
        return set(parse_request(None, None, options, model.early_exit).exits.values())

    assert model.early_exit.inference.threshold is None and thresholds(lossless=True) == {DRAFTS_ABOVE}
    assert thresholds(lossless=True, threshold=0.7) == {0.7}
    assert thresholds() == thresholds(lossless=False) == set(), "exits are off"
    with pytest.raises(ConfigError, match="thresholds are for confidence=max_probability, not for margin"):
        thresholds(lossless=True, confidence="margin")


@pytest.mark.parametrize("stored", [None, 0.8], ids=["null", "what training wrote before"])
def test_exits_that_were_never_calibrated_are_off(stored):
    from nemo_ee.config import parse_early_exit
    from nemo_ee.decoding.request import parse_request

    config = parse_early_exit(dict(layers=[10, 20], inference=dict(threshold=stored)), 30)

    def exits(*options):
        return parse_request(None, None, *options, config).exits

    assert exits(None) == exits(dict(always=False)) == exits(dict(exits=[])) == {}
    assert exits(dict(threshold=0.8)) == {10: 0.8, 20: 0.8}
    for options in (dict(exits=[10]), dict(always=True), dict(max_pending=2)):
        with pytest.raises(
            ConfigError, match=r"^early_exit.threshold=null: .*never calibrated.*threshold=0.8"
        ) as error:
            exits(options)
        assert next(iter(options)) in str(error.value)


@pytest.mark.parametrize("stored", [[0.8, 0.8], [0.8, 1.0], 0.7, 0.0], ids=str)
def test_thresholds_that_somebody_has_chosen_are_used(stored):
    from nemo_ee.config import parse_early_exit
    from nemo_ee.decoding.request import parse_request

    config = parse_early_exit(dict(layers=[10, 20], inference=dict(threshold=stored)), 30)
    expected = stored if isinstance(stored, list) else [stored] * 2
    assert list(parse_request(None, None, None, config).exits.values()) == expected


def test_the_line_that_says_that_exits_are_off_comes_once(caplog):
    from nemo.utils import logging

    logging._logger.addHandler(caplog.handler)
    try:
        never = tiny_model(tiny_model_config(num_layers=2, exits=[1]))
        calibrated = tiny_model(
            tiny_model_config(num_layers=2, exits=[1], early_exit__inference={"threshold": [0.9]})
        )
        for model, options in ((calibrated, None), (never, False), (never, dict(threshold=0.5))):
            model.generate(["w1 w2"], dict(max_length=1), dict(add_BOS=False), early_exit=options)
        assert not [r for r in caplog.records if "exits are off" in r.getMessage()]
        for _ in range(2):
            never.generate(["w1 w2"], dict(max_length=1), dict(add_BOS=False))
    finally:
        logging._logger.removeHandler(caplog.handler)
    (message,) = (r.getMessage() for r in caplog.records if "exits are off" in r.getMessage())
    assert "scripts/calibrate_early_exit.py" in message and "early_exit.threshold=0.8" in message


def test_who_asks_always():
    from nemo_ee.config import parse_early_exit
    from nemo_ee.decoding.request import parse_request

    config = parse_early_exit(dict(layers=[10, 20], inference=dict(threshold=[0.5, 0.6])), 30)

    def always(sampled, seeded, **options):
        return parse_request(None, dict(use_greedy=not sampled), options, config, seeded).always

    assert [always(*each) for each in ((0, 0), (0, 1), (1, 0), (1, 1))] == [False, False, False, True]
    assert always(0, 0, always=True) and not always(1, 1, always=False) and not always(1, 1, lossless=True)
    with pytest.raises(ConfigError, match="early_exit.always=true: lossless decoding chooses"):
        always(0, 0, always=True, lossless=True)


def test_the_lowest_temperature_is_greedy():
    from nemo_ee.decoding.request import LOWEST_TEMPERATURE, SamplingOptions
    from nemo_ee.decoding.sampling import token_distribution

    logits = torch.tensor([[300.0, 299.0, -300.0, float("-inf")]])
    options = SamplingOptions(use_greedy=False, temperature=LOWEST_TEMPERATURE)
    assert token_distribution(logits, options).tolist() == [[1, 0, 0, 0]]


@pytest.mark.parametrize("top_k, top_p", [(0, 0.0), (5, 1.0), (0, 0.7), (20, 0.9), (3, 1e-6), (99, 0.5)])
def test_top_k_and_top_p_are_nemos_and_transformers(top_k, top_p):
    from nemo.collections.nlp.modules.common.text_generation_utils import top_k_logits
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    from nemo_ee.decoding.sampling import keep_most_probable

    logits = 3 * torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    logits[:, 30:] = float("-inf")
    logits[2, :9], logits[3, 5] = 1.5, 40.0  # ties, and one token that has all
    given = logits.clone()
    expected = top_k_logits(logits.clone(), top_k=min(top_k, 40), top_p=top_p)
    assert keep_most_probable(logits, top_k, top_p).equal(expected)
    if top_k > 0:
        assert keep_most_probable(logits, top_k, 1.0).equal(TopKLogitsWarper(min(top_k, 40))(None, logits))
    if 0 < top_p < 1:  # of equal ones they may keep others
        theirs = TopPLogitsWarper(top_p)(None, logits)
        assert keep_most_probable(logits, 0, top_p).sort().values.equal(theirs.sort().values)
    assert logits.equal(given), "inputs stay as they are"


def test_a_rejected_draft_is_replaced_by_a_possible_token():
    """Where both distributions differ by rounding alone nothing is left of p - q to draw from."""
    from nemo_ee.decoding.drafts.verification import Acceptance
    from nemo_ee.decoding.generated_sequence import Draft
    from nemo_ee.decoding.transfer import to_host

    class Highest(random.Random):
        def random(self):
            return 1 - 1e-12

    q, p = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5 - 1e-7, 0.0]], dtype=torch.float64)
    for ahead in (False, True):
        acceptance = Acceptance([Draft(1, 2, 0.5, q)], p[None], Highest(), ahead)
        assert acceptance.outcome(*to_host(*acceptance.readings())) == (0, 1)


def test_predictions_of_several_exits_join_in_the_widest_dtype():
    from nemo_ee.decoding.prediction import Prediction, Rows
    from nemo_ee.decoding.step import Part, Step

    step, rows = Step.unanswered(2), Rows(0, 2, 2)
    for i, dtype in ((1, torch.bfloat16), (0, torch.float32)):
        logits = torch.tensor([[1.0009765625, 0.5]], dtype=dtype)
        prediction = Prediction(rows, logits, torch.tensor([0]), torch.tensor([0.6]))
        step.add(4, Part([i], prediction, [0]), [0.6], [0])
    shard = step.vocabulary_shard(2)
    assert shard.dtype == torch.float32 and shard[0, 0] == 1.0009765625 and shard[1, 0] == 1.0


def test_without_eos_nothing_is_forbidden_and_the_end_string_is_text(bytes_tokenizer):
    from nemo_ee.decoding.request import GenerationRequest
    from nemo_ee.generation.stopping import StopRule

    assert bytes_tokenizer.nemo.eos_id is None
    stop = StopRule(bytes_tokenizer, ["<|endoftext|>"])
    assert not stop.token_ids and stop.texts == ["<|endoftext|>"]
    sequence = stop.begin([5], GenerationRequest(min_length=3), 9)
    assert sequence.eos == ()
    assert not sequence.slot().changes_logits


def test_an_end_string_that_is_one_token_also_ends_within_others(bytes_tokenizer):
    from tests.support.stopping import ended

    ids = bytes_tokenizer.encode
    (alone,) = ids("the")
    text = ids("ran after the")
    assert text[-1] != alone, "the token with the space in front is another"
    assert ended(bytes_tokenizer, text, ["the"]) == len(text)
    assert ended(bytes_tokenizer, ids("the cat"), ["the"]) == 1


def test_an_end_string_out_of_vocabulary_does_not_end_at_every_unknown_token(tmp_path):
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
    from tokenizers.pre_tokenizers import Whitespace

    from nemo_ee.generation.stopping import StopRule
    from nemo_ee.generation.text import TextTokenizer
    from tests.support import tiny_gpt

    words = tiny_gpt.tokenizer()
    words.backend_tokenizer.pre_tokenizer = Whitespace()  # which parts a word from the ">" before it
    words.save_pretrained(tmp_path)
    known = AutoTokenizer(str(tmp_path))
    assert StopRule(TextTokenizer(known), ["zzz"]).token_ids == {known.eos_id}


def test_pieces_are_decoded_in_short_windows(bytes_tokenizer):
    from nemo_ee.running.display import token_pieces

    longest, original = 0, bytes_tokenizer.decode

    def recorded(ids, *args, **kwargs):
        nonlocal longest
        longest = max(longest, len(ids))
        return original(ids, *args, **kwargs)

    text = " the cat é漢😀 sat" * 20
    tokens, before = bytes_tokenizer.encode(text), bytes_tokenizer.encode("and")
    bytes_tokenizer.decode = recorded
    try:
        pieces = token_pieces(tokens, bytes_tokenizer, before)
    finally:
        del bytes_tokenizer.decode
    assert "".join(pieces) == text and len(pieces) == len(tokens) and longest <= 8


def test_broken_bytes_do_not_hold_back_what_follows(bytes_tokenizer):
    from nemo_ee.running.display import token_pieces

    broken = bytes_tokenizer.encode("😀")[:1] * 6
    pieces = token_pieces(broken + bytes_tokenizer.encode(" the cat"), bytes_tokenizer)
    assert all(pieces[:3]) and "".join(pieces).endswith(" the cat")


def test_added_tokens_with_characters_that_stand_for_no_byte():
    from nemo_ee.generation.output import token_texts
    from nemo_ee.generation.text import TextTokenizer

    class Inner:
        byte_decoder = {"Ġ": 32, "a": 97, "Ã": 195, "©": 169}

    class Tokenizer:
        tokenizer = Inner()

        def ids_to_tokens(self, ids):
            return [["Ġa", "Ã©", "<new line>"][i] for i in ids]

    assert token_texts([0, 1, 2], TextTokenizer(Tokenizer())) == [" a", "é", "<new line>"]


def test_greedy_decoding_draws_nothing(model):
    before = torch.get_rng_state()
    model.generate(["w1 w2"], dict(max_length=2), GREEDY)
    assert torch.get_rng_state().equal(before)


def test_log_probabilities_come_with_the_texts_that_were_given(model):
    texts = ["w1   w2", "w3 w4 w5"]  # as NeMo's; decoding would give one space
    assert model.generate(texts, dict(), dict(compute_logprob=True))["sentences"] == texts
    ids = IDS, torch.tensor([3, 2])
    assert model.generate(ids, dict(), dict(compute_logprob=True))["sentences"] == ["w1 w2 w3", "w4 w5"]


class TestNemosLoop:
    LENGTHS = dict(max_length=4, min_length=0)

    def strategy(self, model):
        from nemo_ee.generation.strategy import EarlyExitTextGenerationStrategy

        return EarlyExitTextGenerationStrategy(model)

    def test_room_is_reserved_for_what_the_model_can_generate(self, model):
        tokens, _ = self.strategy(model).tokenize_batch(["w1", "w2 w3"], 10**6, False)
        assert tokens.shape == (2, 65)

    def test_tensors_need_room(self, model):
        strategy = self.strategy(model)
        with pytest.raises(GenerationError, match=r"of shape \[2, 3\]; .* needs 7 columns"):
            model.generate((IDS.clone(), torch.tensor([3, 2])), self.LENGTHS, GREEDY, strategy=strategy)

    def test_probabilities_of_generated_tokens_are_refused(self, model):
        sampling = {**GREEDY, "all_probs": True}
        with pytest.raises(ConfigError, match="sampling_params.all_probs=true: NeMo's loop has no"):
            model.generate(["w1"], self.LENGTHS, sampling, strategy=self.strategy(model))
