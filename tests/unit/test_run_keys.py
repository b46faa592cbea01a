# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint's configuration keeps what describes the model and loses what described its run."""

import pytest
from omegaconf import OmegaConf

from nemo_ee.checkpoint import run_keys

SAVED = OmegaConf.create(
    dict(
        num_layers=32,
        encoder_seq_length=4096,
        activation="fast-swiglu",
        rotary_base=5e5,
        a_key_of_next_year="means something",
        mcore_customization_config=dict(window_size=[512, 0], attention_softmax_in_fp32=True),
        hidden_dropout=0.1,
        bias_activation_fusion=False,
        megatron_amp_O2=True,
        context_parallel_size=4,
        fsdp_sharding_strategy="full",
        ub_tp_comm_overlap=True,
        activations_checkpoint_granularity="full",
        restore_from_ckpt="/old",
        optim=dict(name="distributed_fused_adam", overlap_grad_sync=True),
        data=dict(seq_length=4096, train_ds=dict(a=1)),
        micro_batch_size=1,
    )
)


def test_without_layout():
    plain = run_keys.without_layout(SAVED)
    assert plain.num_layers == 32 and plain.a_key_of_next_year == "means something"
    assert plain.optim == SAVED.optim, "NeMo needs the section of a model that only generates, too"
    for key in (
        "megatron_amp_O2",
        "context_parallel_size",
        "fsdp_sharding_strategy",
        "ub_tp_comm_overlap",
        "activations_checkpoint_granularity",
        "restore_from_ckpt",
    ):
        assert key not in plain and key in SAVED


def test_defaults_of_a_yaml_say_nothing_about_the_model():
    run = OmegaConf.create(
        dict(
            num_layers=12,
            encoder_seq_length=512,
            kv_channels=None,
            rotary_base=10000,
            hidden_dropout=0.0,
            bias_activation_fusion=True,
            megatron_amp_O2=False,
            optim=dict(name="adamw"),
            data=dict(seq_length=512),
        )
    )
    config, changed = run_keys.put_over(SAVED, run, ())
    assert (config.num_layers, config.encoder_seq_length, config.rotary_base) == (32, 4096, 5e5)
    assert "kv_channels" not in config and not changed
    assert config.hidden_dropout == 0.0 and config.micro_batch_size == 1
    assert config.optim == dict(name="adamw"), "sections of the run are not mixed with the old run's"
    assert config.data == dict(seq_length=512) and config.megatron_amp_O2 is False
    assert config.bias_activation_fusion is True


@pytest.mark.parametrize("activation", ["gelu", "geglu", "fast-geglu", None])
def test_the_fusion_that_approximates_gelu_belongs_to_the_model(activation):
    saved = OmegaConf.create(dict(activation=activation, bias_activation_fusion=False))
    if activation is None:
        del saved["activation"]
    config, _ = run_keys.put_over(saved, OmegaConf.create(dict(bias_activation_fusion=True)), ())
    assert config.bias_activation_fusion is False


def test_what_is_given_counts_and_is_told():
    run = OmegaConf.create(
        dict(
            num_layers=32,
            rotary_base=1e6,
            encoder_seq_length=2048,
            mcore_customization_config=dict(window_size=None),
        )
    )
    given = {"num_layers", "rotary_base", "mcore_customization_config.window_size"}
    config, changed = run_keys.put_over(SAVED, run, given)
    assert changed == {"rotary_base": 1e6, "mcore_customization_config.window_size": None}
    assert config.rotary_base == 1e6 and config.encoder_seq_length == 4096
    assert config.mcore_customization_config == dict(window_size=None, attention_softmax_in_fp32=True)
    _, changed = run_keys.put_over(SAVED, run, None)
    assert changed.keys() == {"rotary_base", "encoder_seq_length", "mcore_customization_config.window_size"}


def test_the_command_line(monkeypatch):
    assert run_keys.command_line_keys() == frozenset()
    words = [
        "model.num_layers=4",
        "+model.x.y=1",
        "++model.z=[1,2]",
        "~model.w",
        "trainer.devices=2",
        "name=n",
    ]
    hydra = OmegaConf.create(dict(overrides=dict(task=words)))
    monkeypatch.setattr(run_keys.HydraConfig, "initialized", staticmethod(lambda: True))
    monkeypatch.setattr(run_keys.HydraConfig, "get", staticmethod(lambda: hydra))
    assert run_keys.command_line_keys() == {"num_layers", "x.y", "z", "w"}


def test_what_ends_a_text_comes_from_the_checkpoint():
    saved = OmegaConf.create(
        dict(
            num_layers=2, tokenizer=dict(library="huggingface", type="nemo:tokenizer", eos_token_ids=[2, 18])
        )
    )
    run = OmegaConf.create(
        dict(num_layers=2, tokenizer=dict(library="huggingface", type="???", eos_token_ids=None))
    )
    config, _ = run_keys.put_over(saved, run, given=())
    assert config.tokenizer == saved.tokenizer
    config, _ = run_keys.put_over(saved, run, given=["tokenizer.eos_token_ids"])
    assert config.tokenizer.eos_token_ids is None
