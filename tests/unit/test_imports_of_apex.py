# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Apex and Transformer Engine are asked for by name where NeMo and megatron-core can do without, and nowhere else."""

import subprocess
import sys
from pathlib import Path

from tests.support.whole_path import MARK

ROOT = Path(__file__).parents[2]

NAMED = {
    "megatron.core.models": """
        T5.t5_spec backends bert.bert_layer_specs gpt.gpt_layer_specs gpt.moe_module_specs
        retro.decoder_spec retro.encoder_spec
    """,
    "megatron.core.transformer": """
        attention cuda_graphs mlp moe.experts moe.moe_layer moe.moe_utils multi_token_prediction
        transformer_block
    """,
    "megatron.core": """
        dist_checkpointing.exchange_utils distributed.param_and_grad_buffer
        extensions.transformer_engine fp8_utils fusions.fused_layer_norm optimizer
        optimizer.clip_grads optimizer.distrib_optimizer optimizer.optimizer tensor_parallel.layers
        tensor_parallel.random
    """,
    "nemo.collections.nlp.modules.common.megatron": """
        adapters.parallel_adapters attention build_model clip_grads fused_bias_dropout_add
        fused_bias_geglu fused_bias_gelu fused_layer_norm fused_softmax language_model layer_norm_1p
        megatron_decoders megatron_encoder_decoder megatron_encoders megatron_init
        megatron_perceiver_encoders megatron_transformer_decoder megatron_transformer_encoder mlp
        retrieval_token_level_encoder_decoder retrieval_transformer token_level_encoder_decoder
        transformer utils
    """,
    "nemo.collections.nlp": """
        models.language_modeling.megatron.bert.bert_model
        models.language_modeling.megatron.gpt_model parts.nlp_overrides
    """,
    "nemo.core.optim": """
        distributed_adam optimizer_with_main_params optimizers
    """,
    "nemo.utils": """
        export_utils import_utils
    """,
    "transformers": """
        utils.import_utils
    """,
}
"""Modules that may ask, below their packages: each goes on without (nemo-toolkit 2.4.1, megatron-core 0.13.1,
transformers 4.51.3). `nemo.utils.import_utils` and `transformers.utils.import_utils` ask for others. None is ours."""


def test_only_the_named_places_ask_for_apex_and_transformer_engine(tmp_path):
    """While all of the package is imported, and a tiny model is built, trained and generates."""
    command = [sys.executable, "-m", "tests.support.whole_path", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    asked = {line.removeprefix(MARK) for line in done.stdout.splitlines() if line.startswith(MARK)}
    named = {f"{package}.{name}" for package, names in NAMED.items() for name in names.split()}
    assert asked - named == set()
    assert {"megatron.core.transformer.mlp", "nemo.core.optim.optimizers"} <= asked  # so the recorder works
