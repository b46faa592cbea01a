# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Names of keys that NeMo's training commands have: which mean something here, and why the others do not.

What a key's *value* must be is said in `key_rules`.
"""

import dataclasses

from nemo_ee.models.checks.fine_tuning_checks import SECTION_RULES, SECTIONS
from nemo_ee.models.checks.key_rules import ANY_MODEL, PRETRAINING, TUNING

RULES = {"pretraining": (*PRETRAINING, *ANY_MODEL), "tuning": (*TUNING, *ANY_MODEL)}
"""Of each script that trains."""
_DATA_RULES = {f"data.{section}.{rule.key}": rule.reason for section in SECTIONS for rule in SECTION_RULES}

_FSDP = "belongs to FSDP, which is not supported with early exits"
_OFFLOADING = "says what model.cpu_offloading offloads, which is not supported with early exits"
_OLD_DATASETS = "is known to NeMo's datasets of before megatron-core alone: it would change nothing"
_EXPERTS = "is of layers with experts, and exits are built on plain layers with one MLP"

REASONS = {
    "use_cpu_initialization": "the machine decides: weights are made where the model runs",
    "skip_train": "is read by NeMo's own script; exits are evaluated by scripts/evaluate_early_exit.py",
    "gradient_as_bucket_view": "belongs to torch's DDP, which does not wrap these models",
    "validation_param_sync_overlap": "validations begin with whole parameters here",
    "dist_ckpt_assume_constant_structure": "is read by no NeMo that this runs on",
    "save_nemo_on_validation_end": "set exp_manager.checkpoint_callback_params.always_save_nemo instead",
    "peft": "exits are tuned here, and nothing else; model.early_exit says how",
    "hyena": "is of Hyena's layers, and exits are built on plain attention",
    "megatron_legacy": "exits are built on megatron-core's GPT",
    "mcore_bert": "exits are built on megatron-core's GPT",
    "language_model": "is of NeMo's models of before megatron-core",
    "attention_softmax_in_fp32": "NeMo sets it itself; set model.mcore_customization_config.attention_softmax_in_fp32",
    "fsdp_grad_reduce_dtype": _FSDP,
    "fsdp_sharded_checkpoint": _FSDP,
    "fsdp_sharding_strategy": _FSDP,
    "fsdp_use_orig_params": _FSDP,
    "fsdp_limit_all_gathers": _FSDP,
    "fsdp_cpu_offload": _FSDP,
    "cpu_offloading_activations": _OFFLOADING,
    "cpu_offloading_weights": _OFFLOADING,
    "cpu_offloading_num_layers": _OFFLOADING,
    "data.shuffle_documents": _OLD_DATASETS,
    "data.exchange_indices_distributed": _OLD_DATASETS,
    "data.skip_warmup": _OLD_DATASETS,
    "data.legacy_dataset": _OLD_DATASETS,
    "data.data_cache_generation_only": "indices are built when a run starts; there is no run that builds them alone",
    "data.pad_samples_to_global_batch_size": "validations have whole batches alone",
    "data.add_fim": "text is read as it is, without filling in the middle",
    "data.fim": "text is read as it is, without filling in the middle",
    "data.test_ds": "no script here tests",
}
"""Keys and sections below `model` that NeMo knows and that would mean nothing here, whatever their value."""

_FROZEN = "a frozen backbone drops nothing out"

REASONS_OF = {
    "tuning": {"hidden_dropout": _FROZEN, "attention_dropout": _FROZEN},
    "pretraining": {
        "answer_only_loss": "is of fine-tuning data, which scripts/megatron_gpt_ee_tuning.py reads",
        "data.chat": "is of fine-tuning data, which scripts/megatron_gpt_ee_tuning.py reads",
        "data.train_ds": "is fine-tuning data, which scripts/megatron_gpt_ee_tuning.py reads",
        "data.validation_ds": "is fine-tuning data, which scripts/megatron_gpt_ee_tuning.py reads",
    },
}
"""The same, of one script."""

OTHER_NAMES = {
    "add_bias_linear": "bias",
    "add_qkv_bias": "qkv_bias",
    "gated_linear_unit": "activation",
    "activation_func": "activation",
    "init_method": "init_method_std",
    "output_layer_init_method": "use_scaled_init_method",
    "bias_dropout_fusion": "bias_dropout_add_fusion",
    "recompute_granularity": "activations_checkpoint_granularity",
    "recompute_method": "activations_checkpoint_method",
    "recompute_num_layers": "activations_checkpoint_num_layers",
    "tp_comm_overlap": "ub_tp_comm_overlap",
    "tp_comm_bootstrap_backend": "ub_tp_comm_bootstrap_backend",
    **dict.fromkeys(
        ("fp16", "bf16", "params_dtype", "pipeline_dtype", "autocast_dtype", "enable_autocast"), "precision"
    ),
}
"""Fields of megatron-core's configuration that NeMo fills in itself: -> the key that it reads for them."""

