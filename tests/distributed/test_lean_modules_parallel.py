# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Layers of Transformer Engine's modules decode at tensor-parallel size 2 as in one process."""

import pytest

from tests.support.tiny_gpt import GPT3, HEADS

TEXTS = ["w1 w2 w3", "w9 w10 w11 w12 w13 w14 w15", "w40"]
BACKBONES = {"gated": dict(qk_layernorm=True), "biases": dict(GPT3, qk_layernorm=True)}


def generated(tp, backbone, of_te):
    """Token ids and exits of this rank."""
    import torch

    from nemo_ee.decoding.layers.lean_layer import LeanLayer
    from tests.support.tiny_gpt import tiny_model, tiny_model_config
    from tests.support.transformer_engine import tiny_te_model, transformer_engine

    config = tiny_model_config(head=HEADS["block, MLP, linear, untied"], tp=tp, **BACKBONES[backbone])
    with transformer_engine():
        model = (tiny_te_model if of_te else tiny_model)(config, tp, torch.float64)
        assert all(type(layer) is LeanLayer for layer in model.decoding_model().layers.values())
        texts = TEXTS if torch.distributed.get_rank() == 0 else None
        out = model.generate(
            texts, dict(max_length=12), dict(add_BOS=False), early_exit=dict(threshold=0.5, always=True)
        )
    return out["token_ids"], [row["exit_layers"] for row in out["early_exit"]]


@pytest.mark.parametrize("backbone", [pytest.param("gated", marks=pytest.mark.slow), "biases"])
def test_tensor_parallel_layers_of_transformer_engine(workers, backbone):
    (expected,) = workers(1).run(generated, 1, backbone, False)
    assert workers(2).run(generated, 2, backbone, True) == [expected, expected]
