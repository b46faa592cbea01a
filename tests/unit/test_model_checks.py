# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Layouts and tuning settings that cannot run are refused with key, rule and remedy."""

import pytest
from omegaconf import OmegaConf

from nemo_ee.errors import ConfigError
from nemo_ee.models.checks.model_checks import (
    check_model,
    check_pretraining,
    check_tuning,
    read_early_exit,
)


def config(**changes):
    """A sound model section of 24 layers; dots in keys as ``__``."""
    made = OmegaConf.create(
        dict(
            mcore_gpt=True,
            num_layers=24,
            hidden_size=96,
            ffn_hidden_size=96,
            num_attention_heads=12,
            num_query_groups=4,
            encoder_seq_length=64,
            micro_batch_size=2,
            global_batch_size=8,
            tensor_model_parallel_size=1,
            pipeline_model_parallel_size=1,
            optim=dict(name="adamw"),
            data=dict(seq_length=64),
            early_exit=dict(layers=[6, 12]),
        )
    )
    for key, value in changes.items():
        OmegaConf.update(made, key.replace("__", "."), value, force_add=True)
    return made


def faults_of(check, *args):
    with pytest.raises(ConfigError) as caught:
        check(*args)
    return caught.value.faults


SOUND = {
    "one process": ({}, 1),
    "TP2": (dict(tensor_model_parallel_size=2), 2),
    "TP4": (dict(tensor_model_parallel_size=4), 4),
    "PP3": (dict(pipeline_model_parallel_size=3), 3),
    "DP4": ({}, 4),
    "TP2 x PP2 x DP2": (dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2), 8),
    "uneven first": (dict(pipeline_model_parallel_size=4, num_layers_in_first_pipeline_stage=3), 4),
    "uneven last": (dict(pipeline_model_parallel_size=2, num_layers_in_last_pipeline_stage=5), 2),
    "both": (
        dict(
            pipeline_model_parallel_size=4,
            num_layers_in_first_pipeline_stage=5,
            num_layers_in_last_pipeline_stage=3,
        ),
        4,
    ),
    "both, nothing between": (
        dict(
            pipeline_model_parallel_size=2,
            num_layers_in_first_pipeline_stage=10,
            num_layers_in_last_pipeline_stage=14,
        ),
        2,
    ),
    "SP": (dict(tensor_model_parallel_size=2, sequence_parallel=True), 2),
    "NeMo's plain layers": (dict(name="te_gpt", drop_layers=[], enable_cuda_graph=False), 1),
    "no name": (dict(name=None, mcore_customization_config=None), 1),
    "customised as is usual": (
        dict(
            name="decoder_block_gpt",
            mcore_customization_config=dict(softmax_scale=0.1, new_decoder_architecture=False),
        ),
        1,
    ),
}


@pytest.mark.parametrize("case", SOUND)
def test_sound_layouts_pass(case):
    changes, world = SOUND[case]
    check_model(config(**changes), world)
    check_tuning(config(**changes))


