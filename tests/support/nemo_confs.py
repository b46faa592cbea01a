# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""NeMo's own GPT checkpoints: every model of its examples in miniature, built and saved by NeMo's own class.

The `.nemo` has the configuration that NeMo's example has, but for sizes and the tokenizer. What Apex, Transformer
Engine and a GPU do in it is off only while the reference is built.
"""

import json
import re
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf, open_dict

CONFS = json.loads(Path(__file__).with_name("nemo_gpt_confs.json").read_text())["confs"]
"""NeMo's examples: name -> their sections `model` and `trainer`. The file names source and licence."""

MODELS = tuple(name for name in CONFS if name != "megatron_gpt_finetuning_config")
"""Those that describe a model; the other tunes any."""

REFUSED = {
    "megatron_falcon_config": {"mcore_customization_config.parallel_attention"},
    "megatron_gemma2_config": {
        f"mcore_customization_config.{key}"
        for key in ("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar")
    },
    "megatron_gpt_config_hyena": {"name"},
}
"""What our models cannot be: example -> the keys that say so."""

OLD_RUN = dict(
    tensor_model_parallel_size=8,
    pipeline_model_parallel_size=4,
    virtual_pipeline_model_parallel_size=2,
    context_parallel_size=2,
    expert_model_parallel_size=2,
    expert_tensor_parallel_size=2,
    num_layers_in_first_pipeline_stage=3,
    account_for_embedding_in_pipeline_split=True,
    sequence_parallel=True,
    overlap_p2p_comm=True,
    rampup_batch_size=[8, 8, 100],
    fsdp=True,
    fsdp_sharding_strategy="grad",
    cpu_offloading=True,
    cpu_offloading_num_layers=2,
    ub_tp_comm_overlap=True,
    ub_tp_comm_overlap_cfg={"qkv_fprop": {"method": "ring_exchange"}},
    tp_comm_overlap_ag=False,
    defer_embedding_wgrad_compute=True,
    activations_checkpoint_granularity="full",
    activations_checkpoint_method="uniform",
    activations_checkpoint_num_layers=1,
    activations_checkpoint_layers_per_pipeline=1,
    recompute_modules=["mlp"],
    fp8=True,
    fp8_hybrid=True,
    fp16_lm_cross_entropy=True,
    enable_cuda_graph=True,
    cuda_graph_warmup_steps=7,
    flash_decode=True,
    use_te_rng_tracker=True,
    dist_ckpt_format="zarr",
    nsys_profile={"enabled": True, "start_step": 1, "end_step": 2, "ranks": [0], "gen_shape": False},
    memory_profile={"enabled": True, "start_step": 1, "end_step": 2, "rank": 0, "output_path": "/tmp"},
    enable_megatron_timers=True,
    nccl_communicator_config_path="/old/nccl.yaml",
    sharp=True,
    resume_from_checkpoint="/old",
    restore_from_ckpt="/old",
    restore_from_path="/old.nemo",
    skip_train=True,
    reset_lr=True,
    use_flash_attention=True,
    transformer_block_type="post_ln",
    attention_type="multiquery",
    headscale=True,
    ffn_dropout=0.1,
    hidden_dropout=0.3,
    micro_batch_size=3,
    global_batch_size=6,
)
"""What describes the run that wrote a checkpoint, or nothing at all, in unusual values."""

POSITIONS, LAYERS = 32, 4
PROMPT = (11, 7, 42, 5, 100, 3)
NEW_TOKENS = 6


@lru_cache
def conf(name: str) -> DictConfig:
    """One of NeMo's examples as OmegaConf reads it from YAML, where 1e-5 is a number."""
    return OmegaConf.create(_numbers(CONFS[name]))


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers(part) for key, part in value.items()}
    is_number = isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?e-?\d+", value)
    return float(value) if is_number else value


def shrunk(name: str, tokenizer: str) -> DictConfig:
    """The `model` section of an example with small sizes, resolved as NeMo saves it."""
    cfg = conf(name).copy()
    heads, groups, channels = (
        cfg.model.get(key) for key in ("num_attention_heads", "num_query_groups", "kv_channels")
    )
    small = dict(
        num_layers=LAYERS,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=min(heads, 4),
        encoder_seq_length=POSITIONS,
        micro_batch_size=1,
        global_batch_size=1,
        precision=cfg.trainer.precision,
        init_method_std=0.3,
        tokenizer=dict(library="huggingface", type=tokenizer, use_fast=True),
    )
    if groups is not None:
        small["num_query_groups"] = 4 if groups == heads else min(groups, 2)
    if channels is not None:
        small["kv_channels"] = 16
    if cfg.model.get("override_vocab_size"):
        small["override_vocab_size"] = 384
    if "data_prefix" in cfg.model.data:
        small["data"] = dict(cfg.model.data, data_prefix=["old_text"])
    if "cpu_offloading_num_layers" in cfg.model:
        small["cpu_offloading_num_layers"] = LAYERS - 1
    for key, value in small.items():
        cfg.model[key] = value
    OmegaConf.resolve(cfg)
    return cfg.model


