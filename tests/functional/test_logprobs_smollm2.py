# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""SmolLM2-135M in float32: log-probabilities of 20 texts, and of what follows them, are Hugging Face's.

Through Python, and through the server as lm-evaluation-harness asks it. 1e-4 nats is what sums of float32 in another
order leave.
"""

import os

import pytest
import torch

from tests.functional.test_convert_llama import SMOLLM2_PROMPTS
from tests.functional.test_generation_smollm2 import OPENINGS, restore, source
from tests.support.logprobs import check_logprobs
from tests.support.published import client

STEPS, TOP = 8, 5
assert source, "a fixture"


def found(source):
    """Per text its token ids, Hugging Face's log-probabilities of them, and what Python and the server say."""
    from transformers import AutoModelForCausalLM

    folder, name = os.path.split(source)
    theirs = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, torch_dtype=torch.float32).eval()
    model = restore(source)
    texts = [opening + prompt for prompt in SMOLLM2_PROMPTS for opening in OPENINGS][:20]
    sampling = dict(add_BOS=False, logprobs=TOP, prompt_logprobs=TOP)
    output = model.generate(texts, dict(max_length=STEPS, min_length=STEPS), sampling)
    results = []
    with client(model, context_length=512) as http:
        for i, ids in enumerate(output["token_ids"]):
            with torch.no_grad():
                rows = theirs(torch.tensor([ids])).logits[0].log_softmax(-1)
            body = {"model": "tiny", "prompt": [ids], "max_tokens": 1, "logprobs": 1, "echo": True}
            answer = http.post("/v1/completions", json={**body, "temperature": 0, "seed": 1234}).json()
            entries = output["prompt_logprobs"][i][1:] + output["logprobs"][i]
            results.append(
                (
                    ids,
                    rows[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0],
                    answer["choices"][0]["logprobs"],
                )
            )
            check_logprobs(entries, rows[:-1], ids[1:], TOP)
    return [(ids, values.tolist(), said) for ids, values, said in results]


@pytest.mark.slow
def test_log_probabilities_of_twenty_texts(source, workers):
    (results,) = workers(1).run(found, str(source), timeout=900)
    assert len(results) == 20
    worst = 0.0
    for ids, values, said in results:
        mine = said["token_logprobs"]
        assert mine[0] is None and len(mine) == len(ids) + 1
        worst = max(worst, *(abs(a - b) for a, b in zip(mine[1:-1], values, strict=True)))
        for value, top in zip(mine[1:], said["top_logprobs"][1:], strict=True):
            assert value <= max(top.values()) and len(top) <= 2
    print(f"furthest from Hugging Face: {worst:.1e} nats")
    assert worst < 1e-4
