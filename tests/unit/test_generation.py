# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""`model.generate`: our loop against plain forwards and against NeMo's loop, and what it refuses."""

import pytest
import torch

from nemo_ee.errors import ConfigError, GenerationError
from tests.support.tiny_gpt import HEADS, NEMO, TEXTS, tiny_model, tiny_model_config, tokenizer_folder
from tests.support.uncached import generate_uncached

GREEDY = dict(use_greedy=True, add_BOS=False)
EXITS = {2: 0.6, 4: 0.5, 6: 0.7}
EARLY = dict(threshold=list(EXITS.values()), always=True)


@pytest.fixture(scope="module")
def model():
    """Calibrated, as one threshold per exit says."""
    head = HEADS["block, MLP, linear, untied"]
    return tiny_model(
        tiny_model_config(
            head=head,
            share_embeddings_and_output_weights=False,
            early_exit__inference={"threshold": [0.8, 0.7, 0.6]},
        ),
        dtype=torch.float64,
    )


@pytest.fixture(scope="module")
def shortlist_model():
    head = HEADS["linear, shortlist"]
    return tiny_model(
        tiny_model_config(head=head, share_embeddings_and_output_weights=False), dtype=torch.float64
    )


def lengths(most, least=0):
    return dict(max_length=most, min_length=least)


def generated(model, output):
    """The generated part of each sentence's token ids."""
    return [
        ids[len(ids) - len(row["exit_layers"]) :]
        for ids, row in zip(output["token_ids"], output["early_exit"], strict=True)
    ]


def test_equals_uncached_and_reports_every_token(model):
    output = model.generate(TEXTS, lengths(20), GREEDY, early_exit=EARLY)
    for text, ids, row in zip(TEXTS, output["token_ids"], output["early_exit"], strict=True):
        prompt = model.tokenizer.text_to_ids(text)
        reference = generate_uncached(model.gpt, prompt, 20, EXITS)
        assert ids == prompt + reference.tokens
        assert row["exit_layers"] == reference.exit_layers
        assert row["confidences"] == pytest.approx(reference.confidences)
    assert output["sentences"][0].startswith("w1 w2 w3 ") and output["logprob"] is None
    assert output["tokens"][0][:3] == ["w1", "w2", "w3"] and output["offsets"][0][:4] == [0, 2, 4, 6]


def test_defaults_come_from_the_configuration(model):
    usual = model.generate(TEXTS, lengths(12), GREEDY)
    own = dict(threshold=[0.8, 0.7, 0.6])
    explicit = model.generate(TEXTS, lengths(12), GREEDY, early_exit=dict(**own, exits=[2, 4, 6]))
    in_params = model.generate(TEXTS, lengths(12), {**GREEDY, "early_exit": own})
    assert usual == explicit == in_params


@pytest.mark.parametrize("off", [False, dict(threshold=1.0), dict(exits=[])], ids=str)
def test_off_is_full_depth_greedy(model, off):
    output = model.generate(TEXTS, lengths(12), GREEDY, early_exit=off)
    for text, ids, row in zip(TEXTS, output["token_ids"], output["early_exit"], strict=True):
        prompt = model.tokenizer.text_to_ids(text)
        assert ids == prompt + generate_uncached(model.gpt, prompt, 12, {}).tokens
        assert row["exit_layers"] == [8] * 12


