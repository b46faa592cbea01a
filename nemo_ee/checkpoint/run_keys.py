# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Which keys of a `model` configuration describe a run and not the model, and how a new run is put over a checkpoint.

What is in neither list describes the model: the checkpoint has it, and has it right. That way a key that nobody
here has heard of (another attention bias, another scaling of positions) goes on meaning what it meant.
"""

from collections.abc import Collection, Iterator
from dataclasses import fields
from typing import Any

from hydra.core.hydra_config import HydraConfig
from megatron.core.model_parallel_config import ModelParallelConfig
from omegaconf import DictConfig, OmegaConf, open_dict

LAYOUT = frozenset(field.name for field in fields(ModelParallelConfig)) | {
    # how the work was split over processes
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "use_tp_pp_dp_mapping",
    "distributed_timeout_minutes",
    "nccl_communicator_config_path",
    "sharp",
    "rampup_batch_size",
    # precision, and what keeps it in range
    "precision",
    "megatron_amp_O2",
    "fp8",
    "fp8_e4m3",
    "fp8_hybrid",
    "fp8_params",
    "fp8_margin",
    "fp8_interval",
    "fp8_amax_history_len",
    "fp8_amax_compute_algo",
    "reduce_amax",
    "tp_only_amax_red",
    "fp16_lm_cross_entropy",
    "native_amp_init_scale",
    "native_amp_growth_interval",
    "hysteresis",
    # overlap, recomputation, offloading, graphs
    "num_micro_batches_with_partial_activation_checkpoints",
    "grad_allreduce_chunk_size_mb",
    "grad_div_ar_fusion",
    "async_grad_allreduce",
    "gradient_as_bucket_view",
    "distributed_adam_bucket_merge_size",
    "validation_param_sync_overlap",
    "sync_batch_comm",
    "enable_cuda_graph",
    "external_cuda_graph",
    # watching the run, and its files
    "apex_transformer_log_level",
    "enable_megatron_timers",
    "megatron_timer_kwargs",
    "gc_interval",
    "nsys_profile",
    "memory_profile",
    "onnx_safe",
    "resume_from_checkpoint",
    "restore_from_path",
    "restore_from_ckpt",
    "adapter_path",
    "validate_at_start",
}
"""Keys of the old run's layout: they come from the new run, and where it has none, from NeMo's defaults."""

LAYOUT_PREFIXES = ("activations_checkpoint_", "dist_ckpt_", "fsdp", "ub_tp_comm_")
"""Beginnings of further keys of the layout."""

CHOICES = frozenset(
    {
        "micro_batch_size",
        "global_batch_size",
        "seed",
        "data",
        "optim",
        "early_exit",
        "answer_only_loss",  # of tuning on chats
        "reset_lr",
        "reset_lr_steps",
        "do_layer_norm_weight_decay",
        "hidden_dropout",
        "attention_dropout",
        "ffn_dropout",
        "init_method_std",  # of new exits
        "use_scaled_init_method",
        "transformer_engine",
        "use_flash_attention",
        "attention_backend",
        "bias_dropout_add_fusion",
        "masked_softmax_fusion",
        "persist_layer_norm",
        "apply_rope_fusion",
        "get_attention_mask_from_fusion",
    }
)
"""Keys that a run chooses and that do not change what the weights mean; from the checkpoint where it has none."""

SHAPES = frozenset(
    {
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
        "normalization",
        "bias",
        "qkv_bias",
        "qk_layernorm",
        "share_embeddings_and_output_weights",
    }
)
"""Keys of the model that its tensors follow from; they cannot be set otherwise than in the checkpoint."""

GELU_FUSION = "bias_activation_fusion"
"""A speed-up, but megatron-core's kernel approximates GELU: there it belongs to the model."""


def is_layout(key: str) -> bool:
    """Whether a key of the `model` configuration describes how a run was laid out."""
    return key in LAYOUT or key.startswith(LAYOUT_PREFIXES)


def without_layout(saved: DictConfig) -> DictConfig:
    """A copy of a checkpoint's configuration, resolved, without what described the run that wrote it."""
    values: dict[str, Any] = OmegaConf.to_container(saved, resolve=True)
    return OmegaConf.create({key: value for key, value in values.items() if not is_layout(key)})


def put_over(
    saved: DictConfig, run: DictConfig, given: Collection[str] | None
) -> tuple[DictConfig, dict[str, Any]]:
    """A checkpoint's configuration for a new run.

    Args:
        saved: the checkpoint's `model` configuration; not changed.
        run: the new run's; its layout and its choices count.
        given: dotted keys of `run` that count although they describe the model, e.g. those of the command line;
            None for all.

    Returns:
        The merged configuration; and the keys that describe the model and now differ from the checkpoint's.
    """
    config = without_layout(saved)
    values: dict[str, Any] = OmegaConf.to_container(run, resolve=True, throw_on_missing=False)
    changed: dict[str, Any] = {}
    with open_dict(config):
        for key, value in values.items():
            if belongs_to_run(key, saved):
                config[key] = value
                continue
            for name, part in _leaves(key, value):
                if given is not None and not any(f"{name}.".startswith(f"{prefix}.") for prefix in given):
                    continue
                if OmegaConf.select(config, name) != part:
                    OmegaConf.update(config, name, part, force_add=True)
                    changed[name] = part
    return config, changed


def belongs_to_run(key: str, saved: DictConfig) -> bool:
    """Whether a key comes from the run that restores a checkpoint with the configuration `saved`."""
    if key == GELU_FUSION:
        activation = saved.get("activation", "gelu")
        return "gelu" not in activation and "geglu" not in activation
    return is_layout(key) or key in CHOICES


def other_than(saved: DictConfig, run: DictConfig) -> dict[str, tuple[Any, Any]]:
    """Keys that describe the model and are not alike: key -> what a checkpoint and a run that resumes it say.

    A tokenizer's files may lie elsewhere now, and another machine may lack a fused kernel. A key that is missing is
    no other than one that is null or off.
    """
    theirs, mine = (OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False) for cfg in (saved, run))
    passed_over = {"tokenizer", "target", "nemo_version", GELU_FUSION}
    both = {
        key: (theirs.get(key), mine.get(key)) for key in sorted((theirs.keys() | mine.keys()) - passed_over)
    }
    return {
        key: pair
        for key, pair in both.items()
        if pair[0] != pair[1] and any(pair) and not belongs_to_run(key, saved)
    }


def command_line_keys() -> frozenset[str]:
    """Dotted keys below `model` that were given on the script's command line; none without Hydra."""
    if not HydraConfig.initialized():
        return frozenset()
    keys = (text.lstrip("+~").split("=", 1)[0] for text in HydraConfig.get().overrides.task)
    return frozenset(key.removeprefix("model.") for key in keys if key.startswith("model."))


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """A key and its value; of a section, those below it."""
    if isinstance(value, dict) and value:
        for name, part in value.items():
            yield from _leaves(f"{key}.{name}", part)
    else:
        yield key, value
