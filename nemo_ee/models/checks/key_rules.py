# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Keys that NeMo accepts and that mean nothing, or something else, in a model with exits.

One table for each use: every model with exits, tuning, pre-training, the trainer, checkpoints. A key that is missing
or null is in order. A remedy can be pasted behind the command: `++` overrides a key that a script's YAML has, and
adds another.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf

from nemo_ee.errors import Fault

CUSTOMIZATION = "mcore_customization_config"
"""A section of `model` whose keys NeMo sets on megatron-core's configuration."""


@dataclass(frozen=True)
class KeyRule:
    """The values of one key that work.

    Attributes:
        key: below its section, dotted; one of `model` may also stand in `mcore_customization_config`.
        use: the value that the remedy sets. Where it is empty or false, all such values work.
        reason: why others are refused.
        also: further values that work.
        applies: whether the rule holds for a configuration.
        remedy: what to do where `use` is no help.
    """

    key: str
    use: Any
    reason: str
    also: tuple = ()
    applies: Callable[[DictConfig], bool] = lambda cfg: True
    remedy: str | None = None

    def faults(self, cfg: DictConfig, section: str = "model") -> Iterator[Fault]:
        """What a section of a configuration has against it."""
        for place in (self.key, f"{CUSTOMIZATION}.{self.key}"):
            value = _plain(OmegaConf.select(cfg, place))
            if value is None or self._works(value) or not self.applies(cfg):
                continue
            remedy = self.remedy or f"set ++{section}.{place}={_as_override(self.use)}"
            yield Fault(f"{section}.{place}", value, self.reason, remedy)

    def _works(self, value: Any) -> bool:
        share = isinstance(value, float) == isinstance(self.use, float)  # of batches, 1 is one and 1.0 all
        return (value == self.use and share) or value in self.also or not (value or self.use)


def key_faults(cfg: DictConfig, rules: tuple[KeyRule, ...], section: str = "model") -> list[Fault]:
    """What a section of a configuration has against these rules."""
    return [fault for rule in rules for fault in rule.faults(cfg, section)]


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if isinstance(value, DictConfig | ListConfig) else value


