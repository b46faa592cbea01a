# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Confidence rules against their definitions, and in decoding."""

import math

import pytest
import torch

from tests.support.tiny_gpt import HEADS, tiny_model, tiny_model_config
from tests.unit.test_decode import PROMPTS, decode, make_decoder

pytestmark = pytest.mark.usefixtures("gpt")  # brings up the parallel groups, which reductions ask for
BUILT_IN = ["max_probability", "entropy", "margin", "similarity", "patience"]


def evidence(logits, emittable=None, **more):
    from nemo_ee.decoding.confidence_rules import ExitEvidence
    from nemo_ee.decoding.prediction import Prediction, Rows

    rows = Rows(0, logits.shape[1], logits.shape[1] if emittable is None else emittable)
    return ExitEvidence(Prediction.from_logits(logits, rows), torch.zeros(len(logits), 4), **more)


def confidence(name, given):
    from nemo_ee.decoding.confidence_rules import CONFIDENCE_RULES

    return CONFIDENCE_RULES[name].confidence(given)


@pytest.mark.parametrize("name", BUILT_IN)
def test_confidences_lie_between_0_and_1(name):
    generator = torch.Generator().manual_seed(1)
    logits = 30 * torch.randn(200, 11, generator=generator)
    logits[:, 8:10] = float("-inf")
    hidden = torch.randn(2, 200, 4, generator=generator)
    more = dict(previous_hidden=hidden[1], agreeing=torch.randint(1, 5, (200,), generator=generator))
    values = confidence(name, evidence(logits, 8, **more))
    assert values.shape == (200,) and ((values >= 0) & (values <= 1)).all()


def test_entropy_is_0_for_a_uniform_and_1_for_a_certain_prediction():
    given = evidence(torch.tensor([[0.0] * 8, [200.0] + [0.0] * 7, [0.0, 0.0] + [-math.inf] * 6]))
    assert confidence("entropy", given).tolist() == pytest.approx([0, 1, 0], abs=1e-6)
    logits = torch.tensor([[1.0, 0.5, -2.0]])
    p = logits.softmax(-1)
    expected = 1 + float((p * p.log()).sum()) / math.log(3)
    assert confidence("entropy", evidence(logits)).item() == pytest.approx(expected, rel=1e-5)


def test_margin_counts_an_outcome_that_cannot_be_emitted():
    logits = torch.tensor([[2.0, 1.0, 0.0], [2.0, 0.0, 1.0], [1.0, 0.0, 2.0]])
    p = logits.softmax(-1)
    expected = [p[0, 0] - p[0, 1], p[1, 0] - p[1, 2], 0.0]
    assert confidence("margin", evidence(logits, 2)).tolist() == pytest.approx(
        [float(x) for x in expected], rel=1e-5
    )


def test_similarity_is_0_without_an_exit_before():
    from nemo_ee.decoding.confidence_rules import ExitEvidence

    now = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    before = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
    assert confidence("similarity", ExitEvidence(None, now, before)).tolist() == pytest.approx([0, 1, 0.5])


def test_a_name_is_registered_once():
    from nemo_ee.decoding.confidence_rules import register_confidence_rule

    with pytest.raises(ValueError, match="entropy"):
        register_confidence_rule("entropy")(lambda given: given.agreeing)


@pytest.fixture(scope="module")
def gpt():
    config = tiny_model_config(
        head=HEADS["linear, shortlist"], exits=[1, 3, 4, 6], share_embeddings_and_output_weights=False
    )
    return tiny_model(config, dtype=torch.float64).gpt


@pytest.mark.parametrize(
    "name, threshold", [("entropy", 0.5), ("margin", 0.3), ("similarity", 0.7), ("patience", 0.9)]
)
def test_a_batch_equals_its_prompts_one_by_one(gpt, name, threshold):
    """With exits that some sequences do not use: what they say must not count for those that do."""
    exits = {1: threshold, 3: threshold, 4: threshold, 6: threshold}
    together, _ = decode(gpt, PROMPTS, 20, exits, confidence=name)
    used = set()
    for prompt, result in zip(PROMPTS, together, strict=True):
        (alone,), _ = decode(gpt, [prompt], 20, exits, confidence=name)
        assert alone[:2] == result[:2] and alone[2] == pytest.approx(result[2], rel=1e-9)
        used |= set(result[1])
    assert len(used) > (1 if name == "patience" else 2), used
    with torch.inference_mode():
        decoder, single = (make_decoder(gpt, exits, n, 64, confidence=name) for n in (2, 1))
        tokens = decoder.prefill(PROMPTS[:2]).greedy_tokens()
        alone = single.prefill(PROMPTS[:1]).greedy_tokens()
        some, others = [1.0, threshold, 1.0, threshold], [threshold] * 4
        for _ in range(20):
            step, expected = decoder.step(tokens, [some, others]), single.step(alone, [some])
            assert step.exit_layers[0] == expected.exit_layers[0]
            tokens, alone = step.greedy_tokens(), expected.greedy_tokens()
            assert tokens[0] == alone[0]


def test_patience_leaves_where_exits_in_a_row_agree(gpt):
    """Against the exits' own predictions for the whole text."""
    exits = {1: 0.9, 3: 0.9, 4: 0.9, 6: 0.9}
    (result,), _ = decode(gpt, PROMPTS[:1], 24, exits, confidence="patience")
    text = [*PROMPTS[0], *result[0]]
    with torch.no_grad():
        states = gpt.forward_states(torch.tensor([text]), torch.arange(len(text))[None], None)
        said = {}
        for n in exits:
            head = gpt.exits[str(n)]
            logits = head.projection.local_logits(head(states.exits[n]), gpt.output_weight())[:, 0]
            said[n] = head.projection.tokens_of(logits[:, : head.projection.num_kept].argmax(-1)).tolist()
    left = 0
    for position, layer in enumerate(result[1][1:], start=len(PROMPTS[0])):
        pairs = [(b, said[a][position] == said[b][position]) for a, b in ((1, 3), (3, 4), (4, 6))]
        expected = next((b for b, agree in pairs if agree), 8)
        assert layer == expected
        left += layer < 8
    assert 0 < left < 23


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize(
    "logits", [[math.nan] * 4, [math.nan, 1.0, 2.0, 3.0], [math.inf, 0.0, 0.0, 0.0]], ids=str
)
def test_no_rule_is_sure_of_what_is_no_number(name, logits):
    """Some do not look at logits, and without any the entropy would be 0."""
    from nemo_ee.decoding.confidence_rules import CONFIDENCE_RULES

    more = dict(previous_hidden=torch.ones(2, 4), agreeing=torch.tensor([3, 3]))
    given = evidence(torch.tensor([logits, [9.0, 0.0, 0.0, 0.0]]), **more)
    rule = CONFIDENCE_RULES[name]
    bad, good = rule.sureness(given).tolist()
    assert math.isnan(bad) and good == rule.confidence(given)[1].item()
