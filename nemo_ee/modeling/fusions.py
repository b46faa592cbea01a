# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Fused operations that a configuration may ask of megatron-core: what each needs, and whether it is here.

megatron-core tries the imports of Apex and Transformer Engine itself; what it found is asked of it, so that a package
that is installed but broken counts as it does there. All of them hold for megatron-core 0.13.1.
"""

from collections.abc import Callable

import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.tensor_parallel import layers

from nemo_ee.modeling.specs import have_transformer_engine


def _gpu() -> bool:
    return torch.cuda.is_available()


def _weight_gradients() -> bool:
    # tensor_parallel/layers.py: ColumnParallelLinear, of which the output layer is one with Transformer Engine, too,
    # raises without fused_weight_gradient_mlp_cuda, a kernel of Apex.
    return layers._grad_accum_fusion_available and _gpu()


def _rotary() -> bool:
    # TransformerConfig.__post_init__ raises without rope_utils.fused_apply_rotary_pos_emb, Transformer Engine's.
    return rope_utils.fused_apply_rotary_pos_emb is not None and _gpu()


def _never() -> bool:
    return False


_NEEDS: dict[str, tuple[str, Callable[[], bool]]] = {
    "gradient_accumulation_fusion": ("Apex's kernel for it and a GPU", _weight_gradients),
    # fusions/fused_layer_norm.py alone reads it.
    "persist_layer_norm": ("Apex's norms; layers here have torch's or Transformer Engine's", _never),
    # transformer/dot_product_attention.py alone reads it.
    "masked_softmax_fusion": (
        "megatron-core's own attention; layers here have torch's or Transformer Engine's",
        _never,
    ),
    "apply_rope_fusion": ("Transformer Engine and a GPU", _rotary),
    # fp8_utils.py: without Transformer Engine its context does nothing, and other modules do not heed it.
    "fp8": ("model.transformer_engine=true, Transformer Engine and a GPU", have_transformer_engine),
    # Plain torch, for a compiler to fuse, which on a CPU takes longer than it saves.
    "bias_activation_fusion": ("a GPU", _gpu),
    "bias_dropout_add_fusion": ("a GPU", _gpu),
}

FUSIONS = tuple(_NEEDS)
"""Keys of `model` in NeMo's configuration. Of results only the rounding depends on them, but see `fuses_gelu`."""


def missing_fusions(transformer_engine: bool) -> dict[str, str]:
    """What cannot run on this machine, or has no effect in these layers, and what it would need.

    Args:
        transformer_engine: whether the configuration asks for Transformer Engine's modules.
    """
    missing = {key: what for key, (what, is_here) in _NEEDS.items() if not is_here()}
    return missing if transformer_engine else {**missing, "fp8": _NEEDS["fp8"][0]}
