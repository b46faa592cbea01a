# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Catch-up decoding equals an uncached forward, token for token, in float64."""

from collections import Counter

import pytest
import torch

from tests.support.tiny_gpt import HEADS, tiny_model, tiny_model_config
from tests.support.uncached import generate_uncached

PROMPTS = [[7, 8, 9, 20, 33], [41], [100, 7, 55, 56, 57, 58, 59, 60, 12, 13, 90, 3]]
STEPS = 36


def decode(gpt, prompts, steps, exits, max_pending=None):
    """Greedy tokens, exit layers and confidences of a batch, by the decoder."""
    from nemo_ee.inference.decoder import EarlyExitDecoder

    with torch.inference_mode():
        decoder = EarlyExitDecoder(gpt, exits, len(prompts), max(map(len, prompts)) + steps, max_pending)
        step, out = decoder.prefill(prompts), []
        for _ in range(steps):
            tokens = step.greedy_tokens()
            out.append((tokens.tolist(), step.exit_layers, step.confidences))
            step = decoder.step(tokens)
    return [tuple([part[k][row] for part in out] for k in range(3)) for row in range(len(prompts))], decoder


def expect_equal(result, reference):
    tokens, exit_layers, confidences = result
    assert tokens == reference.tokens
    assert exit_layers == reference.exit_layers
    assert confidences == pytest.approx(reference.confidences, rel=1e-9)


@pytest.fixture(scope="module", params=HEADS)
def gpt(request):
    config = tiny_model_config(head=HEADS[request.param], share_embeddings_and_output_weights=False)
    return tiny_model(config, dtype=torch.float64).gpt


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.9])
def test_catch_up_equals_uncached(gpt, threshold):
    exits = dict.fromkeys((2, 4, 6), threshold)
    used = Counter()
    for prompt in PROMPTS:
        reference = generate_uncached(gpt, prompt, STEPS, exits)
        (result,), _ = decode(gpt, [prompt], STEPS, exits)
        expect_equal(result, reference)
        used.update(reference.exit_layers[1:])
    assert 3 < used[2] < 3 * (STEPS - 1), "the first exit neither never nor always answers"
    assert len(used) >= (2 if threshold == 0.3 else 3), used
    assert len(set(result[0])) > 3


def test_a_batch_equals_its_prompts_one_by_one(gpt):
    exits = {2: 0.7, 4: 0.5, 6: 0.6}
    together, _ = decode(gpt, PROMPTS, STEPS, exits)
    for prompt, result in zip(PROMPTS, together, strict=True):
        expect_equal(result, generate_uncached(gpt, prompt, STEPS, exits))
    assert len({tuple(result[1]) for result in together}) == 3, "every sequence decides for itself"


@pytest.fixture(scope="module")
def one():
    head = HEADS["block, MLP, linear, untied"]
    return tiny_model(
        tiny_model_config(head=head, exits=[1, 3, 4, 8], share_embeddings_and_output_weights=False),
        dtype=torch.float64,
    ).gpt


@pytest.mark.parametrize(
    "exits", [{3: 0.5}, {1: 0.9, 4: 0.3}, {1: 0.8, 3: 0.6, 4: 0.6, 8: 0.4}, {8: 0.5}, {}]
)
def test_any_subset_of_exits(one, exits):
    together, _ = decode(one, PROMPTS, 24, exits)
    for prompt, result in zip(PROMPTS, together, strict=True):
        expect_equal(result, generate_uncached(one, prompt, 24, exits))


def test_threshold_one_is_full_depth_and_evaluates_no_exit(one):
    full, _ = decode(one, PROMPTS, 24, {})
    off, decoder = decode(one, PROMPTS, 24, {1: 1.0, 3: 1.0, 4: 1.0, 8: 1.0})
    assert full == off and decoder.exits == []
    assert all(set(layers) == {8} for _, layers, _ in full)


def test_threshold_zero_always_takes_the_first_exit(one):
    (result,), decoder = decode(one, PROMPTS[:1], 24, {1: 0.0, 3: 0.0})
    assert result[1] == [8] + [1] * 23
    assert decoder.pending(0, 0) == 24 and decoder.pending(1, 0) == 0


@pytest.mark.parametrize("cap", [0, 1, 3])
def test_a_cap_on_pending_tokens_forces_full_passes(one, cap):
    exits = {1: 0.4, 4: 0.3}
    together, decoder = decode(one, PROMPTS, 24, exits, max_pending=cap)
    for prompt, result in zip(PROMPTS, together, strict=True):
        expect_equal(result, generate_uncached(one, prompt, 24, exits, max_pending=cap))
    assert all(decoder.pending(k, b) <= cap for k in range(2) for b in range(3))
    free, _ = decode(one, PROMPTS, 24, exits)
    assert [layers for _, layers, _ in free] != [layers for _, layers, _ in together]


def test_dropping_sequences_leaves_the_others_unchanged(one):
    from nemo_ee.inference.decoder import EarlyExitDecoder

    exits = {1: 0.7, 4: 0.5}
    expected = [generate_uncached(one, prompt, 20, exits).tokens for prompt in PROMPTS]
    with torch.inference_mode():
        decoder = EarlyExitDecoder(one, exits, 3, 64)
        live, texts, step = [0, 1, 2], [[], [], []], None
        step = decoder.prefill(PROMPTS)
        for n in range(20):
            tokens = step.greedy_tokens()
            for sequence, token in zip(live, tokens.tolist(), strict=True):
                texts[sequence].append(token)
            if n == 6:
                live, tokens = [0, 2], tokens[[0, 2]]
                decoder.keep([0, 2])
            step = decoder.step(tokens)
    assert texts == [expected[0], expected[1][:7], expected[2]]


def test_tokens_that_may_not_exit_go_through_all_layers(one):
    from nemo_ee.inference.decoder import EarlyExitDecoder

    with torch.inference_mode():
        decoder = EarlyExitDecoder(one, {1: 0.0}, 2, 64)
        decoder.prefill([[5, 6], [7, 8]])
        step = decoder.step(torch.tensor([9, 10]), may_exit=[False, True])
    assert step.exit_layers == [8, 1]
    assert [decoder.pending(0, b) for b in range(2)] == [0, 1]


@pytest.mark.parametrize(
    "changes",
    [
        dict(
            position_embedding_type="learned_absolute",
            normalization="layernorm1p",
            bias=True,
            activation="gelu",
        ),
        dict(rotary_percentage=0.5, num_query_groups=8),
        dict(rotary_interleaved=True, num_query_groups=1, share_embeddings_and_output_weights=True),
        dict(position_embedding_type="none", seq_len_interpolation_factor=None),
        dict(seq_len_interpolation_factor=2.0, qk_layernorm=True),
    ],
    ids=["GPT-3", "partial rotary, MHA", "interleaved, MQA, tied", "no positions", "interpolated, qk norm"],
)
def test_backbones(changes):
    head = dict(block=True, mlp=True, linear=True, projection="shortlist", shortlist_size=90)
    config = tiny_model_config(
        head=head, exits=[2, 5], **{"share_embeddings_and_output_weights": False, **changes}
    )
    gpt = tiny_model(config, dtype=torch.float64).gpt
    exits = {2: 0.6, 5: 0.5}
    together, _ = decode(gpt, PROMPTS, 20, exits)
    for prompt, result in zip(PROMPTS, together, strict=True):
        expect_equal(result, generate_uncached(gpt, prompt, 20, exits))
