# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Keys that would mean nothing are refused, and the remedy, pasted behind the command, is accepted."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from nemo_ee.errors import ConfigError
from nemo_ee.models.checks import key_rules
from nemo_ee.models.checks.key_rules import ANY_MODEL, CUSTOMIZATION, PRETRAINING, TUNING, KeyRule
from nemo_ee.models.checks.model_checks import check_model, check_pretraining, check_tuning
from tests.support.script import ROOT

GIVEN = {
    "tuning": ["model.restore_from_path=base.nemo"],
    "pretraining": ["model.tokenizer.type=x"],
}
CHECK = {"tuning": check_tuning, "pretraining": check_pretraining}
RULES = {"tuning": ANY_MODEL + TUNING, "pretraining": ANY_MODEL + PRETRAINING}
BASE = dict(
    mcore_gpt=True,
    num_layers=8,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=8,
    encoder_seq_length=512,
)
REFUSED = {
    "normalization": ["rms_norm", "foo"],
    "resume_from_checkpoint": ["/run/last"],
    "restore_from_ckpt": ["/run/last"],
    "pre_process": [False],
    "post_process": [False],
    "position_embedding_type": ["alibi", "kerple", "xpos", "sandwich", "mrope"],
    "virtual_pipeline_model_parallel_size": [2],
    "context_parallel_size": [2],
    "expert_model_parallel_size": [4],
    "expert_tensor_parallel_size": [2],
    "mtp_num_layers": [1],
    "num_moe_experts": [8],
    "final_logit_softcapping": [30.0],
    "drop_layers": [[3]],
    "transformer_block_type": ["post_ln", "normformer"],
    "attention_type": ["multiquery"],
    "normalize_attention_scores": [False],
    "ffn_dropout": [0.1],
    "activations_checkpoint_layers_per_pipeline": [1],
    "num_micro_batches_with_partial_activation_checkpoints": [1],
    "dist_ckpt_format": ["zarr"],
    "rampup_batch_size": [[2, 2, 8]],
    "reduce_amax": [False],
    "apex_transformer_log_level": [10],
}
"""Of keys whose other value is not true."""
WITH_OTHERS = {
    "activations_checkpoint_granularity",
    "optim.fused",
    "optim.name",
    "optim.overlap_grad_sync",
    "optim.overlap_param_sync",
}
"""Keys that depend on others; they have tests of their own."""


def faults(script: str, overrides: list[str]) -> dict:
    """Faults by key of a command's `model` section, laid over a base as far as the architecture goes."""
    given = [*GIVEN[script], "model.early_exit.layers=[2]", "model.data.data_prefix=[a]"]
    with initialize_config_dir(f"{ROOT}/conf", version_base=None):
        cfg = compose(f"megatron_gpt_ee_{script}", overrides=[*given, *overrides]).model
    cfg = OmegaConf.merge(BASE, OmegaConf.to_container(cfg, resolve=True))
    found, processes = {}, cfg.tensor_model_parallel_size * cfg.pipeline_model_parallel_size
    for check in (lambda: check_model(cfg, processes), lambda: CHECK[script](cfg)):
        try:
            check()
        except ConfigError as error:
            found |= {fault.key: fault for fault in error.faults}
    return found


@pytest.mark.parametrize("section", ["", f"{CUSTOMIZATION}."])
@pytest.mark.parametrize("script", RULES)
def test_keys_that_would_mean_nothing_are_refused_and_remedies_work(script, section):
    rules = {f"{section}{rule.key}": rule for rule in RULES[script] if rule.key not in WITH_OTHERS}
    if section:  # megatron-core has no such sections
        rules = {key: rule for key, rule in rules.items() if "." not in rule.key}
    values = {key: REFUSED.get(rule.key, [True]) for key, rule in rules.items()}
    for number in range(max(map(len, values.values()))):
        bad = {key: some[number] for key, some in values.items() if number < len(some)}
        given = [f"++model.{key}={str(value).replace(' ', '')}" for key, value in bad.items()]
        found = faults(script, given)
        for key, value in bad.items():
            assert found[f"model.{key}"].value == value and found[f"model.{key}"].rule == rules[key].reason
        pasted = [
            fault.remedy.removeprefix("set ") for fault in found.values() if fault.remedy.startswith("set ++")
        ]
        left = faults(script, [*given, *pasted])
        assert left.keys() == {f"model.{key}" for key in bad if rules[key].remedy is not None}