def _as_override(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _same(
    reason: str,
    remedy: str | None = None,
    applies: Callable[[DictConfig], bool] = lambda cfg: True,
    **use: Any,
) -> list[KeyRule]:
    """Rules of several keys with one reason."""
    return [KeyRule(key, value, reason, applies=applies, remedy=remedy) for key, value in use.items()]


def _without_transformer_engine(cfg: DictConfig) -> bool:
    from nemo_ee.modeling.specs import have_transformer_engine

    return not (cfg.get("transformer_engine", False) and have_transformer_engine())


def _is_missing(cfg: DictConfig, *optimizers: str) -> bool:
    """Whether the optimizer is one of these of Apex's, and NeMo could not import it or its kernels."""
    if (name := cfg.optim.get("name")) not in optimizers:
        return False
    from nemo.collections.nlp.parts.nlp_overrides import HAVE_AMP_C
    from nemo.core.optim.optimizers import AVAILABLE_OPTIMIZERS

    return not HAVE_AMP_C or name not in AVAILABLE_OPTIMIZERS


def _copies_the_embedding(cfg: DictConfig) -> bool:
    head = OmegaConf.select(cfg, "early_exit.head")
    heads = head if OmegaConf.is_list(head) else [head]
    tied = any(OmegaConf.is_dict(each) and each.get("projection") == "tied" for each in heads)
    return tied and cfg.get("pipeline_model_parallel_size", 1) > 2


OTHER_CHECKPOINT = "use another checkpoint, e.g. of a Llama, Mistral, Qwen2 or GPT model"

ANY_MODEL = (
    KeyRule(
        "normalization",
        "rmsnorm",
        "is no norm of megatron-core's: the model would be built with LayerNorm",
        also=("layernorm", "layernorm1p", "RMSNorm", "LayerNorm"),
        remedy="use rmsnorm, layernorm or layernorm1p, whichever the weights are trained with",
    ),
    KeyRule(
        "position_embedding_type",
        "rope",
        "megatron-core's GPT has no such positions: the model would be built with none at all",
        also=("learned_absolute", "none"),
        remedy="use rope or learned_absolute, whichever the weights are trained with",
    ),
    KeyRule(
        "virtual_pipeline_model_parallel_size",
        None,
        "interleaved pipelines are not supported with early exits",
        also=(1,),
    ),
    *_same(
        "not supported with early exits",
        context_parallel_size=1,
        expert_model_parallel_size=1,
        expert_tensor_parallel_size=1,
        mtp_num_layers=None,
    ),
    *_same(
        "exits are built on plain layers with multi-head attention and one MLP",
        OTHER_CHECKPOINT,
        num_moe_experts=None,
        multi_latent_attention=False,
    ),
    *_same("exits and their decoding project without it", OTHER_CHECKPOINT, final_logit_softcapping=None),
    *_same("exits are numbered by whole models", drop_layers=None),
    *_same(
        "graphs run no hooks, by which exits see hidden states",
        enable_cuda_graph=False,
        external_cuda_graph=False,
    ),
    *_same(
        "is known to NeMo's GPT of before megatron-core alone: it would change nothing",
        transformer_block_type="pre_ln",
        attention_type="multihead",
        normalize_attention_scores=True,
        headscale=False,
        use_emha=False,
        ffn_dropout=0.0,
        activations_checkpoint_layers_per_pipeline=None,
        num_micro_batches_with_partial_activation_checkpoints=None,
        onnx_safe=False,
        reduce_amax=True,
        use_flash_attention=False,
        sync_batch_comm=False,
        apex_transformer_log_level=30,
    ),
    *_same("overlaps the passes of interleaved pipelines, which are not supported", overlap_p2p_comm=False),
    *_same(
        "profiles what a GPU does, and there is none",
        applies=lambda cfg: not torch.cuda.is_available(),
        **{"nsys_profile.enabled": False, "memory_profile.enabled": False},
    ),
    *_same(
        "exits are placed by whole layers; uneven stages are num_layers_in_first_pipeline_stage and …_last_…",
        account_for_embedding_in_pipeline_split=False,
        account_for_loss_in_pipeline_split=False,
    ),
    *_same("other formats cannot be read back", dist_ckpt_format="torch_dist"),
    *_same("is exp_manager's: there it is read, here it is not", resume_from_checkpoint=None),
    *_same("every stage finds out for itself where it begins and ends", pre_process=True, post_process=True),
    *_same("losses are computed in float32", fp16_lm_cross_entropy=False),
    KeyRule(
        "sequence_parallel",
        False,
        "splits sequences over tensor-parallel ranks, of which there is one",
        applies=lambda cfg: cfg.get("tensor_model_parallel_size", 1) == 1,
    ),
    KeyRule(
        "activations_checkpoint_granularity",
        "selective",
        "needs model.activations_checkpoint_method=uniform or block, and …_num_layers",
        applies=lambda cfg: (
            cfg.get("activations_checkpoint_granularity") == "full"
            and None
            in (cfg.get("activations_checkpoint_method"), cfg.get("activations_checkpoint_num_layers"))
        ),
    ),
)
"""Of every model with exits."""

APEX_OPTIMIZERS = ("fused_adam", "megatron_fused_adam", "distributed_fused_adam")
SHARDING_OPTIMIZERS = ("mcore_distributed_optim", "distributed_fused_adam")

OPTIMIZERS = (
    KeyRule(
        "optim.name",
        "adamw",
        "checkpoints hold the state of adam, adamw, mcore_distributed_optim and Apex's optimizers alone",
        also=("adam", *APEX_OPTIMIZERS, *SHARDING_OPTIMIZERS),
    ),
    KeyRule(
        "optim.name",
        "adamw",
        "is Apex's, which is not installed or cannot be imported",
        applies=lambda cfg: _is_missing(cfg, "fused_adam", "megatron_fused_adam"),
    ),
    KeyRule(
        "optim.name",
        "adamw",
        "needs Apex and Transformer Engine, of which one is not installed or cannot be imported",
        applies=lambda cfg: _is_missing(cfg, "distributed_fused_adam"),
    ),
    KeyRule(
        "optim.name",
        "adamw",
        "takes its steps with kernels of Apex, which need a GPU",
        applies=lambda cfg: (
            cfg.optim.get("name") in APEX_OPTIMIZERS
            and not torch.cuda.is_available()
            and not _is_missing(cfg, *APEX_OPTIMIZERS)
        ),
    ),
    *_same(
        "rates begin anew with model.restore_from_ckpt, and a run that goes on keeps its own",
        reset_lr=False,
        reset_lr_steps=False,
    ),
    KeyRule("optim.fused", True, "must be true, false or null", also=(False,)),
    KeyRule(
        "optim.fused",
        "null",
        "is known to adam, adamw and mcore_distributed_optim alone",
        applies=lambda cfg: cfg.optim.get("name") in APEX_OPTIMIZERS,
    ),
    KeyRule(
        "optim.fused",
        False,
        "excludes model.optim.foreach and model.optim.differentiable",
        applies=lambda cfg: bool(cfg.optim.get("foreach") or cfg.optim.get("differentiable")),
    ),
)
"""Of whatever is trained."""

TRAINER = (
    *_same("the scripts build the one strategy that trains these models", "leave it out", strategy=None),
    *_same("global batches are accumulated by model.global_batch_size", accumulate_grad_batches=1),
    *_same(
        "Megatron's data is as long as the run, whose end is trainer.max_steps",
        max_epochs=-1,
        limit_train_batches=1.0,
    ),
)
"""Of training."""

CHECKPOINTS = (
    *_same("a run that is stopped would lose what is still being written", async_save=False),
    *_same("runs go on from the last checkpoint", save_last=True),
    KeyRule(
        "monitor",
        "val_loss",
        "is how NeMo's fine-tuning names it; here it has the name that it has in pre-training",
        applies=lambda cfg: str(cfg.monitor).startswith("validation_loss"),
    ),
)
"""Of `exp_manager.checkpoint_callback_params`."""

TUNING = (
    *OPTIMIZERS,
    *_same(
        "the frozen backbone is kept in the compute dtype and the exits in float32 already",
        megatron_amp_O2=False,
    ),
    *_same(
        "a backbone without backward keeps no activations",
        activations_checkpoint_granularity=None,
        cpu_offloading=False,
    ),
    *_same("a frozen backbone has no gradients", fsdp=False, defer_embedding_wgrad_compute=False),
    *_same("its buffers have the size of the backbone's own sequences", ub_tp_comm_overlap=False),
    *_same("tuning has batches of one size", rampup_batch_size=None),
    *_same(
        "tuning starts from model.restore_from_path, and from the exits of model.adapter_path",
        restore_from_ckpt=None,
    ),
    KeyRule(
        "optim.name",
        "adamw",
        "exits have too few parameters to shard their optimizer",
        applies=lambda cfg: cfg.optim.get("name") in SHARDING_OPTIMIZERS,
    ),
)
"""Of tuning exits on a frozen backbone."""

PRETRAINING = (
    *OPTIMIZERS,
    *_same(
        "not supported while exits are trained with the backbone",
        fsdp=False,
        defer_embedding_wgrad_compute=False,
        cpu_offloading=False,
    ),
    KeyRule(
        "ub_tp_comm_overlap",
        False,
        "needs model.transformer_engine=true, Transformer Engine and a GPU",
        applies=_without_transformer_engine,
    ),
    *(
        KeyRule(
            f"optim.{key}",
            False,
            "is known to optimizers that are sharded over data parallelism alone",
            applies=lambda cfg: cfg.optim.get("name") not in SHARDING_OPTIMIZERS,
        )
        for key in ("overlap_grad_sync", "overlap_param_sync")
    ),
    KeyRule(
        "optim.overlap_param_sync",
        False,
        "NeMo overlaps it with model.optim.overlap_grad_sync=true alone",
        applies=lambda cfg: not cfg.optim.get("overlap_grad_sync", False),
    ),
    KeyRule(
        "optim.name",
        "mcore_distributed_optim",
        "reduces copies of the output weight on stages between before their gradients are summed",
        applies=lambda cfg: cfg.optim.get("name") == "distributed_fused_adam" and _copies_the_embedding(cfg),
    ),
)
"""Of training exits with their backbone."""