@pytest.mark.parametrize("which", ["model", "shortlist_model"])
def test_nemos_loop_gives_the_same_tokens(which, request):
    from megatron.core.num_microbatches_calculator import get_current_global_batch_size

    from nemo_ee.generation.strategy import EarlyExitTextGenerationStrategy

    model = request.getfixturevalue(which)
    ours = model.generate(TEXTS, lengths(14), GREEDY, early_exit=EARLY)
    strategy = EarlyExitTextGenerationStrategy(model, threshold=EARLY["threshold"])
    for _ in range(2):  # a strategy may be used again
        theirs = model.generate(TEXTS, lengths(14), NEMO, strategy=strategy)
        for a, b, text in zip(ours["token_ids"], theirs["token_ids"], TEXTS, strict=True):
            assert b[: len(a)] == a, text
        for a, b in zip(ours["early_exit"], theirs["early_exit"], strict=True):
            assert b["exit_layers"][:14] == a["exit_layers"]
            assert b["confidences"][:14] == pytest.approx(a["confidences"])
    if (
        which == "model"
    ):  # where none meets EOS, the longest prompt gets 14 tokens and the others go on until then
        assert [len(row["exit_layers"]) for row in theirs["early_exit"]] == [18, 14, 20]
    assert get_current_global_batch_size() == model.cfg.global_batch_size, (
        "NeMo's loop sets it to the prompts' number"
    )


def test_nemos_loop_with_token_tensors(model):
    from nemo_ee.generation.strategy import EarlyExitTextGenerationStrategy

    ids = [model.tokenizer.text_to_ids(text) for text in TEXTS]
    padded = torch.tensor([row + [0] * (17 - len(row)) for row in ids])
    inputs = padded, torch.tensor([len(row) for row in ids])
    ours = model.generate(inputs, lengths(10), GREEDY, early_exit=EARLY)
    strategy = EarlyExitTextGenerationStrategy(model, threshold=EARLY["threshold"])
    theirs = model.generate((padded.clone(), inputs[1]), lengths(10), NEMO, strategy=strategy)
    assert [row[: len(a)] for row, a in zip(theirs["token_ids"], ours["token_ids"], strict=True)] == ours[
        "token_ids"
    ]


def test_nemos_own_strategy_still_works(model):
    from nemo.collections.nlp.modules.common.text_generation_strategy import GPTModelTextGenerationStrategy

    full = model.generate(TEXTS[:1], lengths(8), GREEDY, early_exit=False)
    theirs = model.generate(TEXTS[:1], lengths(8), NEMO, strategy=GPTModelTextGenerationStrategy(model))
    assert theirs["token_ids"][0] == full["token_ids"][0]


def test_nemos_loop_stops_at_end_strings_and_notes_no_exits_beyond(model):
    from nemo_ee.generation.strategy import EarlyExitTextGenerationStrategy

    ours = model.generate(TEXTS, lengths(14), GREEDY, early_exit=EARLY)
    word = ours["tokens"][1][7 + 4]  # the second prompt ends with its fifth token, or before
    sampling = {**NEMO, "end_strings": [word]}
    ended = model.generate(TEXTS, lengths(14), {**GREEDY, "end_strings": [word]}, early_exit=EARLY)
    strategy = EarlyExitTextGenerationStrategy(model, threshold=EARLY["threshold"])
    theirs = model.generate(TEXTS, lengths(14), sampling, strategy=strategy)
    count = len(ended["early_exit"][1]["exit_layers"])
    assert 1 <= count <= 5 and ended["tokens"][1][-1] == word
    assert theirs["early_exit"][1]["exit_layers"] == ended["early_exit"][1]["exit_layers"]
    assert theirs["token_ids"][1][: 7 + count] == ended["token_ids"][1]


def test_end_strings_look_at_generated_text_only(model):
    free = model.generate(TEXTS, lengths(12), GREEDY, early_exit=EARLY)
    two_words = " ".join(free["tokens"][0][3 + 4 : 3 + 6])
    output = model.generate(TEXTS, lengths(12), {**GREEDY, "end_strings": [two_words]}, early_exit=EARLY)
    assert output["sentences"][0].endswith(two_words) and len(output["token_ids"][0]) == 3 + 6
    assert output["token_ids"][1:] == free["token_ids"][1:], "the others go on, unchanged"
    prompt_tail = "w2 w3"
    output = model.generate(TEXTS, lengths(12), {**GREEDY, "end_strings": [prompt_tail]}, early_exit=EARLY)
    assert output["token_ids"] == free["token_ids"]