UNSOUND = {
    "TP does not divide the heads": (
        dict(tensor_model_parallel_size=5, ffn_hidden_size=100),
        5,
        "tensor_model_parallel_size",
        "num_attention_heads=12",
        "[1, 2, 4]",
    ),
    "TP does not divide the groups": (
        dict(tensor_model_parallel_size=3),
        3,
        "tensor_model_parallel_size",
        "num_query_groups=4",
        "[1, 2, 4]",
    ),
    "TP does not divide the MLP": (
        dict(tensor_model_parallel_size=4, ffn_hidden_size=98),
        4,
        "tensor_model_parallel_size",
        "ffn_hidden_size=98",
        "divisor",
    ),
    "TP of zero": (
        dict(tensor_model_parallel_size=0),
        1,
        "tensor_model_parallel_size",
        "at least 1",
        "1 or more",
    ),
    "PP of zero": (
        dict(pipeline_model_parallel_size=0),
        1,
        "pipeline_model_parallel_size",
        "at least 1",
        "1 or more",
    ),
    "more ranks than asked for": (
        dict(tensor_model_parallel_size=2),
        3,
        "tensor_model_parallel_size",
        "does not divide the 3",
        "trainer.devices",
    ),
    "PP does not divide the layers": (
        dict(pipeline_model_parallel_size=5),
        5,
        "pipeline_model_parallel_size",
        "24 layers",
        "num_layers_in_first",
    ),
    "more stages than layers": (
        dict(pipeline_model_parallel_size=25),
        25,
        "pipeline_model_parallel_size",
        "24 layers",
        "divisor",
    ),
    "uneven split that leaves a rest": (
        dict(pipeline_model_parallel_size=3, num_layers_in_first_pipeline_stage=3),
        3,
        "pipeline_model_parallel_size",
        "num_layers_in_first_pipeline_stage=3",
        "divisor",
    ),
    "uneven split of one stage": (
        dict(num_layers_in_first_pipeline_stage=3),
        1,
        "pipeline_model_parallel_size",
        "24 layers",
        "divisor",
    ),
    "first stage takes all": (
        dict(pipeline_model_parallel_size=2, num_layers_in_first_pipeline_stage=24),
        2,
        "pipeline_model_parallel_size",
        "=24",
        "divisor",
    ),
    "a stage without layers": (
        dict(pipeline_model_parallel_size=2, num_layers_in_last_pipeline_stage=0),
        2,
        "num_layers_in_last_pipeline_stage",
        "at least one layer",
        "null",
    ),
    "a negative stage": (
        dict(pipeline_model_parallel_size=2, num_layers_in_first_pipeline_stage=-2),
        2,
        "num_layers_in_first_pipeline_stage",
        "at least one layer",
        "null",
    ),
    "batch": (
        dict(global_batch_size=6),
        4,
        "global_batch_size",
        "micro_batch_size=2 x data-parallel size 4",
        "8",
    ),
    "no batch": (dict(micro_batch_size=0), 1, "micro_batch_size", "at least 1", "1 or more"),
    "SP does not divide": (
        dict(tensor_model_parallel_size=4, sequence_parallel=True, encoder_seq_length=62),
        4,
        "encoder_seq_length",
        "splits it over",
        "multiple of 4",
    ),
    "not megatron-core": (dict(mcore_gpt=False), 1, "mcore_gpt", "megatron-core", "convert"),
    "context parallel": (dict(context_parallel_size=2), 1, "context_parallel_size", "not supported", "1"),
    "interleaved": (
        dict(virtual_pipeline_model_parallel_size=2),
        1,
        "virtual_pipeline_model_parallel_size",
        "interleaved",
        "null",
    ),
    "Falcon's layers": (dict(name="megatron_falcon_gpt"), 1, "name", "plain GPT", "Llama"),
    "Gemma 2's layers": (dict(name="megatron_gemma2"), 1, "name", "plain GPT", "Llama"),
    "soft-capped logits": (
        dict(mcore_customization_config=dict(final_logit_softcapping=30.0)),
        1,
        "mcore_customization_config.final_logit_softcapping",
        "project without it",
        "another checkpoint",
    ),
    "a setting of other layers": (
        dict(mcore_customization_config=dict(parallel_attention=True)),
        1,
        "mcore_customization_config.parallel_attention",
        "unknown to megatron-core's plain GPT",
        "null",
    ),
    "a fusion that is not here, set behind NeMo's back": (
        dict(mcore_customization_config=dict(apply_rope_fusion=True)),
        1,
        "mcore_customization_config.apply_rope_fusion",
        "needs Transformer Engine",
        "set ++model.mcore_customization_config.apply_rope_fusion=null",
    ),
    "a window set there": (
        dict(mcore_customization_config=dict(window_size=[4096, 0])),
        1,
        "mcore_customization_config.window_size",
        "Transformer Engine",
        "set ++model.mcore_customization_config.window_size=null",
    ),
    "dropped layers": (dict(drop_layers=[3]), 1, "drop_layers", "whole models", "null"),
    "CUDA graphs": (dict(enable_cuda_graph=True), 1, "enable_cuda_graph", "hooks", "false"),
    "external CUDA graphs": (dict(external_cuda_graph=True), 1, "external_cuda_graph", "hooks", "false"),
    "a window without Transformer Engine": (
        dict(window_size=[4096, 0]),
        1,
        "window_size",
        "Transformer Engine",
        "null",
    ),
}


@pytest.mark.parametrize("case", UNSOUND)
def test_unsound_layouts_are_refused(case):
    changes, world, key, rule, remedy = UNSOUND[case]
    (fault,) = faults_of(check_model, config(**changes), world)
    assert fault.key == f"model.{key}"
    assert rule in fault.rule and remedy in fault.remedy


def test_faults_of_a_layout_are_listed_together():
    changes = dict(tensor_model_parallel_size=3, pipeline_model_parallel_size=5, mcore_gpt=False)
    faults = faults_of(check_model, config(**changes), 15)
    assert [fault.key.removeprefix("model.") for fault in faults] == [
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "mcore_gpt",
    ]


