# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Captured passes: decoding with them equals decoding without, in float64.

On a CPU a tape stands for CUDA graphs (`tests.support.tape`): it repeats recorded operations on the tensors of
the recording, and refuses what a graph cannot record.
"""

from types import SimpleNamespace

import pytest
import torch

from nemo_ee.megatron.cpu_kernels import SWITCH
from tests.support.tape import Tape, TapeCapture
from tests.support.tiny_gpt import GPT3, HEADS, tiny_model, tiny_model_config

PROMPTS = [[7, 8, 9, 20, 33], [41], [100, 7, 55, 56, 57, 58, 59, 60, 12, 13, 90, 3], [5, 6], [199, 3, 3]]
EXITS = {2: 0.7, 4: 0.5, 6: 0.6}
STEPS = 36


@pytest.fixture
def capturing(monkeypatch):
    """Makes decoders capture with what they are given, early and with few keys."""

    def use(capture, eager_passes=1, fewest_keys=16):
        from nemo_ee.inference import decoder, segment_graphs

        monkeypatch.setattr(decoder, "capture_for", lambda model: capture)
        monkeypatch.setattr(segment_graphs, "EAGER_PASSES", eager_passes)
        monkeypatch.setattr(segment_graphs, "FEWEST_KEYS", fewest_keys)
        return capture

    return use


@pytest.fixture
def warnings_about_graphs(caplog):
    """Gives the messages so far."""
    from nemo.utils import logging

    logging.once_logged.clear()
    logging._logger.addHandler(caplog.handler)
    yield lambda: [r.getMessage() for r in caplog.records if "CUDA graphs" in r.getMessage()]
    logging._logger.removeHandler(caplog.handler)


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


def make_decoder(gpt, rows, max_length, exits=EXITS, **options):
    from nemo_ee.inference.decoder import EarlyExitDecoder
    from nemo_ee.megatron.decoding_model import DecodingModel

    return EarlyExitDecoder(DecodingModel(gpt), list(exits), rows, max_length, **options)


def decode(gpt, prompts, steps=STEPS, exits=EXITS, **options):
    """Greedy: [steps] of tokens, exit layers and confidences; and the decoder."""
    with torch.inference_mode():
        decoder = make_decoder(gpt, len(prompts), max(map(len, prompts)) + steps, exits, **options)
        step, out = decoder.prefill(prompts), []
        for _ in range(steps):
            tokens = step.greedy_tokens()
            out.append((tokens.tolist(), step.exit_layers, step.confidences))
            step = decoder.step(tokens, [list(exits.values())] * len(prompts))
    return out, decoder


def expect_same(found, expected, tolerance=1e-12):
    for mine, other in zip(found, expected, strict=True):
        assert mine[:2] == other[:2]
        assert mine[2] == pytest.approx(other[2], rel=tolerance)


def expect_same_caches(found, expected):
    """All keys, values and hidden states that decoders have filled."""
    assert (found.filled, found.layers_run) == (expected.filled, expected.layers_run)
    for k, (mine, other) in enumerate(zip(found.segments, expected.segments, strict=True)):
        for row, length in enumerate(expected.filled[k]):
            for layer, reference in zip(mine, other, strict=True):
                same = layer.cache[:, row, :, :length], reference.cache[:, row, :, :length]
                torch.testing.assert_close(*same, rtol=1e-11, atol=1e-11)
    for k, (mine, other) in enumerate(zip(found.exits, expected.exits, strict=True)):
        for row, length in enumerate(expected.filled[k]):
            same = mine.hidden[row, :length], other.hidden[row, :length]
            torch.testing.assert_close(*same, rtol=1e-11, atol=1e-11)


def test_a_batch_decodes_alike_with_captured_passes(gpt, capturing):
    """Three sequences: passes of 1, 2 and 3 (padded or not), of all rows or of some, of 16 to 64 keys."""
    expected, plain = decode(gpt, PROMPTS[:3])
    assert len({tuple(layers) for _, layers, _ in expected}) > 3, "sequences part and meet again"
    tape = capturing(TapeCapture())
    found, decoder = decode(gpt, PROMPTS[:3])
    expect_same(found, expected)
    expect_same_caches(decoder, plain)
    assert {len(each.outputs[0]) for each in tape.passes} == {1, 2, 3}
    assert 2 * len(tape.passes) < tape.replays
    few = capturing(TapeCapture(), fewest_keys=64)
    decode(gpt, PROMPTS[:3])
    assert len(few.passes) < len(tape.passes), "longer texts look at more keys"


@pytest.mark.parametrize(
    "changes",
    [
        GPT3,
        dict(rotary_percentage=0.5, num_query_groups=8),
        dict(rotary_interleaved=True, num_query_groups=1, qk_layernorm=True),
    ],
    ids=["GPT-3", "partial rotary, MHA", "interleaved, MQA, qk norm"],
)
def test_backbones(changes, capturing):
    gpt = tiny_model(tiny_model_config(exits=[2, 4, 6], **changes), dtype=torch.float64).gpt
    expected, _ = decode(gpt, PROMPTS[:2], 20)
    tape = capturing(TapeCapture())
    expect_same(decode(gpt, PROMPTS[:2], 20)[0], expected)
    assert tape.replays


@pytest.mark.parametrize("options", [dict(kv_policy="recompute"), dict(kv_policy="state_copy")], ids=str)
@pytest.mark.parametrize("confidence", ["max_probability", "similarity"])
def test_other_policies_and_rules(one, capturing, options, confidence):
    options = {**options, "confidence": confidence}
    expected, _ = decode(one, PROMPTS[:3], 20, **options)
    tape = capturing(TapeCapture())
    expect_same(decode(one, PROMPTS[:3], 20, **options)[0], expected)
    assert tape.replays


def session_texts(gpt):
    """Five sequences of different requests in three slots: they come, leave, draw and draft."""
    from nemo_ee.inference.request import GenerationRequest, SamplingOptions
    from nemo_ee.inference.sequence import Sequence
    from nemo_ee.inference.session import DecodingSession
    from nemo_ee.megatron.decoding_model import DecodingModel

    greedy, sampled = SamplingOptions(use_greedy=True), SamplingOptions(use_greedy=False, temperature=0.8)
    kinds = [(greedy, False), (sampled, False), (greedy, True), (greedy, False), (sampled, False)]
    sequences = []
    for i, (prompt, (sampling, lossless)) in enumerate(zip(PROMPTS, kinds, strict=True)):
        limit = 24 - 3 * i
        request = GenerationRequest(max_length=limit, sampling=sampling, exits=EXITS, lossless=lossless)
        sequences.append(Sequence(list(prompt), request, lambda tokens: False, 0, limit, i))
    waiting = list(sequences)
    with torch.inference_mode():
        session = DecodingSession(DecodingModel(gpt), list(EXITS), 3, 64)
        while waiting or session.running:
            batch, waiting = waiting[: session.free], waiting[session.free :]
            if batch:
                session.add(batch)
            session.step()
    return [(s.tokens, s.exit_layers, s.confidences) for s in sequences]


def test_sequences_that_come_and_go_decode_alike(one, capturing):
    expected = session_texts(one)
    tape = capturing(TapeCapture())
    expect_same(session_texts(one), expected)
    assert tape.replays > 20


@pytest.mark.parametrize("fewest_keys", [16, 64], ids=["some keys", "all keys"])
def test_padding_changes_no_row_and_spreads_nothing(one, capturing, fewest_keys):
    """Three of five sequences go on: a pass of four, whose padding may be NaN without harm."""
    thresholds, rows = [[1.0] * 3] * 3, [0, 2, 3]
    with torch.inference_mode():
        plain = make_decoder(one, 5, 20)
        tape = capturing(TapeCapture(), eager_passes=0, fewest_keys=fewest_keys)
        decoder = make_decoder(one, 5, 20)
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
    assert tape.replays == 6 * 8 and {len(each.outputs[0]) for each in tape.passes} == {4}


@pytest.mark.parametrize("fail_at", [1, 2, 5])
def test_a_capture_that_fails_is_reported_once_and_everything_runs_eagerly(
    one, capturing, warnings_about_graphs, fail_at
):
    expected, _ = decode(one, PROMPTS[:3])
    tape = capturing(TapeCapture(fail_at))
    expect_same(decode(one, PROMPTS[:3])[0], expected)
    assert len(tape.passes) == fail_at - 1 and (tape.replays > 0) == (fail_at > 1)
    (message,) = warnings_about_graphs()
    assert f"refused capture {fail_at}" in message and "segment" in message or "exit" in message


def test_a_prediction_outlives_the_next_passes(one, capturing):
    with torch.inference_mode():
        tape = capturing(TapeCapture(), eager_passes=0)
        decoder = make_decoder(one, 2, 32, {2: 0.0})
        decoder.prefill(PROMPTS[:2])
        first = decoder.step(torch.tensor([5, 6]), [[0.0]] * 2)
        prediction = first.parts[0].prediction
        kept = prediction.logits.clone(), first.greedy_tokens().clone(), prediction.confidence.clone()
        second = decoder.step(torch.tensor([70, 80]), [[0.0]] * 2)
    assert tape.replays > 4 and not second.parts[0].prediction.logits.equal(kept[0])
    for mine, old in zip(
        (prediction.logits, first.greedy_tokens(), prediction.confidence), kept, strict=True
    ):
        assert mine.equal(old)


def test_a_shape_runs_eagerly_at_first(one, capturing):
    tape = capturing(TapeCapture(), eager_passes=8, fewest_keys=64)
    decode(one, PROMPTS[:1], 8, {2: 1.0})
    assert tape.passes == []
    decode(one, PROMPTS[:1], 9, {2: 1.0})
    assert len(tape.passes) == 4 and tape.replays == 4, "two segments, a block and the final exit"


@pytest.mark.parametrize(
    "wait", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x + torch.tensor([1.0])]
)
def test_the_tape_refuses_what_a_graph_cannot_record(wait):
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"), Tape():
        wait(torch.ones(3))


def test_what_stands_in_the_way_of_graphs_is_said_once(one, monkeypatch, warnings_about_graphs):
    from nemo_ee.inference import segment_graphs
    from nemo_ee.megatron.decoding_model import DecodingModel
    from nemo_ee.megatron.lean_layer import ModuleLayer

    model = DecodingModel(one)
    assert segment_graphs.capture_for(model) is None and warnings_about_graphs() == [], (
        "no GPU, nothing to say"
    )
    monkeypatch.setattr(segment_graphs, "CudaCapture", lambda device: f"graphs on {device}")
    model.device = torch.device("cuda")
    assert segment_graphs.capture_for(model) == "graphs on cuda"
    model.cuda_graphs = False
    assert segment_graphs.capture_for(model) is None and warnings_about_graphs() == []
    model.cuda_graphs, model.gpt = True, SimpleNamespace(config=SimpleNamespace(tensor_model_parallel_size=2))
    for _ in range(2):
        assert segment_graphs.capture_for(model) is None
    (message,) = warnings_about_graphs()
    assert "tensor_model_parallel_size=2" in message and "prepare_decoding(cuda_graphs=False)" in message
    model.gpt, model.layers[3] = one, ModuleLayer(one.decoder.layers[2])
    assert segment_graphs.capture_for(model) is None
    assert "whose weights decoding does not read (FP8" in warnings_about_graphs()[-1]


@pytest.mark.gpu  # CUDA graphs themselves
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-3)], ids=str)
def test_cuda_graphs_on_a_gpu(dtype, tolerance, capturing, warnings_about_graphs):
    from nemo_ee.megatron.cuda_capture import CudaCapture

    head = HEADS["block, MLP, linear, untied"]
    config = tiny_model_config(head=head, share_embeddings_and_output_weights=False)
    gpt = tiny_model(config, dtype=dtype).gpt.cuda()
    capturing(None)
    expected, plain = decode(gpt, PROMPTS[:3])
    capturing(CudaCapture(torch.device("cuda")))
    for _ in range(2):
        found, decoder = decode(gpt, PROMPTS[:3])
        expect_same(found, expected, tolerance)
    if dtype == torch.float64:
        expect_same_caches(decoder, plain)
    assert warnings_about_graphs() == []
