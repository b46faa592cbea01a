# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Texts with `output_layer=exact8` are those with `full`, token for token, whoever decodes beside them."""

import pytest
import torch

from nemo_ee.decoding.cpu.output_search import OutputSearch
from nemo_ee.decoding.layers.lean_head import SearchedOutput
from nemo_ee.decoding.pipeline.stage import Stage, TokenBatch
from tests.support.drafting import drafting_eagerly
from tests.support.tiny_gpt import GPT3, HEADS, tiny_model, tiny_model_config
from tests.unit.test_session import sequence

PROMPTS = [[7, 8, 9, 20, 33], [41], [100, 7, 55, 56, 12, 13, 90, 3], [5, 6], [199, 3, 3]]
PROMPTS += [[n, 2 * n, 3 * n] for n in (11, 17, 23, 29)]
STEPS = 12
WAYS = {
    "full depth": False,
    "exits": dict(threshold=[0.7, 0.5, 0.6], always=True),
    "lossless": dict(threshold=0.3, lossless=True),
}
KINDS = {"float32": (None, "native"), "bf16": (None, "bf16"), "float64": (torch.float64, "native")}


class Asked:
    """Counts searches, and those that found all."""

    def __init__(self, monkeypatch):
        self.searches = self.found = 0
        search = OutputSearch.arrays

        def counted(itself, emittable, x):
            answer = search(itself, emittable, x)
            if x.any():  # not what compiles the kernel
                self.searches, self.found = self.searches + 1, self.found + (answer is not None)
            return answer

        monkeypatch.setattr(OutputSearch, "arrays", counted)


@pytest.fixture
def asked(monkeypatch):
    return Asked(monkeypatch)


def made(head="norm, tied", dtype=None, **overrides):
    return tiny_model(
        tiny_model_config(head=HEADS[head], share_embeddings_and_output_weights=False, **overrides),
        dtype=dtype,
    )


