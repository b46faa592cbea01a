# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Which modules decoding reads as weights, and where these are: torch's modules and Transformer Engine's.

Transformer Engine's modules are known by megatron-core's classes of them, which exist, as mocks, without it.
Weights in FP8 are no plain tensors: layers that have such, or are configured to compute with such, run
through their modules.
"""

from typing import Any

from megatron.core.extensions import transformer_engine as te
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.nn.functional import gelu, silu

from nemo_ee.decoding.cpu.lean_weights import LeanNorm
from nemo_ee.modeling.norms import TorchNorm


def is_lean(layer: TransformerLayer) -> bool:
    """Whether `LeanLayer` knows all modules of a layer."""
    attention = layer.self_attention
    return (
        type(attention) is SelfAttention
        and is_lean_pair(layer.input_layernorm, attention.linear_qkv)
        and _is_row_linear(attention.linear_proj)
        and all(
            _is_absent(norm) or is_lean_norm(norm) for norm in (attention.q_layernorm, attention.k_layernorm)
        )
        and is_lean_mlp(layer.pre_mlp_layernorm, layer.mlp)
    )


def is_lean_mlp(norm: Any, mlp: Any) -> bool:
    """Whether `LeanMLP` knows the modules and the activation of an MLP, and `norm_before` the norm before it."""
    return (
        type(mlp) is MLP
        and is_lean_pair(norm, mlp.linear_fc1)
        and _is_row_linear(mlp.linear_fc2)
        and (not mlp.config.bias_activation_fusion or mlp.config.activation_func in (gelu, silu))
    )


def is_lean_pair(norm: Any, linear: Any) -> bool:
    """Whether `norm_before` knows the norm and `bias_of` the column-parallel layer behind it."""
    if type(linear) is te.TELayerNormColumnParallelLinear:
        return _is_absent(norm) and not _is_fp8(linear)
    return is_lean_norm(norm) and (
        type(linear) is ColumnParallelLinear
        or (type(linear) is te.TEColumnParallelLinear and not _is_fp8(linear))
    )


def is_lean_norm(module: Any) -> bool:
    """Whether `read_norm` reads the module."""
    return type(module) is TorchNorm or _is_te_norm(module)


def read_norm(module: Any) -> LeanNorm:
    """A norm as a function of its weights."""
    if type(module) is TorchNorm:
        return LeanNorm(module.weight, module.bias, module.eps, module.rms, module.zero_centered)
    rms = type(module) is te.te.pytorch.RMSNorm
    bias = None if rms else module.bias
    return LeanNorm(module.weight, bias, module.eps, rms, module.zero_centered_gamma, wide_gain=True)


def norm_before(norm: Any, linear: Any) -> LeanNorm:
    """The norm in front of a linear layer: a module of its own, or a part of Transformer Engine's fused one."""
    if not _is_absent(norm):
        return read_norm(norm)
    return LeanNorm(
        linear.layer_norm_weight,
        linear.layer_norm_bias,
        linear.eps,
        linear.normalization == "RMSNorm",
        linear.zero_centered_gamma,
        wide_gain=True,
    )


def head_norms(attention: SelfAttention) -> list[LeanNorm] | None:
    """The norms of queries and keys, if there are such."""
    if _is_absent(attention.q_layernorm):
        return None
    return [read_norm(norm) for norm in (attention.q_layernorm, attention.k_layernorm)]


def bias_of(linear: Any) -> Tensor | None:
    """A linear layer's bias. Transformer Engine has an empty tensor in place of none."""
    return linear.bias if linear.bias is not None and linear.bias.numel() else None


def _is_absent(norm: Any) -> bool:
    return norm is None or isinstance(norm, IdentityOp)


def _is_row_linear(linear: Any) -> bool:
    return type(linear) is RowParallelLinear or (
        type(linear) is te.TERowParallelLinear and not _is_fp8(linear)
    )


def _is_te_norm(module: Any) -> bool:
    return te.HAVE_TE and type(module) in (te.te.pytorch.LayerNorm, te.te.pytorch.RMSNorm)


def _is_fp8(linear: Any) -> bool:
    """Whether a module of Transformer Engine has weights in FP8, or computes with them in its model's forward."""
    return linear.primary_weights_in_fp8 or linear.config.fp8 is not None
