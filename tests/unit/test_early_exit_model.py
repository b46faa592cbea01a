# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What a model keeps of its configuration, and which of its tensors follow it to another device."""

import torch
from omegaconf import OmegaConf

from nemo_ee.modeling.specs import have_transformer_engine
from tests.support.tiny_gpt import HEADS, tiny_model, tiny_model_config


def test_a_checkpoint_keeps_the_settings_that_were_given(tmp_path):
    gpu = torch.cuda.is_available()
    given = dict(transformer_engine=True, use_cpu_initialization=gpu, masked_softmax_fusion=True)
    model = tiny_model(tiny_model_config(**given))
    assert model.cfg.use_cpu_initialization is not gpu and not model.cfg.masked_softmax_fusion
    assert model.cfg.transformer_engine is have_transformer_engine()
    model.to_config_file(str(tmp_path / "c.yaml"))
    saved = OmegaConf.load(tmp_path / "c.yaml")
    assert {key: saved[key] for key in given} == given
    assert "persist_layer_norm" not in saved, "what was not given is not saved"
    assert model.cfg.use_cpu_initialization is not gpu and model.cfg.persist_layer_norm is False


def test_one_number_of_output_rows():
    model = tiny_model(tiny_model_config(head=HEADS["MLP, untied"], override_vocab_size=224))
    assert model.padded_vocab_size == 224 == len(model.gpt.output_weight())
    assert model.gpt.exits["4"].projection.weight.shape[0] == 224


def test_lookups_of_a_shortlist_move_with_it_and_are_not_saved():
    projection = tiny_model(tiny_model_config(head=HEADS["linear, shortlist"])).gpt.exits["4"].projection
    assert {"token_ids", "row_tokens", "token_rows"} <= dict(projection.named_buffers()).keys()
    assert sorted(projection.state_dict()) == ["bucket_bias", "bucket_weight", "token_ids", "weight"]
    assert sorted(projection.sharded_state_dict()) == ["bucket_bias", "bucket_weight", "token_ids", "weight"]
    state = {**projection.state_dict(), "token_ids": torch.arange(3, 123)}
    projection.load_state_dict(state)
    assert projection.tokens_of(torch.tensor([0, 119])).tolist() == [3, 122]
    assert projection.rows_of(torch.tensor([3, 0])).tolist() == [0, projection.num_rows]
