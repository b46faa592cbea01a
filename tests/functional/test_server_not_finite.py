# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Weights of a served model that turn into NaN, for every way in which the server decodes."""

import json

MLP, OUTPUT = "decoder.layers.5.mlp.linear_fc2.weight", "output_layer.weight"
CASES = {
    "full depth": (MLP, {"early_exit": False}),
    "exits": (MLP, {"early_exit": {"threshold": 0.3, "always": True}}),
    "lossless": (MLP, {"early_exit": {"threshold": 0.3, "lossless": True}}),
    "sampling": (OUTPUT, {"temperature": 1.5, "seed": 1}),
}
"""Weights that turn into NaN, and a way to decode that reads them anew each time."""


def asked():
    """For each of `CASES`: the error and /health, before and after some of these weights turned into NaN."""
    import httpx

    from nemo_ee.server.serve import create_service
    from tests.support.drafting import drafting_eagerly
    from tests.support.server import listening, server_config, until
    from tests.support.tiny_gpt import tiny_model, tiny_model_config

    head = dict(block=True, mlp=True, linear=True, projection="untied")
    model = tiny_model(tiny_model_config(head=head, share_embeddings_and_output_weights=False))
    eager = drafting_eagerly()
    eager.start()

    def error_and_health(http, mode):
        body = {"model": "tiny", "prompt": ["w1 w2 w3", "w9"], "temperature": 0, "stream": True, **mode}
        answer = http.post("/v1/completions", json=body)
        events = answer.text.split("\n\n")
        last = answer.text if len(events) == 1 else events[-2].removeprefix("data: ")
        end = {} if last == "[DONE]" else json.loads(last)
        if end:
            until(lambda: http.get("/health").status_code == 503)
        return end.get("error", {}).get("code"), http.get("/health").json()["status"]

    found = {}
    try:
        for name, (part, mode) in CASES.items():
            weight = dict(model.gpt.named_parameters())[part].data
            good = weight.clone()
            service = create_service(server_config(), model)
            with listening(service) as url, httpx.Client(base_url=url, timeout=60) as http:
                before = error_and_health(http, mode)
                weight[len(weight) // 2] = float("nan")
                found[name] = before, error_and_health(http, mode)
            weight.copy_(good)
    finally:
        eager.stop()
    return found


def test_health_tells_of_nan(workers):
    (found,) = workers(1).run(asked)
    assert found.keys() == CASES.keys()
    for case, (before, (error, status)) in found.items():
        assert before == (None, "ok"), case
        assert error in ("not_finite", "engine_failure") and status == "not_finite", case


def refused_at_start(kinds):
    import torch

    from nemo_ee.errors import GenerationError
    from nemo_ee.server.serve import create_service
    from tests.support.server import server_config
    from tests.support.tiny_gpt import tiny_model, tiny_model_config

    model = tiny_model(tiny_model_config())
    with torch.no_grad():
        model.gpt.output_weight()[3] = float("nan")
    messages = []
    for weights in kinds:
        try:
            create_service(server_config(weights=weights), model)
        except GenerationError as error:
            messages.append(str(error))
    return messages


def test_a_model_that_has_only_nan_is_not_served(workers):
    (messages,) = workers(1).run(refused_at_start, ["native", "bf16", "int8"])
    assert len(messages) == 3
    for message in messages:
        assert message.startswith("the model's predictions are NaN or infinite; its weights are damaged")
