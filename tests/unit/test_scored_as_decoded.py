# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Text is scored by the heads that decoding asks: the same tokens leave, with thresholds as near as numbers allow.

Suffixes: B texts, S tokens of each.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from nemo_ee.calibration.documents import Documents
from nemo_ee.calibration.scoring import score_documents
from nemo_ee.calibration.threshold_choice import Requirement, estimate
from nemo_ee.decoding.cpu.cpu_kernels import SWITCH
from nemo_ee.decoding.decoder import EarlyExitDecoder
from nemo_ee.decoding.decoding_model import asked_heads
from nemo_ee.decoding.leaving import NEVER
from nemo_ee.evaluation.scored_model import score_with
from nemo_ee.evaluation.teacher_forced import score_text
from nemo_ee.generation.generating import generating
from tests.support.tiny_gpt import HEADS, tiny_model, tiny_model_config
from tests.unit.test_exit_policy import made_up

LAYERS, FINAL, TEXTS, LENGTH = (2, 4, 6), 8, 3, 14
NEAR = {torch.float64: 1e-9, torch.float32: 3e-4}
"""A threshold this much beside a confidence, as a share of it, is met or missed: cached decoding rounds otherwise."""


def made(head, dtype):
    tied = HEADS[head]["projection"] == "tied"
    config = tiny_model_config(head=HEADS[head], share_embeddings_and_output_weights=tied)
    return tiny_model(config, dtype=dtype)


@pytest.fixture(
    scope="module", params=[(head, torch.float64) for head in HEADS] + [("MLP, untied", torch.float32)]
)
def model(request):
    model = made(*request.param)
    model.prepare_decoding()
    return model


@pytest.fixture(scope="module")
def ids():
    return torch.randint(6, 200, (TEXTS, LENGTH), generator=torch.Generator().manual_seed(2))


def decoded(model, ids, thresholds):
    """What decoding says behind each token of texts but the first: exits' layers and tokens, [B, S - 1] each.

    Args:
        thresholds: [exits][B, S], behind each token.
    """
    layers, tokens = [], []
    with generating(model):
        decoder = EarlyExitDecoder(model.decoding_model(), list(LAYERS), len(ids), LENGTH)
        decoder.prefill([[first] for first in ids[:, 0].tolist()])
        for at in range(1, ids.shape[1]):
            rows = torch.stack([each[:, at] for each in thresholds], dim=1).tolist()
            step = decoder.step(ids[:, at].tolist(), rows, greedy=[True] * len(ids))
            layers.append(step.exit_layers)
            tokens.append(step.most_probable())
    return torch.tensor(layers).T, torch.tensor(tokens).T


@pytest.mark.parametrize("together", [True, False], ids=["together", "alone"])
def test_a_threshold_just_below_lets_a_token_go_and_one_just_above_does_not(model, ids, together):
    texts = ids if together else ids[:1]
    scores = score_with(model)(texts, torch.zeros_like(texts))
    near = NEAR[scores.exits[2].confidences.dtype]
    for k, layer in enumerate(LAYERS):
        for side in (-near, near):
            exit_ = scores.exits[layer]
            thresholds = [torch.full(texts.shape, NEVER, dtype=torch.float64) for _ in LAYERS]
            thresholds[k] = exit_.confidences.double() * (1 + side)
            layers, tokens = decoded(model, texts, thresholds)
            said, left = (exit_.tokens, layer) if side < 0 else (scores.final.tokens, FINAL)
            assert (layers == left).all(), "each at its own threshold"
            assert torch.equal(tokens, said[:, 1:])


def test_full_heads_would_decide_otherwise(model, ids):
    """How far that is from what decoding asks: far more than it is near."""
    mine = score_with(model)(ids, torch.zeros_like(ids))
    with generating(model):
        full = score_text(model.gpt, ids, torch.zeros_like(ids))
    assert torch.equal(mine.final.tokens, full.final.tokens)
    for layer in LAYERS:
        one, other = mine.exits[layer].confidences, full.exits[layer].confidences
        apart = ((one - other) / other).abs()
        assert apart.max() > 10 * NEAR[one.dtype] and apart.max() < 0.5


@pytest.mark.parametrize("target", [0.2, 0.5])
def test_calibrated_thresholds_let_the_tokens_go_that_calibration_counted(model, target):
    texts = torch.randint(6, 200, (12, LENGTH), generator=torch.Generator().manual_seed(3))
    counted = np.arange(LENGTH - 1) > 0  # a prompt's first token never leaves
    documents = Documents(tuple(texts.numpy()), len(texts), (counted,) * len(texts))
    scores = score_documents(score_with(model), documents, LAYERS, FINAL, 5)
    choice = estimate(
        scores,
        Requirement(target, 0.05, LENGTH),
        12,
        replace(made_up(exits=LAYERS, head=0.01), num_layers=FINAL),
    )
    thresholds, outcome = choice.chosen.planned.thresholds, choice.chosen.outcome
    layers, tokens = decoded(
        model, texts[:, :-1], [torch.full((len(texts), LENGTH - 1), value) for value in thresholds]
    )
    expected = np.array([*LAYERS, FINAL])[outcome.exits].reshape(len(texts), -1)
    assert layers.tolist() == expected.tolist() and len(set(layers.flatten().tolist())) > 1
    final = score_with(model)(texts[:, :-1], texts[:, 1:]).final.tokens[:, 1:]
    assert (tokens == final).double().mean().item() == pytest.approx(
        outcome.agreement
    ) and outcome.agreement >= target


def test_without_our_kernels_the_modules_say_it(model, monkeypatch):
    monkeypatch.setenv(SWITCH, "0")
    assert asked_heads(model.gpt) == {}