def test_eos_ends_a_sequence_and_min_length_forbids_it(model):
    free = model.generate(TEXTS, lengths(12), GREEDY, early_exit=EARLY)
    eos = free["token_ids"][0][3 + 5]
    model.tokenizer.eos_token = model.tokenizer.ids_to_tokens([eos])[0]
    try:
        ended = model.generate(TEXTS, lengths(12), GREEDY, early_exit=EARLY)
        longer = model.generate(TEXTS, lengths(12, 9), GREEDY, early_exit=EARLY)
    finally:
        model.tokenizer.eos_token = "<eos>"
    end = free["token_ids"][0].index(eos, 3)
    assert ended["token_ids"][0] == free["token_ids"][0][: end + 1]
    first = generated(model, longer)[0]
    assert eos not in first[:9] and first[: end - 3] == free["token_ids"][0][3:end]


def sampled(model, seed, **options):
    generator = torch.Generator().manual_seed(seed)
    sampling = dict(use_greedy=False, add_BOS=False, **options)
    return model.generate(TEXTS, lengths(12), sampling, early_exit=EARLY, generator=generator)["token_ids"]


def test_sampling_is_reproducible(model):
    assert sampled(model, 1) == sampled(model, 1) != sampled(model, 2)


def test_top_k_of_one_low_temperature_and_low_top_p_are_greedy(model):
    greedy = model.generate(TEXTS, lengths(12), GREEDY, early_exit=EARLY)["token_ids"]
    assert sampled(model, 1, top_k=1) == greedy
    assert sampled(model, 1, temperature=1e-4) == greedy
    assert sampled(model, 1, top_p=1e-6) == greedy
    assert sampled(model, 1, top_k=10**9) == sampled(model, 1)


def test_sampling_follows_the_exits_distribution(shortlist_model):
    """First tokens of many equal prompts: their frequencies against the final exit's softmax."""
    model, count = shortlist_model, 4000
    prompts = [TEXTS[0]] * count
    generator = torch.Generator().manual_seed(0)
    sampling = dict(use_greedy=False, add_BOS=False, temperature=2.0)
    output = model.generate(
        prompts, lengths(2), sampling, early_exit=dict(threshold=0.0), generator=generator
    )
    ids = torch.tensor([model.tokenizer.text_to_ids(TEXTS[0])])
    with torch.no_grad():
        states = model.gpt.forward_states(ids, torch.arange(3)[None], None)
        logits = (states.output[-1, 0] @ model.gpt.output_weight().T)[:201]
    expected = (logits / 2.0).softmax(-1)
    seen = torch.bincount(torch.tensor([row[3] for row in output["token_ids"]]), minlength=201) / count
    assert (seen - expected).abs().max() < 4 * (0.25 / count) ** 0.5  # four standard errors of a frequency
    kept = set(model.gpt.exits["2"].projection.token_ids.tolist())
    assert {row[4] for row in output["token_ids"]} <= kept


def test_all_probs_are_those_of_the_exit_used(model):
    output = model.generate(TEXTS[:1], lengths(6), {**GREEDY, "all_probs": True}, early_exit=EARLY)
    full, chosen = output["full_logprob"][0], output["logprob"][0]
    assert full.shape == (6, 201) and torch.allclose(full.exp().sum(-1), torch.ones(6, dtype=full.dtype))
    assert chosen.exp().tolist() == pytest.approx(output["early_exit"][0]["confidences"])


def test_compute_logprob_is_of_the_prompt(model):
    output = model.generate(TEXTS, lengths(5), {**GREEDY, "compute_logprob": True})
    for text, ids, logprob in zip(TEXTS, output["token_ids"], output["logprob"], strict=True):
        assert ids == model.tokenizer.text_to_ids(text) and len(logprob) == len(ids)
        with torch.no_grad():
            states = model.gpt.forward_states(torch.tensor([ids]), torch.arange(len(ids))[None], None)
            expected = (states.output[:, 0] @ model.gpt.output_weight().T)[:, :201].log_softmax(-1)
        assert torch.allclose(logprob[:-1], expected[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0])
        assert logprob[-1].item() == pytest.approx(expected[-1].max().item())


