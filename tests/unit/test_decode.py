# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Catch-up decoding equals an uncached forward, token for token, in float64."""

from collections import Counter

import pytest
import torch

from nemo_ee.decoding.cpu.cpu_kernels import SWITCH
from tests.support.tiny_gpt import GPT3, HEADS, tiny_model, tiny_model_config
from tests.support.uncached import generate_uncached

PROMPTS = [[7, 8, 9, 20, 33], [41], [100, 7, 55, 56, 57, 58, 59, 60, 12, 13, 90, 3]]
STEPS = 36


def make_decoder(gpt, exits, rows, max_length, **options):
    """A decoder that cuts at the exits that may be taken."""
    from nemo_ee.decoding.decoder import EarlyExitDecoder
    from nemo_ee.decoding.decoding_model import DecodingModel

    used = [n for n, threshold in sorted(exits.items()) if threshold < 1.0]
    return EarlyExitDecoder(DecodingModel(gpt), used, rows, max_length, **options)


def decode(gpt, prompts, steps, exits, max_pending=None, **options):
    """Greedy tokens, exit layers and confidences of a batch, by the decoder."""
    with torch.inference_mode():
        decoder = make_decoder(gpt, exits, len(prompts), max(map(len, prompts)) + steps, **options)
        step, out = decoder.prefill(prompts), []
        thresholds = [[exits[point.layer] for point in decoder.exits]] * len(prompts)
        for _ in range(steps):
            tokens = step.greedy_tokens()
            out.append((tokens.tolist(), step.exit_layers, step.confidences))
            step = decoder.step(tokens, thresholds, max_pending=[max_pending] * len(prompts))
    return [tuple([part[k][row] for part in out] for k in range(3)) for row in range(len(prompts))], decoder


def expect_equal(result, reference):
    tokens, exit_layers, confidences = result
    assert tokens == reference.tokens
    assert exit_layers == reference.exit_layers
    assert confidences == pytest.approx(reference.confidences, rel=1e-9)


@pytest.fixture(autouse=True, params=["1", "0"], ids=["our kernels", "torch's"])
def kernels(request, monkeypatch):
    monkeypatch.setenv(SWITCH, request.param)


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
    exits, steps = {1: 0.7, 4: 0.5}, 20
    expected = [generate_uncached(one, prompt, steps, exits).tokens for prompt in PROMPTS]
    with torch.inference_mode():
        decoder = make_decoder(one, exits, 3, 64)
        live, texts = [0, 1, 2], [[], [], []]
        step = decoder.prefill(PROMPTS)
        for n in range(steps):
            tokens = step.greedy_tokens()
            for sequence, token in zip(live, tokens.tolist(), strict=True):
                texts[sequence].append(token)
            if n in (6, 12):
                order = decoder.drop([0])
                live, tokens = [live[row] for row in order], tokens[order]
            step = decoder.step(tokens, [[0.7, 0.5]] * len(live))
    assert texts == [expected[0][:7], expected[1], expected[2][:13]] and live == [1]


def test_sequences_that_join_later_are_not_disturbed_and_do_not_disturb(one):
    exits, steps = {1: 0.7, 4: 0.5}, 12
    expected = [generate_uncached(one, prompt, steps, exits).tokens for prompt in PROMPTS]
    texts = [[], [], []]
    with torch.inference_mode():
        decoder = make_decoder(one, exits, 3, 64)
        tokens = decoder.prefill(PROMPTS[:1]).greedy_tokens()
        for n in range(steps):
            for text, token in zip(texts, tokens.tolist(), strict=False):
                text.append(token)
            tokens = decoder.step(tokens, [[0.7, 0.5]] * decoder.size).greedy_tokens()
            if n == 4:
                tokens = torch.cat([tokens, decoder.prefill(PROMPTS[1:]).greedy_tokens()])
    assert texts[0] == expected[0]
    assert texts[1:] == [tokens[: steps - 5] for tokens in expected[1:]]


def test_tokens_that_may_not_exit_go_through_all_layers(one):
    with torch.inference_mode():
        decoder = make_decoder(one, {1: 0.0}, 2, 64)
        decoder.prefill([[5, 6], [7, 8]])
        step = decoder.step(torch.tensor([9, 10]), [[1.0], [0.0]])
    assert step.exit_layers == [8, 1]
    assert [decoder.pending(0, b) for b in range(2)] == [0, 1]


