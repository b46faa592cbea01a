# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Decoding over pipeline stages gives the tokens of one process, whoever decides and whenever it arrives."""

from collections import Counter

import pytest
import torch

from tests.support.logprobs import same_logprobs
from tests.support.tiny_gpt import HEADS

TEXTS = ["w1 w2 w3", "w9 w10 w11 w12 w13 w14 w15", "w40", "w7 w7", "w100 w3 w55 w2"]
EXITS = [1, 4, 6]
"""The first stage's, one on the last layer of a stage, one of the second half."""
WAYS = {
    "mixed": (
        dict(threshold=[0.7, 0.5, 0.6], always=True),
        dict(add_BOS=False, logprobs=3, prompt_logprobs=2),
        dict(max_length=16),
    ),
    "scored alone": (False, dict(add_BOS=False, prompt_logprobs=1), dict(max_length=0)),
    "always the first": (dict(threshold=0.0, always=True), dict(add_BOS=False), dict(max_length=12)),
    "full depth": (False, dict(add_BOS=False), dict(max_length=8)),
    "some exits, margin": (
        dict(threshold=0.3, exits=[4, 6], confidence="margin", always=True),
        dict(add_BOS=False),
        dict(max_length=12),
    ),
    "late end": (dict(threshold=0.5, always=True), dict(add_BOS=False), dict(max_length=16, min_length=9)),
    "sampled": (
        dict(threshold=0.5, always=True),
        dict(add_BOS=False, use_greedy=False, temperature=1.3, top_k=30, repetition_penalty=1.2, logprobs=0),
        dict(max_length=12),
    ),
}


def generate(tp, pp, head):
    """Every way's output on this rank; only the model's first rank has prompts and parameters."""
    from tests.support.tiny_gpt import tiny_model, tiny_model_config

    config = tiny_model_config(
        head=HEADS[head], exits=EXITS, tp=tp, pp=pp, share_embeddings_and_output_weights=False
    )
    model = tiny_model(config, tp * pp, torch.float64)
    first, out = torch.distributed.get_rank() == 0, {}
    for name, (early_exit, sampling, lengths) in WAYS.items():
        generator = torch.Generator().manual_seed(3)
        given = (TEXTS, lengths, sampling) if first else (None, None, None)
        out[name] = model.generate(*given, early_exit=early_exit if first else None, generator=generator)
    ending = out["mixed"]["token_ids"][0][-4]
    word = f"w{ending - 6}"
    for name, end in (("end string", word), ("end string inside a token", word[:-1])):
        options = dict(add_BOS=False, end_strings=[end])
        out[name] = model.generate(TEXTS, dict(max_length=16), options, early_exit=WAYS["mixed"][0])
    return out


def refusals(pp):
    """What this stage is told of parameters that need one stage."""
    from nemo_ee.errors import GenerationError
    from tests.support.tiny_gpt import tiny_model, tiny_model_config

    model, messages = tiny_model(tiny_model_config(exits=EXITS, pp=pp), pp), []
    for early_exit, sampling in (
        (dict(lossless=True), {}),
        (dict(threshold=0.5, max_pending=3), {}),
        (dict(kv_policy="recompute"), {}),
        (dict(confidence="patience", threshold=0.8), {}),
        ({}, dict(all_probs=True)),
        ({}, dict(compute_logprob=True)),
    ):
        with pytest.raises(GenerationError) as caught:
            model.generate(TEXTS, dict(max_length=4), sampling, early_exit=early_exit)
        messages.append(str(caught.value))
    return messages