@pytest.mark.parametrize("script", ["tuning", "pretraining"])
def test_what_is_in_order_passes(script):
    both = ["++model.position_embedding_type=rope", "++model.virtual_pipeline_model_parallel_size=1"]
    off = [
        "++model.drop_layers=[]",
        "++model.num_moe_experts=null",
        "++model.headscale=false",
        "++model.ffn_dropout=0",
    ]
    assert faults(script, [*both, *off, "++model.dist_ckpt_format=torch_dist"]) == {}


def optimizer_faults(script: str, name: str, *more: str) -> list:
    """Rules that an optimizer breaks; the remedy of the last is seen to work."""
    overrides = [f"model.optim.name={name}", *more]
    found = faults(script, overrides)
    assert found.keys() <= {"model.optim.name"}
    if found:
        remedy = found["model.optim.name"].remedy.removeprefix("set ")
        assert faults(script, [*overrides, remedy]) == {}
    return [fault.rule for fault in found.values()]


def test_tuning_shards_no_optimizer():
    assert "too few parameters" in optimizer_faults("tuning", "mcore_distributed_optim")[0]
    assert optimizer_faults("pretraining", "mcore_distributed_optim") == []


@pytest.mark.parametrize("script", RULES)
def test_optimizers_that_no_checkpoint_can_hold_are_refused(script):
    for name in ("sgd", "adagrad", "adafactor", "novograd", "lamb", "AdamW"):
        assert "checkpoints hold" in optimizer_faults(script, name)[0]
    for name in ("adam", "adamw"):
        assert optimizer_faults(script, name) == []


APEXS = ("fused_adam", "megatron_fused_adam", "distributed_fused_adam")


@pytest.fixture
def apex(monkeypatch):
    """``apex(kernels, *names, gpu=…)``: what NeMo found of Apex: its kernels, and these optimizers."""
    from nemo.collections.nlp.parts import nlp_overrides
    from nemo.core.optim.optimizers import AVAILABLE_OPTIMIZERS

    def found(kernels: bool, *names: str, gpu: bool) -> None:
        monkeypatch.setattr(nlp_overrides, "HAVE_AMP_C", kernels)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        for name in APEXS:
            monkeypatch.delitem(AVAILABLE_OPTIMIZERS, name, raising=False)
        for name in names:
            monkeypatch.setitem(AVAILABLE_OPTIMIZERS, name, object)

    return found


@pytest.mark.parametrize(("script", "gpu"), [("tuning", True), ("pretraining", False)])
def test_apexs_optimizers_are_refused_without_apex(script, gpu, apex):
    """On a GPU, too."""
    reason = "is Apex's, which is not installed or cannot be imported"
    apex(False, gpu=gpu)
    for name in ("fused_adam", "megatron_fused_adam"):
        assert optimizer_faults(script, name) == [reason]
    apex(False, *APEXS, gpu=gpu)  # installed without its kernels
    assert optimizer_faults(script, "fused_adam") == [reason]


def test_apexs_distributed_optimizer_needs_transformer_engine(apex):
    """NeMo's wrapper asks for its version, and cannot be imported without."""
    apex(True, *APEXS[:2], gpu=True)
    assert optimizer_faults("pretraining", "fused_adam") == []
    assert "Transformer Engine" in optimizer_faults("pretraining", "distributed_fused_adam")[0]


def test_apexs_optimizers_are_refused_without_a_gpu(apex):
    apex(True, *APEXS, gpu=False)
    for name in APEXS:
        assert optimizer_faults("pretraining", name) == [
            "takes its steps with kernels of Apex, which need a GPU"
        ]


def test_apexs_distributed_optimizer_reduces_copies_too_early(apex):
    apex(True, *APEXS, gpu=True)
    four, name = "model.pipeline_model_parallel_size=4", "distributed_fused_adam"
    assert "copies" in optimizer_faults("pretraining", name, four)[0]
    assert optimizer_faults("pretraining", name, four, "model.early_exit.head.projection=untied") == []
    assert optimizer_faults("pretraining", name, "model.pipeline_model_parallel_size=2") == []