_SET_BY_NEMO = frozenset(
    {
        "_cpu_offloading_context",
        "apply_residual_connection_post_layernorm",
        "async_tensor_model_parallel_allreduce",
        "batch_p2p_sync",
        "deallocate_pipeline_outputs",
        "distribute_saved_activations",
        "finalize_model_grads_func",
        "grad_scale_func",
        "grad_sync_func",
        "no_sync_func",
        "num_microbatches_with_partial_activation_checkpoints",
        "param_sync_func",
        "perform_initialization",
        "pipeline_model_parallel_split_rank",
        "timers",
        "use_ring_exchange_p2p",
        "variable_seq_lengths",
    }
)
"""Fields of megatron-core's configuration that no key should set."""

NEMO_MODEL_KEYS = frozenset(
    {
        # of the model
        "apply_embedding_scaling",
        "high_freq_factor",
        "low_freq_factor",
        "mcore_customization_config",
        "mcore_gpt",
        "name",
        "old_context_len",
        "openai_gelu",
        "override_vocab_size",
        "qkv_bias",
        "rotary_base",
        "rotary_percentage",
        "scale_factor",
        "scale_positional_embedding",
        "seq_len_interpolation_factor",
        # of the run
        "async_grad_allreduce",
        "distributed_adam_bucket_merge_size",
        "dump_debug_info",
        "dump_debug_info_to_file",
        "fp8_e4m3",
        "fp8_hybrid",
        "fp8_params",
        "memory_profile",
        "nsys_profile",
        "ub_tp_comm_bootstrap_backend",
        "use_tp_pp_dp_mapping",
        "with_fp32_embedding_grads",
        # below sections
        "tokenizer.additional_special_tokens",
        "tokenizer.chat_template",
        "tokenizer.special_tokens",
        "tokenizer.trust_remote_code",
        "tokenizer.eos_token_ids",
        "tokenizer.add_bos",
    }
)
"""What NeMo's GPT reads beside megatron-core's keys and those of our files, and that means the same here."""

OPEN_SECTIONS = (
    "mcore_customization_config",
    "nsys_profile",
    "memory_profile",
    "megatron_timer_kwargs",
    "ub_tp_comm_overlap_cfg",
    "tokenizer.special_tokens",
    "optim",
)
"""Sections whose keys are checked elsewhere, or by those who read them."""


def reason(key: str, script: str) -> str | None:
    """Why a key below `model` means nothing here, or can have one value alone; None for other keys.

    Args:
        key: dotted, without `model`.
        script: one of `RULES`.
    """
    parts = key.split(".")
    for name in (".".join(parts[:length]) for length in range(len(parts), 0, -1)):
        if why := REASONS_OF[script].get(name) or REASONS.get(name):
            return why
    if key in OTHER_NAMES:
        return f"NeMo fills it in from model.{OTHER_NAMES[key]}; set that"
    if key in _SET_BY_NEMO:
        return "NeMo fills it in itself"
    if key.startswith("moe_"):
        return _EXPERTS
    if (of_data := _data_rule(key, script)) is not None:
        return _DATA_RULES[of_data]
    return next((rule.reason for rule in RULES[script] if rule.key == key), None)


def has_rule(key: str, script: str) -> bool:
    """Whether a key's value is judged by `key_rules`."""
    return _data_rule(key, script) is not None or any(rule.key == key for rule in RULES[script])


def _data_rule(key: str, script: str) -> str | None:
    """The key of fine-tuning data that has a rule and is this one, or the section that it is in."""
    if script != "tuning":
        return None
    return next((name for name in _DATA_RULES if f"{key}.".startswith(f"{name}.")), None)


def megatron_keys() -> frozenset[str]:
    """Fields of megatron-core's configuration that may be set below `model`."""
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    return frozenset(field.name for field in dataclasses.fields(MLATransformerConfig)) - _SET_BY_NEMO