def test_bos_chats_and_conversations(model):
    bos = model.tokenizer.bos_id
    assert model.generate(TEXTS[:1], lengths(1), dict(add_BOS=True))["token_ids"][0][:2] == [bos, 7 - 0]
    turns = [{"role": "user", "content": "w5 w6"}]
    single = model.generate(turns, lengths(3))
    nemo_form = model.generate([{"role": ["user", "user"], "content": ["w5 w6", "w7"]}], lengths(3))
    many = model.generate([turns, [{"role": "user", "content": "w7"}]], lengths(3))
    assert single["sentences"][0].startswith("user w5 w6 ") and "assistant" in single["sentences"][0]
    assert nemo_form == many and single["token_ids"][0] == many["token_ids"][0]


def test_generation_stops_at_the_position_limit(model):
    prompt = " ".join(f"w{n}" for n in range(60))
    output = model.generate([prompt], lengths(30), GREEDY, early_exit=EARLY)
    assert len(output["token_ids"][0]) == 65  # the last token is generated at position 63 and never fed


def test_training_goes_on_after_generating(model):
    """Nothing that generation leaves behind (rotary cache, modes) is in the way of a backward pass."""
    gpt = model.gpt
    gpt.train()
    try:
        model.generate(TEXTS[:1], lengths(61), GREEDY, early_exit=EARLY)
        assert gpt.training and gpt.decoder.training
        with torch.enable_grad():
            ids = torch.arange(64)[None]
            gpt.forward_states(ids, ids, None).output.sum().backward()
        assert gpt.decoder.layers[0].mlp.linear_fc1.weight.grad.abs().sum() > 0
    finally:
        gpt.zero_grad()
        gpt.eval()


@pytest.mark.parametrize(
    "inputs, message",
    [
        ("w1", "must be a non-empty list"),
        ([], "must be a non-empty list"),
        ([""], "prompt 0: it has no tokens"),
        (["w1", " ".join(["w2"] * 65)], "prompt 1: 65 tokens exceed the model's 64 positions"),
        (["w1", 3], "a list of int, str"),
        ([{"role": "user"}], "must have role and content"),
    ],
)
def test_prompts_that_are_refused(model, inputs, message):
    with pytest.raises(GenerationError, match=message):
        model.generate(inputs, lengths(3), GREEDY)


@pytest.mark.parametrize(
    "length, sampling, early, key",
    [
        (dict(max_length=-1), {}, None, "length_params.max_length=-1"),
        (dict(max_lenght=3), {}, None, "length_params.max_lenght=3: unknown key; did you mean max_length"),
        ({}, dict(temperature=0.0, use_greedy=False), None, "sampling_params.temperature=0.0"),
        ({}, dict(top_p=1.5), None, "sampling_params.top_p=1.5"),
        ({}, dict(top_k=-2), None, "sampling_params.top_k=-2"),
        ({}, dict(greedy=True), None, "did you mean use_greedy"),
        ({}, dict(end_strings="stop"), None, "sampling_params.end_strings"),
        ({}, {}, dict(threshold=1.5), "early_exit.threshold=1.5"),
        ({}, {}, dict(threshold=[0.5, 0.5]), "2 thresholds for 3 exits"),
        ({}, {}, dict(exits=[3]), r"early_exit.exits=\[3\]: not all of the model's exits \[2, 4, 6\]"),
        ({}, {}, dict(max_pending=-1), "early_exit.max_pending=-1"),
        ({}, {}, dict(treshold=0.5), "did you mean threshold"),
        ({}, {}, "fast", "must be a mapping or false"),
        ({}, {}, dict(exits=[4, 2], threshold=[0.9, 0.5]), r"exits=\[4, 2\]: exits must ascend.* \[2, 4\]"),
        ({}, {}, dict(exits=[2, 2]), "named once"),
        ({}, {}, dict(exits=[[2]]), r"early_exit.exits=\[\[2\]\]: expected a list of int or null"),
        ({}, {}, dict(exits=[2], threshold=[0.9, 0.5]), "2 thresholds for 1 exits"),
        ({}, {}, dict(max_pending="3"), "early_exit.max_pending=3: expected int or null, got str"),
        (dict(max_length=2.5), {}, None, "length_params.max_length=2.5: expected int"),
        ({}, dict(use_greedy="false"), None, "sampling_params.use_greedy=false: expected bool, got str"),
        ({}, dict(all_probs="no"), None, "sampling_params.all_probs=no"),
        ({}, dict(end_strings=7), None, "sampling_params.end_strings=7"),
        ({}, dict(end_strings=[7]), None, r"sampling_params.end_strings=\[7\]: expected a list of str"),
    ],
)
def test_parameters_that_are_refused(model, length, sampling, early, key):
    with pytest.raises(ConfigError, match=key):
        model.generate(TEXTS, length, sampling, early_exit=early)


