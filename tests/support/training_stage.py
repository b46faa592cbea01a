# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A pipeline stage of a random GPT that trains with exits, of any size."""

from argparse import Namespace
from typing import Any

import torch

STD = 0.02
"""Of weights."""


def training_stage(size: Namespace, stages: int, mlp: bool) -> Any:
    """This rank's stage, on its GPU if there is one; in a fresh torch.distributed group of `stages` ranks.

    Args:
        size: `layers`, `hidden`, `vocabulary`, `sequence`, `precision` (32 or bf16), and `exits`, the layers that exits
            stand behind; on a stage's last layer they belong to the next one (`pre_exit`).
        stages: P.
        mlp: whether exits have one before their norm and projection.
    """
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.transformer.transformer_config import TransformerConfig

    from nemo_ee.config import EarlyExitConfig, HeadConfig
    from nemo_ee.modeling.gpt import EarlyExitGPTModel

    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=stages)
    gpu, seed = torch.cuda.is_available(), 1234 + torch.distributed.get_rank()
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    torch.manual_seed(seed)
    dtype = torch.bfloat16 if size.precision == "bf16" else torch.float32
    config = TransformerConfig(
        num_layers=size.layers,
        hidden_size=size.hidden,
        num_attention_heads=max(1, size.hidden // 64),
        ffn_hidden_size=4 * size.hidden,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        normalization="RMSNorm",
        add_bias_linear=False,
        init_method_std=STD,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        pipeline_model_parallel_size=stages,
        deallocate_pipeline_outputs=True,
        use_cpu_initialization=not gpu,
    )
    head = HeadConfig(
        mlp="residual" if mlp else "none", norm=True, linear=False, projection="untied", train_projection=True
    )
    gpt = EarlyExitGPTModel(
        config,
        early_exit=EarlyExitConfig(layers=tuple(size.exits), head=head),
        padded_vocab_size=size.vocabulary,
        vocab_size=size.vocabulary,
        exits_dtype=dtype,
        trains_backbone=True,
        pre_exit=True,
        max_sequence_length=size.sequence,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=True,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
    ).to(torch.device("cuda", torch.cuda.current_device()) if gpu else "cpu")
    for exit_head in gpt.exits.values():
        torch.nn.init.normal_(exit_head.projection.weight, std=STD)
    return gpt.train()
