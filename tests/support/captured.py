# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Decoding with passes captured on tapes, and what it must equal."""

import random

import pytest
import torch

PROMPTS = [[7, 8, 9, 20, 33], [41], [100, 7, 55, 56, 57, 58, 59, 60, 12, 13, 90, 3], [5, 6], [199, 3, 3]]
EXITS = {2: 0.7, 4: 0.5, 6: 0.6}
STEPS = 36


def model_of(gpt, tape=None, rows=3, max_length=64, attention=None):
    """What decodes; with a tape all passes are captured, as `prepare_decoding` has it on a GPU."""
    from nemo_ee.decoding.cuda.captured_decoding import CapturedDecoding
    from nemo_ee.decoding.decoding_model import DecodingModel

    with torch.inference_mode():
        model = DecodingModel(gpt)
        model.attention = attention or model.attention
        if tape is not None:
            model.captured = CapturedDecoding(model, tape, rows, max_length)
    return model


def make_decoder(model, rows, max_length, exits=EXITS, **options):
    from nemo_ee.decoding.decoder import EarlyExitDecoder

    return EarlyExitDecoder(model, list(exits), rows, max_length, **options)


def decode(model, prompts, steps=STEPS, exits=EXITS, **options):
    """Greedy: [steps] of tokens, exit layers and confidences; and the decoder."""
    with torch.inference_mode():
        decoder = make_decoder(model, len(prompts), max(map(len, prompts)) + steps, exits, **options)
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


def sequences_for(draw, exits, lossless):
    """Two to eight requests that differ in everything that may differ within a session."""
    from nemo_ee.decoding.generated_sequence import GeneratedSequence
    from nemo_ee.decoding.request import GenerationRequest, SamplingOptions

    out = []
    for _ in range(draw.randint(2, 8)):
        sampling = SamplingOptions(use_greedy=draw.random() < 0.5, temperature=0.8)
        request = GenerationRequest(
            max_length=draw.randint(3, 10),
            sampling=sampling,
            exits={n: draw.choice([0.0, 0.2, 0.3, 0.5, 1.0]) for n in exits},
            lossless=lossless and draw.random() < 0.5,
            always=draw.random() < 0.7,
            max_pending=draw.choice([None, None, 0, 2]),
        )
        prompt = [draw.randint(3, 200) for _ in range(draw.randint(1, 10))]
        out.append(
            GeneratedSequence(prompt, request, frozenset(), 0, request.max_length, draw.randint(0, 99))
        )
    return out


def random_session(model, seed):
    """Texts, exit layers and confidences of a session's requests, which come as rows become free."""
    from nemo_ee.decoding.session import DecodingSession

    draw = random.Random(seed)
    exits = sorted(draw.sample([1, 2, 3], draw.randint(1, 3)))
    policy = draw.choice(["catch_up", "catch_up", "catch_up", "recompute", "state_copy"])
    rule = draw.choice(["max_probability", "max_probability", "margin", "patience"])
    waiting = sequences = sequences_for(draw, exits, lossless=policy == "catch_up")
    with (
        torch.inference_mode(),
        DecodingSession(model, exits, draw.randint(1, 4), 20, policy, rule) as session,
    ):
        while waiting or session.running:
            batch, waiting = waiting[: session.free], waiting[session.free :]
            if batch:
                session.add(batch)
            session.step()
    return [(s.tokens, s.exit_layers, s.confidences) for s in sequences]