def test_the_depth_that_is_built_is_split():
    """A truncated backbone of 9 layers has three equal stages, of 10 it has not."""
    check_model(config(pipeline_model_parallel_size=3), 3, layers=9)
    (fault,) = faults_of(check_model, config(pipeline_model_parallel_size=3), 3, 10)
    assert "10 layers (up to the last exit)" in fault.rule


NOTHING = dict(block=False, mlp=False, norm=False, linear=False)
NOT_TUNABLE = {
    "no exits": (dict(early_exit=None), "early_exit", "no exit to tune", "model.early_exit.layers"),
    "no parameter": (
        dict(early_exit__head=dict(**NOTHING, projection="tied"), early_exit__init="copy"),
        "early_exit.head",
        "no exit parameter",
        "block, mlp, norm, linear",
    ),
    "O2": (dict(megatron_amp_O2=True), "megatron_amp_O2", "float32 already", "false"),
    "sharded optimizer": (
        dict(optim__name="mcore_distributed_optim"),
        "optim.name",
        "too few parameters",
        "adamw",
    ),
    "recomputation": (
        dict(activations_checkpoint_granularity="full"),
        "activations_checkpoint_granularity",
        "no activations",
        "null",
    ),
    "sequence too long": (
        dict(data__seq_length=65),
        "data.seq_length",
        "encoder_seq_length=64",
        "at most 64",
    ),
    "SP does not divide the sequence": (
        dict(data__seq_length=63, tensor_model_parallel_size=2, sequence_parallel=True),
        "data.seq_length",
        "splits it over",
        "multiple of 2",
    ),
}


@pytest.mark.parametrize("case", NOT_TUNABLE)
def test_what_cannot_be_tuned_is_refused(case):
    changes, key, rule, remedy = NOT_TUNABLE[case]
    (fault,) = faults_of(check_tuning, config(**changes))
    assert fault.key == f"model.{key}"
    assert rule in fault.rule and remedy in fault.remedy


def test_trained_rows_are_parameters_enough():
    head = dict(**NOTHING, projection="untied", train_projection=True)
    check_tuning(config(early_exit__head=head, early_exit__init="copy"))


def test_a_bare_shortlist_trains_its_bucket():
    check_tuning(config(early_exit__head=dict(**NOTHING, projection="shortlist"), early_exit__init="copy"))


def test_a_model_without_a_section_has_no_exits():
    assert read_early_exit(config(early_exit=None)).layers == ()


PRETRAINING = dict(
    early_exit__init="random", early_exit__head=dict(mlp=False, linear=False, projection="tied")
)
SOUND_PRETRAINING = {
    "plain": {},
    "O2": dict(megatron_amp_O2=True, optim__name="mcore_distributed_optim"),
    "O2 with adamw": dict(megatron_amp_O2=True),
    "recomputed": dict(activations_checkpoint_granularity="full"),
    "filled": dict(
        pipeline_model_parallel_size=4, early_exit__training=dict(bubble_filling=dict(warmup=True))
    ),
}
UNSOUND_PRETRAINING = {
    "no exits": (dict(early_exit=None), "model.early_exit"),
    "ridge": (dict(early_exit__init="ridge", early_exit__head=dict(linear=True)), "model.early_exit.init"),
    "FSDP": (dict(fsdp=True), "model.fsdp"),
    "deferred": (dict(defer_embedding_wgrad_compute=True), "model.defer_embedding_wgrad_compute"),
    "other length": (dict(data__seq_length=32), "model.data.seq_length"),
    "nothing to fill": (
        dict(early_exit__training=dict(bubble_filling=dict(cooldown=True))),
        "model.early_exit.training.bubble_filling",
    ),
    "filled, two stages": (
        dict(
            pipeline_model_parallel_size=2,
            early_exit__training=dict(bubble_filling=dict(warmup=True, backward_ratio=1.0)),
        ),
        "model.early_exit.training.bubble_filling",
    ),
    "filled while ramping up": (
        dict(
            pipeline_model_parallel_size=4,
            rampup_batch_size=[2, 2, 100],
            early_exit__training=dict(bubble_filling=dict(warmup=True)),
        ),
        "model.rampup_batch_size",
    ),
}


@pytest.mark.parametrize("name", SOUND_PRETRAINING)
def test_sound_pretraining(name):
    check_pretraining(config(**{**PRETRAINING, **SOUND_PRETRAINING[name]}))


@pytest.mark.parametrize("name", UNSOUND_PRETRAINING)
def test_pretraining_faults_name_their_key(name):
    changes, key = UNSOUND_PRETRAINING[name]
    faults = faults_of(check_pretraining, config(**{**PRETRAINING, **changes}))
    assert key in [fault.key for fault in faults]
    assert all(fault.remedy for fault in faults)
