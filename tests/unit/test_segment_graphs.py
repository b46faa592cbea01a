# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Captured passes: decoding with them equals decoding without, in float64.

On a CPU a tape stands for CUDA graphs (`tests.support.tape`): it repeats recorded operations on the tensors of
the recording, and refuses what a graph cannot record.
"""

from types import SimpleNamespace

import pytest
import torch

from nemo_ee.decoding.cpu.cpu_kernels import SWITCH
from nemo_ee.decoding.layers import cached_attention
from tests.support.captured import (
    PROMPTS,
    decode,
    expect_same,
    expect_same_caches,
    make_decoder,
    model_of,
    random_session,
)
from tests.support.tape import TapeCapture
from tests.support.tiny_gpt import GPT3, HEADS, tiny_model, tiny_model_config

ASKED = 1 - 1e-12
"""A threshold at which exits are asked, and no token leaves."""


@pytest.fixture(autouse=True)
def few_keys(monkeypatch):
    """Passes look at 16 keys at least, so that tiny texts need several shapes."""
    monkeypatch.setattr(cached_attention, "FEWEST_KEYS", 16)


@pytest.fixture(scope="module", params=HEADS)
def gpt(request):
    config = tiny_model_config(head=HEADS[request.param], share_embeddings_and_output_weights=False)
    return tiny_model(config, dtype=torch.float64).gpt


@pytest.fixture(scope="module")
def one():
    head = HEADS["block, MLP, linear, untied"]
    config = tiny_model_config(head=head, share_embeddings_and_output_weights=False)
    return tiny_model(config, dtype=torch.float64).gpt


@pytest.fixture(autouse=True)
def torchs_operations(monkeypatch):
    """A tape records what torch does; our CPU kernels it would not see."""
    monkeypatch.setenv(SWITCH, "0")


def test_a_batch_decodes_alike_with_captured_passes(gpt):
    """Passes of one token and of several per sequence, of all rows or of some, of 16 to 64 keys; none runs eagerly."""
    expected, plain = decode(model_of(gpt), PROMPTS[:3])
    assert len({tuple(layers) for _, layers, _ in expected}) > 3, "sequences part and meet again"
    tape = TapeCapture()
    found, decoder = decode(model_of(gpt, tape), PROMPTS[:3])
    expect_same(found, expected)
    expect_same_caches(decoder, plain)
    assert decoder.passes.eager == 0 and decoder.passes.replayed == tape.replays > 2 * len(tape.passes)


@pytest.mark.parametrize(
    "changes",
    [
        GPT3,
        dict(rotary_percentage=0.5, num_query_groups=8),
        dict(rotary_interleaved=True, num_query_groups=1, qk_layernorm=True),
    ],
    ids=["GPT-3", "partial rotary, MHA", "interleaved, MQA, qk norm"],
)
def test_backbones(changes):
    gpt = tiny_model(tiny_model_config(exits=[2, 4, 6], **changes), dtype=torch.float64).gpt
    expected, _ = decode(model_of(gpt), PROMPTS[:2], 20)
    found, decoder = decode(model_of(gpt, TapeCapture()), PROMPTS[:2], 20)
    expect_same(found, expected)
    assert decoder.passes.replayed and not decoder.passes.eager


@pytest.mark.parametrize("options", [dict(kv_policy="recompute"), dict(kv_policy="state_copy")], ids=str)
@pytest.mark.parametrize("confidence", ["max_probability", "similarity"])
def test_other_policies_and_rules(one, options, confidence):
    options = {**options, "confidence": confidence}
    expected, plain = decode(model_of(one), PROMPTS[:3], 20, **options)
    found, decoder = decode(model_of(one, TapeCapture()), PROMPTS[:3], 20, **options)
    expect_same(found, expected)
    expect_same_caches(decoder, plain)
    assert decoder.passes.replayed and not decoder.passes.eager


@pytest.fixture(scope="module", params=["block, MLP, linear, untied", "linear, shortlist"])
def small(request):
    changes = dict(
        num_layers=4, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2
    )
    config = tiny_model_config(exits=[1, 2, 3], head=HEADS[request.param], **changes)
    return tiny_model(config, dtype=torch.float64).gpt


@pytest.mark.parametrize("sessions", [22, pytest.param(300, marks=pytest.mark.slow)])
def test_random_requests_decode_alike(small, sessions):
    """At least 100 requests per kind of head, on graphs that are captured once."""
    plain, tape = model_of(small), TapeCapture()
    captured = model_of(small, tape, rows=4, max_length=20)
    requests = early = 0
    for seed in range(sessions):
        expected = random_session(plain, seed)
        expect_same(random_session(captured, seed), expected, 1e-9)
        requests += len(expected)
        early += sum(layer < 4 for _, layers, _ in expected for layer in layers)
    passes = captured.captured.passes
    assert requests >= 100 * sessions // 22 and early > requests
    assert passes.eager == 0 and passes.replayed > 10 * len(tape.passes)


@pytest.mark.parametrize("rows", [1, 16])
def test_exits_cause_next_to_no_eager_passes(small, rows):
    """About half of the tokens leave early, which makes most deep passes ones of several tokens."""
    prompts = [[3 + 7 * i, 5 + i, 11] for i in range(rows)]
    exits = dict.fromkeys([1, 2, 3], 0.8 if small.exits["1"].block is None else 0.95)
    model = model_of(small, TapeCapture(), rows, 60)
    out, decoder = decode(model, prompts, 48, exits)
    early = sum(layer < 4 for _, layers, _ in out for layer in layers) / (48 * rows)
    assert 0.35 < early < 0.75
    several = sum(key[1] > rows for key in decoder.passes._captured if isinstance(key[0], str))
    assert several > 3, "catching up in passes of more tokens than sequences"
    passes = decoder.passes
    assert passes.eager < 0.05 * (passes.eager + passes.replayed)


def test_longer_passes_than_captured_ones_run_eagerly(one, monkeypatch):
    from nemo_ee.decoding.cuda import segment_graphs

    monkeypatch.setattr(segment_graphs, "MOST_TOKENS", 4)
    monkeypatch.setattr(segment_graphs, "TOKENS_PER_ROW", 1)
    exits = {2: 0.0, 4: 1.0, 6: 1.0}
    texts = []
    for tape in (None, TapeCapture()):
        with torch.inference_mode():
            decoder = make_decoder(model_of(one, tape), 1, 32, exits)
            step = decoder.prefill([[5, 6, 7]])
            for _ in range(9):
                step = decoder.step(step.greedy_tokens(), [list(exits.values())])
            last = decoder.step(step.greedy_tokens(), [[ASKED] * 3])
            texts.append(([step.exit_layers, last.exit_layers], last.parts[0].prediction.logits))
    assert texts[0][0] == texts[1][0] == [[2], [8]]
    torch.testing.assert_close(texts[1][1], texts[0][1], rtol=1e-12, atol=1e-12)
    assert decoder.passes.most_tokens == 4 and decoder.passes.eager == 3 + 2, "three segments and two blocks"


@pytest.mark.parametrize("fewest_keys", [16, 64], ids=["some keys", "all keys"])
def test_padding_changes_no_row_and_spreads_nothing(one, monkeypatch, fewest_keys):
    """Three of five sequences go on: a pass of four, whose padding may be NaN without harm."""
    monkeypatch.setattr(cached_attention, "FEWEST_KEYS", fewest_keys)
    thresholds, rows = [[ASKED] * 3] * 3, [0, 2, 3]
    with torch.inference_mode():
        plain, tape = make_decoder(model_of(one), 5, 20), TapeCapture()
        decoder = make_decoder(model_of(one, tape, 5, 20), 5, 20)
        for each in (plain, decoder):
            each.prefill(PROMPTS)
        layers = [layer for segment in decoder.segments for layer in segment]
        layers += [layer for point in decoder.exits for layer in point.block]
        for n in range(6):
            before = [layer.cache.clone() for layer in layers]
            steps = [each.step(torch.tensor([n, 20, 30]), thresholds, rows) for each in (plain, decoder)]
            expected, found = (step.parts[0].prediction.logits for step in steps)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
            for layer, old in zip(layers, before, strict=True):
                for row in rows:
                    at = decoder.lengths[row] - 1
                    old[:, row, :, at] = layer.cache[:, row, :, at]
                assert layer.cache[..., :-1, :].equal(old[..., :-1, :]), "all but the spare position"
                layer.cache[..., -1, :] = float("nan")
            for inputs in decoder.passes._inputs.values():
                for states in inputs._states.values():
                    states.fill_(float("nan"))
    assert tape.replays == decoder.passes.replayed == 6 * (4 + 2 * 3 + 1), (
        "segments, blocks and heads, the final exit"
    )
    assert set(decoder.passes._inputs) == {4}


@pytest.mark.parametrize("fail_at", [1, 2, 5])
@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError])
def test_a_capture_that_fails_is_reported_once_and_everything_runs_eagerly(
    one, warnings_about_graphs, fail_at, error
):
    expected, _ = decode(model_of(one), PROMPTS[:3])
    tape = TapeCapture(fail_at, error)
    model = model_of(one, tape)
    for _ in range(2):
        found, decoder = decode(model, PROMPTS[:3])
        expect_same(found, expected)
        decoder.close()
    assert len(tape.passes) == fail_at - 1 and (tape.replays > 0) == (fail_at > 1)
    (message,) = warnings_about_graphs()
    assert f"refused capture {fail_at}" in message and ("layers" in message or "exit" in message)


def test_a_prediction_outlives_the_next_passes(one):
    with torch.inference_mode():
        tape = TapeCapture()
        decoder = make_decoder(model_of(one, tape), 2, 32, {2: 0.0})
        decoder.prefill(PROMPTS[:2])
        first = decoder.step(torch.tensor([5, 6]), [[0.0]] * 2)
        prediction = first.parts[0].prediction
        kept = prediction.logits.clone(), first.greedy_tokens().clone(), prediction.confidence.clone()
        second = decoder.step(torch.tensor([70, 80]), [[0.0]] * 2)
    assert tape.replays == 6 and not second.parts[0].prediction.logits.equal(kept[0])
    for mine, old in zip(
        (prediction.logits, first.greedy_tokens(), prediction.confidence), kept, strict=True
    ):
        assert mine.equal(old)


def test_what_stands_in_the_way_of_graphs_is_said_once(one, monkeypatch, warnings_about_graphs):
    from nemo_ee.decoding.cuda import segment_graphs
    from nemo_ee.decoding.decoding_model import DecodingModel
    from nemo_ee.decoding.layers.lean_layer import ModuleLayer

    model = DecodingModel(one)
    assert segment_graphs.capture_for(model) is None and warnings_about_graphs() == [], (
        "no GPU, nothing to say"
    )
    monkeypatch.setattr(segment_graphs, "CudaCapture", lambda device: f"graphs on {device}")
    model.device = torch.device("cuda")
    assert segment_graphs.capture_for(model) == "graphs on cuda"
    model.gpt = SimpleNamespace(config=SimpleNamespace(tensor_model_parallel_size=2))
    for _ in range(2):
        assert segment_graphs.capture_for(model) is None
    (message,) = warnings_about_graphs()
    assert "tensor_model_parallel_size=2" in message and "prepare_decoding(cuda_graphs=False)" in message
    model.gpt, model.layers[3] = one, ModuleLayer(one.decoder.layers[2])
    assert segment_graphs.capture_for(model) is None
    assert "whose weights decoding does not read (FP8" in warnings_about_graphs()[-1]


@pytest.mark.gpu  # CUDA graphs themselves
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-3)], ids=str)
def test_cuda_graphs_on_a_gpu(dtype, tolerance, warnings_about_graphs):
    from nemo_ee.decoding.cuda.cuda_capture import CudaCapture

    head = HEADS["block, MLP, linear, untied"]
    config = tiny_model_config(head=head, share_embeddings_and_output_weights=False)
    gpt = tiny_model(config, dtype=dtype).gpt.cuda()
    expected, plain = decode(model_of(gpt), PROMPTS[:3])
    model = model_of(gpt, CudaCapture(torch.device("cuda")))
    for _ in range(2):
        found, decoder = decode(model, PROMPTS[:3])
        expect_same(found, expected, tolerance)
        assert decoder.passes.replayed and not decoder.passes.eager
        if dtype == torch.float64:
            expect_same_caches(decoder, plain)
        decoder.close()
    assert warnings_about_graphs() == []