@pytest.mark.parametrize("max_pending", [None, 2])
def test_recomputation_gives_the_same_and_runs_more_layers(one, max_pending):
    exits = {1: 0.6, 4: 0.5}
    caught_up, lean = decode(one, PROMPTS, 24, exits, max_pending)
    recomputed, busy = decode(one, PROMPTS, 24, exits, max_pending, kv_policy="recompute")
    for mine, other in zip(caught_up, recomputed, strict=True):
        assert mine[:2] == other[:2] and mine[2] == pytest.approx(other[2], rel=1e-9)
    assert all(more > less for more, less in zip(busy.layers_run, lean.layers_run, strict=True))


def test_copied_states_are_those_of_an_uncached_forward_with_the_exits_state_in_deeper_layers(one):
    exits, steps = {3: 0.6}, 24
    (result,), decoder = decode(one, PROMPTS[:1], steps, exits, kv_policy="state_copy")
    assert set(result[1]) == {3, 8} and decoder.pending(0, 0) == 0
    (together, *_), _ = decode(one, PROMPTS, steps, exits, kv_policy="state_copy")
    assert result[:2] == together[:2]
    assert result[0] != generate_uncached(one, PROMPTS[0], steps, exits).tokens, "it approximates"
    assert tuple(result[:2]) == generate_with_copied_states(one, PROMPTS[0], steps, 3, 0.6)


def generate_with_copied_states(gpt, prompt, steps, layer, threshold):
    """Tokens and exit layers; every text is run whole, tokens that left keeping their state above `layer`."""
    text, layers, left = list(prompt), [], set()

    def keep_states(_module, args, kwargs, output):
        x = kwargs["hidden_states"]
        out = output[0].clone()
        for position in left:
            out[position] = x[position]
        return (out, *output[1:])

    hooks = [
        block.register_forward_hook(keep_states, with_kwargs=True)
        for block in gpt.decoder.layers
        if block.layer_number > layer
    ]
    with torch.no_grad():
        for step in range(steps):
            states = gpt.forward_states(torch.tensor([text]), torch.arange(len(text))[None], None)
            head = gpt.exits[str(layer)]
            state = head(states.exits[layer], None, states.rotary_pos_emb)[-1]
            sure, row = head.projection.local_logits(state, gpt.output_weight())[0].softmax(-1).max(-1)
            if step and sure > threshold:
                left.add(len(text) - 1)
                token, exit_layer = head.projection.tokens_of(row).item(), layer
            else:
                logits = states.output[-1, 0] @ gpt.output_weight().T
                token, exit_layer = logits[: gpt.true_vocab_size].argmax().item(), 8
            text.append(token)
            layers.append(exit_layer)
    for hook in hooks:
        hook.remove()
    return text[len(prompt) :], layers


@pytest.mark.parametrize(
    "changes",
    [
        GPT3,
        dict(rotary_percentage=0.5, num_query_groups=8),
        dict(rotary_interleaved=True, num_query_groups=1, share_embeddings_and_output_weights=True),
        dict(position_embedding_type="none", seq_len_interpolation_factor=None),
        dict(seq_len_interpolation_factor=2.0, qk_layernorm=True),
        dict(apply_embedding_scaling=True, activation="geglu"),
    ],
    ids=[
        *("GPT-3", "partial rotary, MHA", "interleaved, MQA, tied", "no positions", "interpolated, qk norm"),
        "Gemma's scaled embeddings",
    ],
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


def test_runs_are_neighbours_with_as_many_tokens():
    """And of lengths that differ little, as all are padded to the longest; prompts run with prompts."""
    from nemo_ee.decoding.layers.packed_tokens import PADDING, Run

    def runs(rows, starts, counts):
        return [(run.row, len(run.starts), run.count, run.length) for run in Run.of(rows, starts, counts)]

    assert runs([0, 1, 3, 4], [9, 7, 5, 6], [1, 1, 1, 1]) == [(0, 2, 1, 10), (3, 2, 1, 7)]
    assert runs([0, 1, 2], [9, 7, 5], [1, 2, 2]) == [(0, 1, 1, 10), (1, 2, 2, 9)]
    assert runs([1, 2, 3], [0, 0, 4], [3, 3, 3]) == [(1, 2, 3, 3), (3, 1, 3, 7)]
    assert runs([0, 1], [0, 2 * PADDING], [1, 1]) == [(0, 2, 1, 2 * PADDING + 1)]
    assert runs([0, 1], [0, 2 * PADDING + 1], [1, 1]) == [(0, 1, 1, 1), (1, 1, 1, 2 * PADDING + 2)]
