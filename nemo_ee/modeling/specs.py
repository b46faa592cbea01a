# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Layer specs: Transformer Engine where it can run, plain torch elsewhere. Both name their weights alike."""

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from nemo_ee.modeling.attention import TorchAttention
from nemo_ee.modeling.norms import TorchNorm

FUSED_NORM_NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
"""Names that the separate norms take in checkpoints: those of Transformer Engine's fused modules."""


def have_transformer_engine() -> bool:
    """Whether Transformer Engine is installed and has a GPU to run on."""
    return gpt_layer_specs.HAVE_TE and torch.cuda.is_available()


def gpt_layer_spec(config: TransformerConfig, use_te: bool | None = None) -> ModuleSpec:
    """One transformer layer.

    Args:
        config: backbone configuration.
        use_te: Transformer Engine's modules, or plain torch's; None takes what the machine has.

    Raises:
        NotImplementedError: mixture-of-experts layers, which need Transformer Engine.
    """
    if have_transformer_engine() if use_te is None else use_te:
        return gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(
            config.num_moe_experts, config.moe_grouped_gemm, qk_layernorm=config.qk_layernorm
        )
    if config.num_moe_experts is not None:
        raise NotImplementedError(
            "num_moe_experts: experts need Transformer Engine; install it or use a dense model"
        )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=TorchNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=TorchAttention,
                    linear_proj=RowParallelLinear,
                    q_layernorm=TorchNorm if config.qk_layernorm else IdentityOp,
                    k_layernorm=TorchNorm if config.qk_layernorm else IdentityOp,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=TorchNorm,
            mlp=mlp_spec(),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=dict(FUSED_NORM_NAMES),
        ),
    )


def mlp_spec() -> ModuleSpec:
    """The backbone's kind of MLP (gated or not, by its configuration), without a norm of its own."""
    return ModuleSpec(module=MLP, submodules=MLPSubmodules(ColumnParallelLinear, RowParallelLinear))


def gpt_block_spec(config: TransformerConfig, use_te: bool | None = None) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage and the final norm."""
    layer = gpt_layer_spec(config, use_te)
    return TransformerBlockSubmodules(
        [layer] * get_num_layers_to_build(config), layer_norm=norm_module(use_te)
    )


def norm_module(use_te: bool | None = None) -> type:
    """The norm's class: Transformer Engine's, or plain torch's."""
    if have_transformer_engine() if use_te is None else use_te:
        return gpt_layer_specs.TENorm
    return TorchNorm
