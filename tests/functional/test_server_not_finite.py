# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Weights of a served model that turn into NaN, for every way in which the server decodes."""

import json

import pytest

MODES = {
    "full depth": {"early_exit": False},
    "exits": {"early_exit": {"threshold": 0.3}},
    "lossless": {"early_exit": {"threshold": 0.3, "lossless": True}},
    "sampling": {"temperature": 1.5, "seed": 1},
}


def asked(mode, part, settings):
    """The last event of a stream and /health, before and after some weights of the model turned into NaN."""
    import httpx
    import torch

    from nemo_ee.server.serve import create_service
    from tests.support.drafting import drafting_eagerly
    from tests.support.server import listening, server_config, until
    from tests.support.tiny_gpt import tiny_model, tiny_model_config

    head = dict(block=True, mlp=True, linear=True, projection="untied")
    model = tiny_model(tiny_model_config(head=head, share_embeddings_and_output_weights=False))
    eager = drafting_eagerly()
    eager.start()
    service = create_service(server_config(**settings), model)
    found = []
    try:
        with listening(service) as url, httpx.Client(base_url=url, timeout=60) as http:
            for broken in (False, True):
                if broken:
                    with torch.no_grad():
                        weight = dict(model.gpt.named_parameters())[part]
                        weight[len(weight) // 2] = float("nan")
                body = {
                    "model": "tiny",
                    "prompt": ["w1 w2 w3", "w9"],
                    "temperature": 0,
                    "stream": True,
                    **mode,
                }
                end = http.post("/v1/completions", json=body).text.split("\n\n")[-2].removeprefix("data: ")
                if broken:
                    until(lambda: http.get("/health").status_code == 503)
                found.append((end, http.get("/health").json()["status"]))
    finally:
        service.engine.stop()
        eager.stop()
    return found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("part", ["output_layer.weight", "decoder.layers.5.mlp.linear_fc2.weight"])
def test_health_tells_of_nan(workers, mode, part):
    ((before, after),) = workers(1).run(asked, MODES[mode], part, {})
    assert before == ("[DONE]", "ok")
    end, status = after
    assert json.loads(end)["error"]["code"] in ("not_finite", "engine_failure") and status == "not_finite"


def refused_at_start(weights):
    import torch

    from nemo_ee.errors import GenerationError
    from nemo_ee.server.serve import create_service
    from tests.support.server import server_config
    from tests.support.tiny_gpt import tiny_model, tiny_model_config

    model = tiny_model(tiny_model_config())
    with torch.no_grad():
        model.gpt.output_weight()[3] = float("nan")
    try:
        create_service(server_config(weights=weights), model)
    except GenerationError as error:
        return str(error)
    return None


@pytest.mark.parametrize("weights", ["native", "int8"])
def test_a_model_that_has_only_nan_is_not_served(workers, weights):
    (message,) = workers(1).run(refused_at_start, weights)
    assert message.startswith("the model's predictions are NaN or infinite; its weights are damaged")