@pytest.mark.parametrize(
    "tp, pp, head",
    [
        (1, 2, "block, shortlist"),
        (1, 4, "MLP, untied"),
        (2, 2, "linear, shortlist"),
        pytest.param(1, 4, "block, MLP, linear, untied", marks=pytest.mark.slow),
        pytest.param(2, 4, "norm, tied", marks=pytest.mark.slow),
    ],
)
def test_the_tokens_are_those_of_one_process(workers, tp, pp, head):
    (single,) = workers(1).run(generate, 1, 1, head)
    used = Counter(n for row in single["mixed"]["early_exit"] for n in row["exit_layers"])
    assert len(used) >= 3, used
    for name in ("end string", "end string inside a token"):
        assert single[name]["token_ids"] != single["mixed"]["token_ids"], "the end string was met"
    for rank in workers(tp * pp).run(generate, tp, pp, head):
        for name, expected in single.items():
            found = rank[name]
            assert found["token_ids"] == expected["token_ids"], name
            assert found["sentences"] == expected["sentences"]
            same_logprobs(found, expected)
            for mine, theirs in zip(found["early_exit"], expected["early_exit"], strict=True):
                assert mine["exit_layers"] == theirs["exit_layers"], name
                assert mine["layers_run"] >= theirs["layers_run"] > 0, name
            for ids, row in zip(found["token_ids"], found["early_exit"], strict=True):
                fed = len(ids) - bool(row["exit_layers"])
                assert row["layers_run"] == 8 * fed, "every token but the last, through all layers"
                assert mine["confidences"] == pytest.approx(theirs["confidences"], rel=1e-9)


def broken_stages(pp):
    """What this stage is told when each of the stages in turn fails, and the tokens generated after that."""
    from unittest.mock import patch

    from nemo_ee.decoding.pipeline.stage import Stage
    from tests.support.tiny_gpt import tiny_model, tiny_model_config

    model, messages, run = tiny_model(tiny_model_config(exits=EXITS, pp=pp), pp), [], Stage.run
    usual = TEXTS, dict(max_length=12), dict(add_BOS=False)
    for broken in range(pp):
        passes = []

        def failing(stage, tokens, hidden, broken=broken, passes=passes):
            passes.append(tokens)
            if torch.distributed.get_rank() == broken and len(passes) == 3:
                raise ValueError("out of order")
            return run(stage, tokens, hidden)

        with patch.object(Stage, "run", failing), pytest.raises((RuntimeError, ValueError)) as caught:
            model.generate(*usual, early_exit=dict(threshold=0.5))
        messages.append(str(caught.value))
    return messages, model.generate(*usual, early_exit=dict(threshold=0.5))["token_ids"]


def test_a_stage_that_fails_is_told_of_everywhere_and_does_not_end_the_model(workers):
    first, *others = workers(4).run(broken_stages, 4, timeout=120)
    messages, tokens = first
    assert all("out of order" in message for message in messages) and len(messages) == 4
    assert len(tokens) == len(TEXTS) and all(other == first for other in others)


def many_answers():
    """Answers of one stage that the first takes only when all are sent; the number that it finds."""
    from nemo_ee.decoding.pipeline.channel import PipelineGroups, Receiver, Sender
    from tests.support.distributed import initialize_model_parallel

    initialize_model_parallel(pp=2)
    groups, count = PipelineGroups.make(), 100
    if torch.distributed.get_rank() == 1:
        sender = Sender(0, groups.back)
        for n in range(count):
            sender.send([n])
        sender.send(Receiver.LAST)
        sender.flush()
        torch.distributed.barrier()
        return count
    receiver = Receiver([1], groups.back, 0)
    torch.distributed.barrier()
    receiver.join()
    found = []
    while (message := receiver.get_if_any()) is not None:
        found += message.content
    assert found == list(range(count))
    return len(found)


def test_no_stage_waits_until_the_first_takes_its_answers(workers):
    assert workers(2).run(many_answers, timeout=60) == [100, 100]


def test_what_needs_one_stage_is_refused_on_every_stage(workers):
    for messages in workers(2).run(refusals, 2):
        names = ("lossless", "max_pending", "recompute", "patience", "all_probs", "compute_logprob")
        for message, name in zip(messages, names, strict=True):
            assert name in message and "pipeline_model_parallel_size=1" in message
