# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Sessions of random requests that come and go give each the text that it gets alone: all heads, both code paths."""

import random
from dataclasses import replace

import pytest
import torch

from nemo_ee.decoding.cpu.cpu_kernels import SWITCH
from tests.support.drafting import EagerDrafts
from tests.support.tiny_gpt import HEADS, tiny_model, tiny_model_config

LAYERS, SLOTS, LONGEST = [2, 4, 6], 4, 40


def made(rnd):
    """A random request: prompt, parameters, limit and tokens that end it; and the request whose text it gets."""
    from nemo_ee.decoding.request import GenerationRequest, SamplingOptions

    options = SamplingOptions(True, repetition_penalty=rnd.choice([1.0, 1.0, 1.3, 50.0]))
    if rnd.random() < 0.4:
        shape = dict(top_k=rnd.choice([0, -1, 5]), top_p=rnd.choice([1.0, 0.9]))
        options = replace(options, use_greedy=False, temperature=rnd.choice([0.7, 1.0]), **shape)
    exits = {n: rnd.choice([0.1, 0.3, 0.6]) for n in sorted(rnd.sample(LAYERS, rnd.randrange(0, 4)))}
    lossless = bool(exits) and options.use_greedy and rnd.random() < 0.5
    pending = None if lossless or rnd.random() < 0.6 else rnd.randrange(0, 4)
    limit, least = rnd.randrange(1, 20), rnd.choice([0, 0, 4, 30])
    request = GenerationRequest(limit, least, options, exits, pending, lossless, always=not lossless)
    alone = replace(request, exits={}, lossless=False) if lossless else request
    prompt = [rnd.randrange(6, 200) for _ in range(rnd.randrange(1, 14))]
    ends = tuple(rnd.sample(range(6, 200), 20))
    return lambda kind: sequence(prompt, kind, ends, limit), request, alone


def sequence(prompt, request, ends, limit):
    from nemo_ee.decoding.generated_sequence import GeneratedSequence

    return GeneratedSequence(list(prompt), request, frozenset(ends), ends, limit, seed=7)


def heads_of(head):
    """The section of heads, and whether embeddings are tied."""
    if head in HEADS:
        return HEADS[head], HEADS[head]["projection"] == "tied"
    return [HEADS[kind] for kind in ("block, shortlist", "norm, tied", "MLP, untied")], True


@pytest.mark.parametrize("path", ["kernels", "kernels, 8 bits", "torch", "modules"])
@pytest.mark.parametrize("trials", [1, pytest.param(25, marks=pytest.mark.slow)])
@pytest.mark.parametrize("head", [*HEADS, "a kind for each exit"])
def test_a_text_is_its_own_whoever_comes_and_goes(head, trials, path, monkeypatch):
    from nemo_ee.decoding.assumed_prices import prices_of
    from nemo_ee.decoding.decoding_model import DecodingModel
    from nemo_ee.decoding.session import DecodingSession

    monkeypatch.setenv(SWITCH, "1" if "kernels" in path else "0")
    if path == "modules":
        monkeypatch.setattr("nemo_ee.decoding.layers.lean_layer.is_lean", lambda layer: False)
    heads, tied = heads_of(head)
    config = tiny_model_config(head=heads, share_embeddings_and_output_weights=tied)
    gpt, left, ended = tiny_model(config, dtype=torch.float64).gpt, set(), set()
    with torch.inference_mode():
        in_eight_bits = path == "kernels, 8 bits"
        decoding = DecodingModel(
            gpt, eight_bit_heads=in_eight_bits, output_layer="exact8" if in_eight_bits else "full"
        )
        for trial in range(trials):
            rnd = random.Random(f"{head}/{trial}")
            requests = [made(rnd) for _ in range(7)]
            sequences = [make(request) for make, request, _ in requests]
            policy = EagerDrafts(prices_of(decoding), LAYERS, seed=trial)
            waiting = list(sequences)
            with DecodingSession(decoding, LAYERS, SLOTS, LONGEST, policy=policy) as session:
                while waiting or session.running:
                    count = min(session.free, rnd.randrange(0, 3))
                    if coming := waiting[:count]:
                        session.add(coming)
                        waiting = waiting[count:]
                    if session.running and rnd.random() < 0.04:
                        session.remove(rnd.choice(session.running))
                    if session.running:
                        session.step()
            for (make, request, alone), found in zip(requests, sequences, strict=True):
                expected = make(alone)
                with DecodingSession(decoding, LAYERS, 1, LONGEST) as session:
                    session.add([expected])
                    while session.running:
                        session.step()
                count = len(found.tokens)
                whole = found.finish_reason != "cancelled"
                assert found.tokens == expected.tokens[: None if whole else count], request
                assert not whole or found.finish_reason == expected.finish_reason
                if not request.lossless:
                    assert found.exit_layers == expected.exit_layers[: None if whole else count]
                left |= set(found.exit_layers)
                ended.add(found.finish_reason)
    assert len(left) > 1 and {"length"} < ended
