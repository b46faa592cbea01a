# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Every key of NeMo's training command means something in ours, or is refused by name; no other is accepted."""

import shlex
from collections.abc import Iterator
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from nemo_ee.errors import ConfigError
from nemo_ee.models.checks import key_names
from nemo_ee.models.checks.command_line import check_command_line
from tests.support import nemo_confs
from tests.support.script import ROOT

PRETRAINING = OmegaConf.to_container(OmegaConf.load(f"{ROOT}/conf/megatron_gpt_ee_pretraining.yaml"))
EXAMPLE = nemo_confs.CONFS["megatron_gpt_config"]
UNUSUAL = {
    "activations_checkpoint_layers_per_pipeline": 1,
    "apex_transformer_log_level": 10,
    "attention_type": "multiquery",
    "drop_layers": "[3]",
    "expert_model_parallel_size": 2,
    "ffn_dropout": 0.1,
    "num_micro_batches_with_partial_activation_checkpoints": 1,
    "resume_from_checkpoint": "/old",
    "transformer_block_type": "post_ln",
}
"""Of keys whose unusual value is not the other of true and false."""


def faults(script: str, *words: str) -> dict[str, Any]:
    try:
        check_command_line(f"megatron_gpt_ee_{script}", words)
    except ConfigError as error:
        return {fault.key: fault for fault in error.faults}
    return {}


