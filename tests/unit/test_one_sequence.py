# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Steps of one sequence without torch are the general ones, bit for bit, with next to no operation of torch's."""

import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_ee.decoding.cpu.cpu_kernels import KERNEL_TOKENS
from nemo_ee.decoding.cpu.one_sequence import OneSequence
from tests.support.captured import expect_same_caches
from tests.support.tiny_gpt import GPT3, HEADS, tiny_model, tiny_model_config

EXITS = [2, 4, 6]
KINDS = {
    "as they are": (torch.float64, {}),
    "float32": (None, {}),
    "bf16": (None, dict(weights="bf16")),
    "prepared": (None, dict(eight_bit_heads=True, output_layer="exact8")),
    "int8": (None, dict(weights="int8")),
}


class Operations(TorchDispatchMode):
    """Counts torch's."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def model_of(head, kind, **overrides):
    from nemo_ee.decoding.decoding_model import DecodingModel

    dtype, options = KINDS[kind]
    config = tiny_model_config(EXITS, HEADS[head], share_embeddings_and_output_weights=False, **overrides)
    with torch.inference_mode():
        return DecodingModel(tiny_model(config, dtype=dtype).gpt, **options)


def walked(model, exits, seed, steps=50, rule="max_probability"):
    """Greedy steps beside a waiting neighbour, with thresholds, limits, waiting, flushes and answers taken back that a
    seed draws: what each said, and the decoder."""
    from nemo_ee.decoding.decoder import EarlyExitDecoder

    draw, out = random.Random(seed), []
    with torch.inference_mode():
        decoder = EarlyExitDecoder(model, exits, 2, 100, confidence=rule)
        token = decoder.prefill([[5, 6], [7, 8, 9]]).most_probable()[1]
        for _ in range(steps):
            thresholds = [draw.choice([0.0, 0.2, 0.4, 0.7, 1.0]) for _ in exits]
            limit, hold = draw.choice([None, None, 0, 3]), draw.choice([None] * 4 + [0, len(exits) - 1])
            greedy = [draw.random() < 0.7]
            step = decoder.step([token], [thresholds], [1], [limit], [hold], greedy)
            if step.answered:
                token = step.most_probable()[0]
                logits = step.vocabulary_shard(model.gpt.vocab_size) if draw.random() < 0.3 else None
                out.append((token, step.exit_layers, step.confidences, logits))
            else:
                prediction, counts = decoder.flush([1], greedy[0])
                token = int(prediction.tokens[-1])
                out.append((token, counts, prediction.confidence.tolist(), None))
            if draw.random() < 0.1:
                decoder.roll_back(1, decoder.lengths[1] - 1)
    return out, decoder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", [name for name in HEADS if "block" not in name])
def test_steps_are_the_general_ones(head, kind, monkeypatch):
    model = model_of(head, kind)
    for seed, exits in enumerate(([2, 4, 6], [4], [2, 6])):
        found, decoder = walked(model, exits, seed)
        assert decoder._alone is not None
        with monkeypatch.context() as patch:
            patch.setattr(OneSequence, "made", lambda *_: None)
            expected, other = walked(model, exits, seed)
        assert other._alone is None
        for mine, theirs in zip(found, expected, strict=True):
            assert mine[:3] == theirs[:3]
            assert (mine[3] is None) == (theirs[3] is None) and (mine[3] is None or mine[3].equal(theirs[3]))
        expect_same_caches(decoder, other)
        assert (decoder.filled, decoder.layers_run) == (other.filled, other.layers_run)
        assert decoder.spent == pytest.approx(other.spent, rel=1e-12) and decoder.spent > 0
        assert len({layer for _, (layer, *_), *_ in found}) > 1


def test_many_that_wait_go_the_general_way(monkeypatch):
    model, taken = model_of("norm, tied", "as they are"), []
    step = OneSequence.step
    monkeypatch.setattr(
        OneSequence, "step", lambda *given: (taken.append(given[1].lengths[0]), step(*given))[1]
    )
    from nemo_ee.decoding.decoder import EarlyExitDecoder

    with torch.inference_mode():
        decoder = EarlyExitDecoder(model, EXITS, 1, 100)
        decoder.prefill([[5]])
        for n in range(KERNEL_TOKENS + 5):
            decoder.step([n + 3], [[0.0, 1.0, 1.0]])
        assert taken == list(range(1, KERNEL_TOKENS + 1))
        decoder.step([3], [[1.0, 1.0, 1.0]])
        decoder.step([3], [[0.0, 1.0, 1.0]])
    assert len(taken) == KERNEL_TOKENS + 1


def test_a_token_takes_next_to_no_operation_of_torch(monkeypatch):
    from nemo_ee.decoding.session import DecodingSession
    from tests.unit.test_session import sequence

    model, counts = model_of("linear, shortlist", "prepared"), []
    for general in (False, True):
        if general:
            monkeypatch.setattr(OneSequence, "made", lambda *_: None)
        with torch.inference_mode(), DecodingSession(model, EXITS, 1, 60) as session:
            session.add([sequence([5, 6, 7], {2: 0.999, 4: 0.5, 6: 0.999}, limit=20)])
            session.step()
            with Operations() as operations:
                for _ in range(10):
                    session.step()
        counts.append(operations.count / 10)
    assert counts[0] <= 3 < 20 < counts[1]


@pytest.mark.parametrize(
    "head, overrides, rule, policy",
    [
        ("block, shortlist", {}, "max_probability", "catch_up"),
        ("norm, tied", GPT3, "max_probability", "catch_up"),
        ("norm, tied", {}, "margin", "catch_up"),
        ("norm, tied", {}, "max_probability", "recompute"),
        ("norm, tied", {}, "max_probability", "state_copy"),
    ],
    ids=["a block", "learned positions", "another rule", "recomputed", "copied states"],
)
def test_what_goes_the_general_way(head, overrides, rule, policy):
    from nemo_ee.decoding.decoder import EarlyExitDecoder

    with torch.inference_mode():
        decoder = EarlyExitDecoder(model_of(head, "float32", **overrides), EXITS, 1, 20, policy, rule)
    assert decoder._alone is None