def test_thresholds_belong_to_their_confidence_rule():
    from nemo_ee.config import parse_early_exit
    from nemo_ee.decoding.request import parse_request

    config = parse_early_exit(dict(layers=[10, 20], inference=dict(threshold=0.7)), 30)

    def request(**given):
        return parse_request(None, None, given, config)

    assert request(confidence="max_probability").exits == {10: 0.7, 20: 0.7}
    other = request(confidence="entropy", threshold=0.4)
    assert (other.confidence, other.exits) == ("entropy", {10: 0.4, 20: 0.4})
    assert request(confidence="entropy", exits=[]).exits == {}
    with pytest.raises(
        ConfigError, match="threshold=null: .* for confidence=max_probability, not for entropy"
    ):
        request(confidence="entropy")


def test_default_thresholds_belong_to_their_exits():
    from nemo_ee.config import parse_early_exit
    from nemo_ee.decoding.request import parse_request

    inference = dict(exits=[10, 20], threshold=[0.7, 0.9])
    config = parse_early_exit(dict(layers=[10, 20, 25], inference=inference), 30)

    def exits(**given):
        return parse_request(None, None, given, config).exits

    assert exits() == {10: 0.7, 20: 0.9} and exits(exits=[20]) == {20: 0.9}
    assert exits(exits=[10, 25], threshold=[0.5, 0.6]) == {10: 0.5, 25: 0.6}
    with pytest.raises(ConfigError, match=r"threshold=null: .*exits \[10, 20\], none for \[25\]"):
        exits(exits=[10, 25])


def test_parameters_may_come_from_omegaconf(model):
    from omegaconf import OmegaConf

    from nemo_ee.decoding.request import parse_request

    sampling = OmegaConf.create(dict(end_strings=["a"], top_k=None, early_exit=dict(exits=[2])))
    request = parse_request(OmegaConf.create(dict(max_length=5)), sampling, None, model.early_exit)
    assert request.sampling.end_strings == ("a",) and request.max_length == 5 and list(request.exits) == [2]


def test_untuned_exits_are_warned_of(caplog):
    """Once; tied exits project with the backbone's weight and need no tuning to fire."""
    from nemo.utils import logging

    logging._logger.addHandler(caplog.handler)
    try:
        untuned = tiny_model(tiny_model_config(head=HEADS["MLP, untied"]))
        with torch.no_grad():
            untuned.gpt.exits["4"].projection.weight.zero_()
        for _ in range(2):
            untuned.generate(TEXTS, lengths(1), GREEDY)
        tiny_model(tiny_model_config(head=HEADS["norm, tied"])).generate(TEXTS, lengths(1), GREEDY)
    finally:
        logging._logger.removeHandler(caplog.handler)
    (message,) = (r.getMessage() for r in caplog.records if "projections of zeros" in r.getMessage())
    assert "exits 4 have" in message and "restore_with_exits" in message


def test_every_fault_is_reported_at_once(model):
    with pytest.raises(ConfigError) as caught:
        model.generate(TEXTS, dict(max_length=-1), dict(top_p=2), early_exit=dict(threshold=3))
    assert len(caught.value.faults) == 3


