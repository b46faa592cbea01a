# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What decays in each model that is trained, and by how much after Megatron has made groups of its own."""

import pytest
import torch

from tests.support.tiny_gpt import tiny_model, tiny_model_config


def model(kind: str, **overrides):
    from nemo_ee.models.megatron_gpt_ee_pretraining_model import MegatronGPTEEPretrainingModel
    from nemo_ee.models.megatron_gpt_ee_tuning_model import MegatronGPTEETuningModel

    head = dict(mlp=False, linear=True, projection="tied")
    kinds = dict(tuning=MegatronGPTEETuningModel, pretraining=MegatronGPTEEPretrainingModel)
    config = tiny_model_config([2], head, optim=dict(name="adamw", lr=1e-3, weight_decay=0.1), **overrides)
    return tiny_model(config, kind=kinds[kind])


@pytest.mark.parametrize("kind", ["tuning", "pretraining"])
@pytest.mark.parametrize("vectors", [False, True])
def test_matrices_decay_and_vectors_when_asked(kind, vectors):
    made = model(kind, do_layer_norm_weight_decay=vectors)
    made.setup_optimizer_param_groups()
    decayed, spared = made._optimizer_param_groups
    assert "weight_decay" not in decayed and spared["weight_decay"] == 0.0
    trained = [p for p in made.gpt.parameters() if p.requires_grad]
    assert len(decayed["params"]) + len(spared["params"]) == len(trained)
    assert any(p.dim() == 2 for p in decayed["params"])
    assert (spared["params"] == []) == vectors
    assert all(p.dim() < 2 for p in spared["params"])


@pytest.mark.parametrize("vectors, expected", [(False, {0: 0.1, 1: 0.0}), (True, {0: 0.1, 1: 0.1})])
def test_megatrons_groups_decay_by_the_same_rule(vectors, expected):
    made = model("pretraining", do_layer_norm_weight_decay=vectors)
    made.use_mcore_dist_optim = True
    groups = [{"params": [torch.zeros(2, 2)], "wd_mult": 1.0}, {"params": [torch.zeros(2)], "wd_mult": 0.0}]
    made._optimizer = torch.optim.SGD(groups, lr=0.1)
    made.decay_megatrons_groups()
    assert {n: group["weight_decay"] for n, group in enumerate(made._optimizer.param_groups)} == expected
