# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""NeMo's own GPT model, trainer and configuration in miniature, for `tests.support.distributed`."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
from nemo.collections.nlp.parts.nlp_overrides import MegatronHalfPrecisionPlugin, NLPDDPStrategy
from omegaconf import DictConfig, OmegaConf


class LocalSpecGPT(MegatronGPTModel):
    """MegatronGPTModel with Megatron's local layer spec; NeMo's `get_specs` needs Transformer Engine."""

    def model_provider_func(self, pre_process: bool, post_process: bool) -> GPTModel:
        if not parallel_state.model_parallel_is_initialized():
            # Layers need process groups at construction; NeMo makes them when fit() starts, or before a
            # restore.
            self.trainer.strategy.launcher.launch(lambda: None, trainer=self.trainer)
            self.trainer.strategy.setup_environment()
        return GPTModel(
            config=self.transformer_config,
            transformer_layer_spec=get_gpt_layer_local_spec(),
            vocab_size=self.padded_vocab_size,
            max_sequence_length=self.cfg.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            parallel_output=True,
            share_embeddings_and_output_weights=self.cfg.share_embeddings_and_output_weights,
            position_embedding_type=self.cfg.position_embedding_type,
        )


def tiny_trainer(
    world_size: int = 1, precision: Any = 32, max_steps: int = 2, o2: bool = False, **kwargs: Any
) -> Trainer:
    """A trainer over the ranks of this job that writes nothing. Distributed is up when it returns.

    Args:
        world_size: number of ranks of the job.
        precision: Lightning's, e.g. 32 or "bf16".
        max_steps: optimizer steps.
        o2: for ``megatron_amp_O2`` without a distributed optimizer, which needs NeMo's own precision plugin.
        **kwargs: for Trainer.
    """
    defaults = dict(
        accelerator="cpu",
        devices=world_size,
        num_nodes=1,
        strategy=NLPDDPStrategy(no_ddp_communication_hook=True, process_group_backend="gloo"),
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
        max_steps=max_steps,
        val_check_interval=max_steps,
        limit_val_batches=2,
        log_every_n_steps=1,
        gradient_clip_val=1.0,
    )
    if o2:
        defaults |= dict(precision=None, plugins=[MegatronHalfPrecisionPlugin("bf16-mixed", device="cpu")])
    return Trainer(**{**defaults, **kwargs})


def write_tiny_tokenizer(folder: Path, num_words: int = 4607) -> str:
    """Writes a Hugging Face tokenizer of the words w0, w1, ... and ``<eos>``; returns its folder.

    Megatron's mock data counts up to 4095, so the vocabulary must hold more. 4608 is a multiple of
    128 x 4: up to TP4 nothing is padded, and the weights of the embedding are the same at every TP size.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<eos>": 0, **{f"w{index}": index + 1 for index in range(num_words)}}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>").save_pretrained(
        folder
    )
    return str(folder)


def tiny_config(**overrides: Any) -> DictConfig:
    """The ``model`` section of a 4-layer GPT on Megatron's mock data; writes a tokenizer to the work folder.

    Args:
        **overrides: dotted keys with ``__`` for the dot, e.g. ``optim__lr=0.1``.
    """
    rank = torch.distributed.get_rank()
    config = OmegaConf.create(
        dict(
            mcore_gpt=True,
            micro_batch_size=2,
            global_batch_size=8,
            tensor_model_parallel_size=1,
            pipeline_model_parallel_size=1,
            encoder_seq_length=32,
            max_position_embeddings=32,
            num_layers=4,
            hidden_size=64,
            ffn_hidden_size=128,
            num_attention_heads=4,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            position_embedding_type="learned_absolute",
            share_embeddings_and_output_weights=True,
            make_vocab_size_divisible_by=128,
            use_cpu_initialization=True,
            megatron_amp_O2=False,
            gradient_accumulation_fusion=False,
            masked_softmax_fusion=False,
            bias_dropout_add_fusion=False,
            bias_activation_fusion=False,
            persist_layer_norm=False,
            seed=1234,
            precision=32,
            tokenizer=dict(
                library="huggingface", type=write_tiny_tokenizer(Path(f"tokenizer_{rank}")), use_fast=True
            ),
            data=dict(
                data_impl="mock",
                data_prefix=[],
                index_mapping_dir=None,
                splits_string="900,50,50",
                seq_length=32,
                num_workers=0,
                dataloader_type="single",
            ),
            optim=dict(
                name="adamw",
                lr=1e-2,
                weight_decay=0.01,
                betas=[0.9, 0.98],
                sched=dict(name="CosineAnnealing", warmup_steps=0, constant_steps=0, min_lr=1e-5),
            ),
        )
    )
    for key, value in overrides.items():
        OmegaConf.update(config, key.replace("__", "."), value, force_add=True)
    return config