def test_chat_without_a_template_is_refused():
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer

    from nemo_ee.generation.prompts import tokenize_prompts
    from nemo_ee.generation.text import TextTokenizer

    bare = TextTokenizer(AutoTokenizer(tokenizer_folder(chat=False)))
    with pytest.raises(GenerationError, match="no chat template"):
        tokenize_prompts([{"role": "user", "content": "w1"}], bare, False, 64)


def test_strategy_refuses_bad_options(model):
    from nemo_ee.generation.strategy import EarlyExitTextGenerationStrategy

    with pytest.raises(ConfigError, match="early_exit.threshold=2"):
        EarlyExitTextGenerationStrategy(model, threshold=2)


def test_options_that_a_strategy_would_ignore_are_refused(model):
    from nemo.collections.nlp.modules.common.text_generation_strategy import GPTModelTextGenerationStrategy

    with pytest.raises(ConfigError, match="early_exit=.*: has no effect with a strategy"):
        model.generate(TEXTS, lengths(3), strategy=GPTModelTextGenerationStrategy(model), early_exit=EARLY)
    sampling = dict(NEMO, early_exit=EARLY)
    with pytest.raises(ConfigError, match=r'sampling_params\["early_exit"\]=.*: has no effect with'):
        model.generate(TEXTS, lengths(3), sampling, strategy=GPTModelTextGenerationStrategy(model))


def test_bfloat16_generates():
    model = tiny_model(tiny_model_config(head=HEADS["block, shortlist"], precision=32), dtype=torch.bfloat16)
    output = model.generate(TEXTS, lengths(12), GREEDY, early_exit=dict(threshold=0.4, always=True))
    layers = {layer for row in output["early_exit"] for layer in row["exit_layers"]}
    assert len(layers) > 1 and all(len(row["exit_layers"]) == 12 for row in output["early_exit"])


@pytest.mark.parametrize("o2", [False, True], ids=["autocast", "O2"])
def test_mixed_precision_generates_in_both_loops(o2):
    """The first tokens' confidences are float32's, as far as bfloat16 goes, and both loops choose the same tokens.

    Its eight bits move one confidence by 2 % in the median, by up to 16 % over 150 prompts, and by other amounts
    with every release of torch: only of many prompts together is there something to hold.
    """
    from nemo_ee.generation.strategy import EarlyExitTextGenerationStrategy

    head = HEADS["block, MLP, linear, untied"]
    single = tiny_model(tiny_model_config(head=head))
    half = tiny_model(tiny_model_config(head=head, precision="bf16", megatron_amp_O2=o2))
    assert half.gpt.output_weight().dtype == (torch.bfloat16 if o2 else torch.float32)
    prompts, early = 40, dict(threshold=0.99, always=True)
    drawn = torch.randint(6, 200, (prompts, 7), generator=torch.Generator().manual_seed(0))
    firsts = [
        [(row["exit_layers"][0], row["confidences"][0]) for row in output["early_exit"]]
        for output in (
            model.generate((drawn, torch.full((prompts,), 7)), lengths(1), GREEDY, early_exit=early)
            for model in (single, half)
        )
    ]
    pairs = [(x, y) for (left, x), (other, y) in zip(*firsts, strict=True) if left == other]
    differences = sorted(abs(y / x - 1) for x, y in pairs)
    assert len(pairs) > 0.8 * prompts, "few are so near to the threshold that they leave elsewhere"
    assert 0 < differences[len(pairs) // 2] < 0.06, "rounded, and no more than that"

    ids = torch.tensor([[7, 8, 9, 20, 33, 41, 42]]), torch.tensor([7])
    ours = half.generate(ids, lengths(6), GREEDY, early_exit=early)
    strategy = EarlyExitTextGenerationStrategy(half, threshold=0.99)
    text = half.tokenizer.ids_to_text(ids[0][0].tolist())
    theirs = half.generate([text], lengths(6), NEMO, strategy=strategy)
    assert theirs["token_ids"][0][: len(ours["token_ids"][0])] == ours["token_ids"][0]