FUSED = {
    "fast": ["model.optim.fused=fast"],
    "not torch's": ["model.optim.fused=false", "model.optim.name=fused_adam"],
    "two ways": ["model.optim.fused=true", "+model.optim.foreach=true"],
    "not differentiable": ["model.optim.fused=true", "+model.optim.differentiable=true"],
}


@pytest.mark.parametrize("case", FUSED)
@pytest.mark.parametrize("script", RULES)
def test_kernels_that_an_optimizer_has_not(script, case, apex):
    apex(True, *APEXS[:2], gpu=True)
    found = faults(script, FUSED[case])
    assert found.keys() == {"model.optim.fused"}
    remedy = found["model.optim.fused"].remedy.removeprefix("set ")
    assert faults(script, [*FUSED[case], remedy]) == {}


@pytest.mark.parametrize("fused", ["true", "false", "null"])
@pytest.mark.parametrize("script", RULES)
def test_kernels_may_be_chosen(script, fused):
    assert faults(script, [f"model.optim.fused={fused}"]) == {}


@pytest.mark.parametrize("key", ["overlap_grad_sync", "overlap_param_sync"])
def test_only_sharded_optimizers_overlap(key):
    key, sharded = f"model.optim.{key}", "model.optim.name=mcore_distributed_optim"
    fault = faults("pretraining", [f"+{key}=true"])[key]
    assert faults("pretraining", [f"+{key}=true", fault.remedy.removeprefix("set ")]) == {}
    both = ["+model.optim.overlap_grad_sync=true", "+model.optim.overlap_param_sync=true"]
    assert faults("pretraining", [*both, sharded]) == {}
    alone = faults("pretraining", [f"+{key}=true", sharded])
    assert alone.keys() == ({key} if key.endswith("param_sync") else set())


def test_full_recomputation_says_of_what():
    key = "model.activations_checkpoint_granularity"
    whole = ["model.activations_checkpoint_method=uniform", "model.activations_checkpoint_num_layers=1"]
    fault = faults("pretraining", [f"{key}=full"])[key]
    assert faults("pretraining", [f"{key}=full", fault.remedy.removeprefix("set ")]) == {}
    assert faults("pretraining", [f"{key}=full", whole[0]]).keys() == {key}
    assert faults("pretraining", [f"{key}=full", *whole]) == {}
    assert "no activations" in faults("tuning", [f"{key}=full", *whole])[key].rule


def test_the_trainer_and_checkpoints_have_rules_too():
    trainer = OmegaConf.create(dict(max_epochs=1, accumulate_grad_batches=2, limit_train_batches=1))
    found = key_rules.key_faults(trainer, key_rules.TRAINER, "trainer")
    assert [fault.remedy for fault in found] == [
        "set ++trainer.accumulate_grad_batches=1",
        "set ++trainer.max_epochs=-1",
        "set ++trainer.limit_train_batches=1.0",
    ]
    for script in RULES:
        with initialize_config_dir(f"{ROOT}/conf", version_base=None):
            cfg = compose(f"megatron_gpt_ee_{script}")
        assert key_rules.key_faults(cfg.trainer, key_rules.TRAINER, "trainer") == []
        section = cfg.exp_manager.checkpoint_callback_params
        assert key_rules.key_faults(section, key_rules.CHECKPOINTS, "x") == []
        section = {**section, "async_save": True, "save_last": False}
        section = OmegaConf.create(section)
        assert len(key_rules.key_faults(section, key_rules.CHECKPOINTS, "x")) == 2


def test_nothing_is_copied_from_nowhere():
    fault = faults("pretraining", ["model.early_exit.init=copy"])["model.early_exit.init"]
    assert "restore_from_path" in fault.rule
    assert faults("pretraining", ["model.early_exit.init=copy", "model.restore_from_path=base.nemo"]) == {}


def test_a_rule_is_for_one_key_once():
    for rules in (ANY_MODEL, TUNING, PRETRAINING):
        assert len({(rule.key, rule.reason) for rule in rules}) == len(rules)
    assert list(KeyRule("a.b", 1, "").faults(OmegaConf.create(dict(a=dict(b=1))))) == []