def leaves(values: dict[str, Any], section: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{section}{key}.")
        else:
            yield f"{section}{key}", value


NEMOS = dict(leaves(EXAMPLE["model"]))


def is_listed(key: str, values: Any) -> bool:
    for part in key.split("."):
        if part not in values:
            return False
        values = values[part]
    return True


@pytest.mark.parametrize("key", NEMOS)
def test_a_key_of_nemos_is_listed_or_refused_by_name(key):
    if is_listed(key, PRETRAINING["model"]):
        assert faults("pretraining", f"model.{key}=1") == {}
        return
    fault = faults("pretraining", f"model.{key}=1")[f"model.{key}"]
    assert len(fault.rule) > 20 and fault.remedy == "leave it out"
    value = UNUSUAL.get(key, not NEMOS[key])
    found = faults("pretraining", f"+model.{key}={value}")
    if f"model.{key}" not in found:  # then its rule looks at the value
        found = rule_faults("pretraining", f"+model.{key}={value}")
    assert found[f"model.{key}"].rule == fault.rule


def rule_faults(script: str, word: str) -> dict[str, Any]:
    from nemo_ee.models.checks.key_rules import key_faults

    given = ["model.early_exit.layers=[2]", "model.data.data_prefix=[a]", word]
    with initialize_config_dir(f"{ROOT}/conf", version_base=None):
        cfg = compose(f"megatron_gpt_ee_{script}", overrides=given).model
    return {fault.key: fault for fault in key_faults(cfg, key_names.RULES[script])}


def test_all_keys_of_its_trainer_are_listed():
    assert EXAMPLE["trainer"].keys() <= PRETRAINING["trainer"].keys()


def test_what_is_listed_is_no_key_that_means_nothing():
    for script in key_names.RULES:
        cfg = OmegaConf.to_container(OmegaConf.load(f"{ROOT}/conf/megatron_gpt_ee_{script}.yaml"))
        for key, _ in leaves(cfg["model"]):
            assert key not in key_names.REASONS and key not in key_names.OTHER_NAMES, key


UNKNOWN = {
    "+model.nmu_layers=3": "did you mean model.num_layers?",
    "model.nmu_layers=3": "did you mean model.num_layers?",
    "++model.windw_size=[3,0]": "did you mean +model.window_size?",
    "model.early_exit.layer=[2]": "did you mean model.early_exit.layers?",
    "model.early_exit.head.blok=true": "did you mean model.early_exit.head.block?",
    "+model.data.nun_workers=1": "did you mean model.data.num_workers?",
    "model.tokenizer={library:sentencepiece,modell:m}": "did you mean model.tokenizer.model?",
    "trainer.max_tim=1": "did you mean +trainer.max_time?",
    "+trainer.foo=1": "see conf/megatron_gpt_ee_pretraining.yaml",
    "++exp_manager.checkpoint_callback_params.modee=max": "did you mean exp_manager.checkpoint_callback_params.mode?",
    "+modle.seed=3": "did you mean model?",
    "+seed=3": "leave it out; see conf/megatron_gpt_ee_pretraining.yaml",
    "+inference.greedy=true": "leave it out; see conf/megatron_gpt_ee_pretraining.yaml",
    "exp_manager.explicit_log_dirr=x": "did you mean exp_manager.explicit_log_dir?",
}


@pytest.mark.parametrize("word", UNKNOWN)
def test_typing_errors_are_refused_with_the_nearest_key(word):
    (fault,) = faults("pretraining", word).values()
    assert fault.rule == "unknown key" and fault.remedy == UNKNOWN[word]


@pytest.mark.parametrize(
    "word",
    [
        "model.window_size=[3,0]",
        "model.softmax_scale=0.3",
        "model.optim.eps=1e-7",
        "trainer.max_time=00:01:00:00",
        "exp_manager.wandb_logger_kwargs.project=mine",
        "exp_manager.checkpoint_callback_params.save_best_model=false",
        "model.mcore_customization_config.attention_softmax_in_fp32=true",
        "model.tokenizer.special_tokens={pad_token:pad}",
    ],
)
def test_what_is_known_but_not_listed_is_added_by_the_pasted_remedy(word):
    (fault,) = faults("pretraining", word).values()
    pasted = shlex.split(fault.remedy.removeprefix("set "))
    assert pasted == [f"+{word}"] and faults("pretraining", *pasted) == {}
    with initialize_config_dir(f"{ROOT}/conf", version_base=None):
        compose("megatron_gpt_ee_pretraining", overrides=pasted)


@pytest.mark.parametrize("plus", ["", "++"])
def test_a_list_in_the_place_of_a_mapping_is_given_by_the_pasted_remedy(plus):
    word = "model.early_exit.head=[{projection:tied},{block:true}]"
    (fault,) = faults("pretraining", plus + word).values()
    pasted = shlex.split(fault.remedy.removeprefix("set "))
    assert pasted == ["~model.early_exit.head", f"+{word}"] and faults("pretraining", *pasted) == {}
    with initialize_config_dir(f"{ROOT}/conf", version_base=None):
        found = compose("megatron_gpt_ee_pretraining", overrides=pasted)
        assert found.model.early_exit.head == [{"projection": "tied"}, {"block": True}]


OTHER_NAMES = ["recompute_granularity=full", "add_qkv_bias=true", "params_dtype=bf16", "no_sync_func=null"]


@pytest.mark.parametrize("plus", ["", "+", "++"])
@pytest.mark.parametrize("word", [*OTHER_NAMES, "peft.peft_scheme=lora", "moe_router_topk=2"])
def test_names_that_nemo_would_not_read_are_refused(plus, word):
    (fault,) = faults("tuning", f"{plus}model.{word}").values()
    assert fault.remedy == "leave it out" and len(fault.rule) > 20


def test_values_that_hold_keys_pass():
    assert faults("pretraining", "model.data.data_prefix={train:[a],validation:[b],test:null}") == {}
    assert faults("pretraining", "model.early_exit.head={block:true}", "~model.seed", "name=x") == {}
    assert faults("tuning", "+model.early_exit.heads=1") == {}, "which the section's own check refuses"
    assert faults("pretraining", "--config-name", "mine", "model.mine=1") == {}


def test_every_fault_is_listed():
    assert len(faults("pretraining", "model.fsdp=false", "+model.foo=1", "model.num_layers=3")) == 2


@pytest.mark.parametrize("plus", ["", "+", "++"])
@pytest.mark.parametrize(
    "key", ["train_ds.memmap_workers", "validation_ds.names", "validation_ds.metric.name"]
)
def test_keys_of_nemos_fine_tuning_data_are_known(plus, key):
    """Without a plus a key is refused with the reason; with one its rule looks at the value."""
    found = faults("tuning", f"{plus}model.data.{key}=loss")
    if plus:
        assert found == {}
    else:
        assert (
            found[f"model.data.{key}"].remedy == "leave it out"
            and "unknown" not in found[f"model.data.{key}"].rule
        )


@pytest.mark.parametrize(
    "key", ["model.micro_batch_size", "model.data.train_ds", "trainer.max_steps", "exp_manager"]
)
def test_keys_that_are_read_stay(key):
    (fault,) = faults("tuning", f"~{key}").values()
    assert fault.key == f"~{key}" and "leave it out" in fault.remedy


def test_what_a_run_does_without_can_be_taken_away():
    assert faults("tuning", "~model.optim.sched", "~model.data.validation_ds", "++cluster_type=BCP") == {}


def test_another_strategy_and_a_metric_of_another_script():
    from nemo_ee.models.checks.key_rules import CHECKPOINTS, TRAINER, key_faults

    (fault,) = key_faults(OmegaConf.create({"strategy": "ddp"}), TRAINER, "trainer")
    assert fault.remedy == "leave it out"
    (fault,) = key_faults(OmegaConf.create({"monitor": "validation_loss"}), CHECKPOINTS, "c")
    assert fault.remedy == "set ++c.monitor=val_loss"
    for sound in ("val_loss", "val_loss/exit_2", "reduced_train_loss"):
        assert not key_faults(OmegaConf.create({"monitor": sound}), CHECKPOINTS)