def generated(model, count, way, **sampling):
    ids = torch.zeros(count, 8, dtype=torch.long)
    for row, prompt in zip(ids, PROMPTS, strict=False):
        row[: len(prompt)] = torch.tensor(prompt)
    lengths = torch.tensor([len(prompt) for prompt in PROMPTS[:count]])
    with drafting_eagerly():
        output = model.generate(
            (ids, lengths), dict(max_length=STEPS), dict(add_BOS=False, **sampling), early_exit=WAYS[way]
        )
    return output, [each["exit_layers"] for each in output["early_exit"]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", HEADS)
def test_greedy_texts_are_the_full_layers(head, kind, asked):
    dtype, weights = KINDS[kind]
    model, batches = (
        made(head, dtype),
        ((1, "exits"), (2, "full depth"), (3, "lossless"), (8, "exits"), (9, "lossless")),
    )
    texts, confidences = [], []
    for output_layer in ("full", "exact8"):
        model.prepare_decoding(weights, output_layer=output_layer)
        assert output_layer == "exact8" or asked.searches == 0
        outputs = [generated(model, *batch) for batch in batches]
        texts.append([(output["token_ids"], layers) for output, layers in outputs])
        confidences.append([c for o, _ in outputs for each in o["early_exit"] for c in each["confidences"]])
    assert texts[0] == texts[1]
    assert asked.found > 0.8 * asked.searches > 10
    exact, rough = map(torch.tensor, confidences)
    assert 0 < (exact - rough).abs().max() < 0.1, "what is reported is approximate"


def session_texts(gpt, sequences, output_layer):
    from nemo_ee.decoding.decoding_model import DecodingModel
    from nemo_ee.decoding.session import DecodingSession

    with torch.inference_mode(), drafting_eagerly():
        model = DecodingModel(gpt, output_layer=output_layer)
        with DecodingSession(model, [2, 4, 6], len(sequences), 40) as session:
            session.add(sequences)
            while session.running:
                session.step()
    return [(s.tokens, s.exit_layers) for s in sequences]


def mixed():
    """Greedy, lossless and sampled ones, one with all probabilities; some texts may not end yet where they would."""
    exits = {2: 0.7, 4: 0.5, 6: 0.6}
    out = [
        sequence(PROMPTS[0], exits, limit=STEPS),
        sequence(PROMPTS[1], {}, limit=STEPS),
        sequence(PROMPTS[2], {2: 0.3}, True, limit=STEPS),
        sequence(PROMPTS[3], exits, limit=STEPS, temperature=1.2, top_k=30, repetition_penalty=1.3),
        sequence(PROMPTS[4], exits, limit=STEPS),
    ]
    return out


def test_neighbours_that_sample_change_nothing(asked):
    gpt = made(dtype=torch.float64).gpt
    expected, found = (session_texts(gpt, mixed(), layer) for layer in ("full", "exact8"))
    assert found == expected and asked.searches > 0
    for alone, other in zip(mixed(), found, strict=True):
        if not alone.request.lossless:
            assert session_texts(gpt, [alone], "exact8") == [other]


def test_who_wants_probabilities_is_not_searched_for(asked):
    gpt = made().gpt
    options = dict(temperature=1.2, top_p=0.9)
    session_texts(
        gpt, [sequence(prompt, {2: 0.6}, limit=STEPS, **options) for prompt in PROMPTS[:3]], "exact8"
    )
    session_texts(gpt, [sequence(PROMPTS[0], {2: 0.4}, True, limit=STEPS, **options)], "exact8")
    assert asked.searches == 0
    model = made()
    model.prepare_decoding(output_layer="full")
    expected = generated(model, 2, "exits", all_probs=True)[0]
    model.prepare_decoding(output_layer="exact8")
    assert asked.searches > 0, "their price is measured"
    asked.searches = 0
    found = generated(model, 2, "exits", all_probs=True)[0]
    assert found["token_ids"] == expected["token_ids"]
    assert all(
        mine.equal(theirs)
        for mine, theirs in zip(found["full_logprob"], expected["full_logprob"], strict=True)
    )
    assert asked.searches == 0


def test_texts_that_may_not_end_yet(asked):
    """Where what would end it comes up, the layer's own probabilities say what comes instead."""
    import dataclasses

    gpt = made(dtype=torch.float64).gpt
    usual = session_texts(gpt, [sequence(PROMPTS[0], {}, limit=STEPS)], "full")[0][0]

    def later():
        one = sequence(PROMPTS[0], {}, limit=STEPS, ends=frozenset(usual[2:5]))
        one.request, one.eos = dataclasses.replace(one.request, min_length=9), tuple(usual[2:5])
        return [one]

    expected, searched_before = session_texts(gpt, later(), "full"), asked.searches
    assert session_texts(gpt, later(), "exact8") == expected and asked.searches > searched_before == 0
    assert len(expected[0][0]) >= 9 and expected[0][0] != usual


def test_logits_are_the_layers_own_if_somebody_asks(asked):
    from nemo_ee.decoding.decoding_model import DecodingModel

    with torch.inference_mode():
        model = DecodingModel(made().gpt, output_layer="exact8")
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
        searched, full = model.greedy_output.predict(x), model.output.predict(x)
        assert asked.found == 1 and searched.tokens.equal(full.tokens)
        assert not isinstance(searched.source, torch.Tensor)
        some = searched.select([3, 1])
        assert some.tokens.equal(full.tokens[[3, 1]]) and some.logits.equal(full.logits[[3, 1]])
        assert searched.logits.equal(full.logits)
        for other in (torch.full((1, 64), torch.nan), torch.randn(9, 64)):
            assert isinstance(model.greedy_output.predict(other).source, torch.Tensor), "the layer itself"


@pytest.mark.parametrize(
    "overrides, options",
    [
        (GPT3, {}),
        ({}, dict(weights="int8")),
        ({}, dict(output_layer="full")),
    ],
    ids=["LayerNorm", "8 bits already", "full"],
)
def test_what_is_not_searched(overrides, options):
    from nemo_ee.decoding.decoding_model import DecodingModel

    with torch.inference_mode():
        model = DecodingModel(made(**overrides).gpt, **{"output_layer": "exact8", **options})
    assert model.greedy_output is model.output


def test_a_stage_of_a_pipeline_searches(asked):
    from nemo_ee.decoding.decoding_model import DecodingModel

    answers = []
    with torch.inference_mode():
        gpt = made(dtype=torch.float64).gpt
        for output_layer in ("full", "exact8"):
            stage = Stage(DecodingModel(gpt, output_layer=output_layer), [], 5, 40, "max_probability")
            for key, prompt in enumerate(PROMPTS[:5]):
                stage.open(key, sequence(prompt, {}, limit=STEPS))
            new = TokenBatch([*range(5)], [0] * 5, PROMPTS[:5], [True] * 5, [False] * 5)
            answers.append([answer.token for answer in stage.run(new, None)[1]])
    assert answers[0] == answers[1] and asked.found == asked.searches == 1


def test_bad_values_are_named():
    from nemo_ee.errors import ConfigError

    with pytest.raises(ConfigError, match="output_layer=exact: .*did you mean exact8"):
        made().prepare_decoding(output_layer="exact")


def test_it_is_the_default():
    model = made()
    model.prepare_decoding()
    assert isinstance(model.decoding_model().greedy_output, SearchedOutput)
    model.release_decoding()
    assert not isinstance(model.decoding_model().greedy_output, SearchedOutput), (
        "a call alone is not worth it"
    )