def build(name: str, cfg: DictConfig, path: str, local_names: bool) -> dict[str, Any]:
    """Builds NeMo's model of a configuration in this rank and saves it with NeMo's own connector.

    Args:
        name: of the example.
        cfg: from `shrunk`.
        path: the `.nemo` to write.
        local_names: name norms as megatron-core's local layers do, not as Transformer Engine's.

    Returns:
        What NeMo's model computes in float32: the logits of `PROMPT` [S, V] and its greedy continuation.
    """
    from nemo.collections.nlp.parts.nlp_overrides import NLPSaveRestoreConnector

    from tests.support.tiny_nemo import tiny_trainer

    kind = _local_gpt(local_names)
    off = ("megatron_amp_O2", "transformer_engine", "gradient_accumulation_fusion", "persist_layer_norm")
    off += ("apply_rope_fusion", "masked_softmax_fusion", "layernorm_zero_centered_gamma")
    here = OmegaConf.merge(cfg, dict.fromkeys(off, False), dict(use_cpu_initialization=True, precision=32))
    here.optim = dict(name="adamw", lr=1e-3)
    torch.manual_seed(len(name))
    model = kind(here, tiny_trainer())
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "norm" in key or key.endswith("bias"):
                weight.add_(torch.randn_like(weight) * 0.2)
            if cfg.megatron_amp_O2:
                weight.copy_(weight.bfloat16())
    result = reference(model)
    with open_dict(model._cfg):
        for key in list(model._cfg):
            if key not in cfg and key not in ("target", "nemo_version"):
                del model._cfg[key]
        for key, value in cfg.items():
            model._cfg[key] = value
        model._cfg.target = (
            "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel"
        )
    NLPSaveRestoreConnector().save_to(model, path)
    _amend(path, OLD_RUN)
    return result


def _amend(path: str, changes: dict[str, Any]) -> None:
    """Sets keys of a `.nemo`'s configuration."""
    from nemo_ee.checkpoint import archive

    with tempfile.TemporaryDirectory() as folder:
        root = archive.extract(path, folder)
        config = OmegaConf.load(root / archive.CONFIG_NAME)
        OmegaConf.save(OmegaConf.merge(config, changes), root / archive.CONFIG_NAME)
        archive.write_archive(root, path)


@torch.no_grad()
def reference(model: Any) -> dict[str, Any]:
    """Logits of the prompt and the greedy continuation, by whole forward passes of NeMo's module."""
    gpt, ids = model.model.eval(), list(PROMPT)
    first = logits_of(gpt, ids)
    for _ in range(NEW_TOKENS):
        ids.append(int(logits_of(gpt, ids)[-1, : model.tokenizer.vocab_size].argmax()))
    return dict(logits=first, continuation=ids[len(PROMPT) :])


@torch.no_grad()
def logits_of(gpt: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """[S, V], float32."""
    tokens = torch.tensor([ids])
    hidden = torch.ones(1, 1, len(ids), len(ids), dtype=torch.bool).triu(1)
    return gpt(tokens, torch.arange(len(ids))[None], hidden)[0].float()


def _local_gpt(local_names: bool) -> type:
    """`MegatronGPTModel` whose layers are megatron-core's local ones."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import (
        MegatronGPTModel,
        mcore_model_customize,
    )

    class LocalGPT(MegatronGPTModel):
        def model_provider_func(self, pre_process: bool, post_process: bool) -> GPTModel:
            if not parallel_state.model_parallel_is_initialized():
                self.trainer.strategy.launcher.launch(lambda: None, trainer=self.trainer)
                self.trainer.strategy.setup_environment()
            spec = get_gpt_layer_local_spec(normalization=self.transformer_config.normalization)
            if local_names:
                spec.submodules.sharded_state_dict_keys_map = {}
            model = GPTModel(
                config=self.transformer_config,
                transformer_layer_spec=spec,
                vocab_size=self.cfg.get("override_vocab_size") or self.padded_vocab_size,
                max_sequence_length=self.cfg.encoder_seq_length,
                pre_process=pre_process,
                post_process=post_process,
                parallel_output=True,
                share_embeddings_and_output_weights=self.cfg.share_embeddings_and_output_weights,
                position_embedding_type=self.cfg.position_embedding_type,
                rotary_percent=self.cfg.get("rotary_percentage", 1.0),
                seq_len_interpolation_factor=self.cfg.get("seq_len_interpolation_factor"),
                rotary_base=self.cfg.get("rotary_base", 10000),
            )
            mcore_model_customize(
                {**self.cfg, "mcore_customization_config": {}}, model
            )  # else Gemma 2's need it
            return model

    return LocalGPT
