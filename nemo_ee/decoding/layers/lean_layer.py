# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What a transformer layer computes around attention, from its weights alone or through its modules.

Suffixes: T tokens, H hidden size, G query groups and R queries per group of this tensor-parallel rank,
D head size.
"""

from functools import cached_property
from typing import Any, Protocol

import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.nn.functional import gelu, relu, silu

from nemo_ee.decoding.cpu.cpu_kernels import kernel_norm
from nemo_ee.decoding.cpu.kernels.layer import Layer
from nemo_ee.decoding.cpu.kernels.mlp import GELU, RELU, SILU, TANH_GELU
from nemo_ee.decoding.cpu.lean_weights import LeanNorm, lean_linear, sum_over_ranks
from nemo_ee.decoding.layers.lean_modules import bias_of, head_norms, is_lean, norm_before
from nemo_ee.modeling.activations import tanh_gelu


class LayerMathematics(Protocol):
    """A layer in two halves, before and after attention."""

    def project(self, x: Tensor) -> Tensor:
        """Queries, keys and values: [T, H] -> [T, G, R + 2, D], each group's queries, its key, its value."""

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """The layer's output [T, H] from its input [T, H] and attention's output [T, G x R x D]."""

    @property
    def kernels(self) -> list[tuple[int, Layer]]:
        """The whole layer as our CPU kernels take it, for passes of at most so many tokens, ascending."""

    @property
    def bytes(self) -> int:
        """Of weights that a pass reads."""


class LeanMLP:
    """An MLP, gated or not.

    Args:
        mlp: megatron-core's, of modules that `is_lean_mlp` knows; a norm in front is not part of it.
        dtype: to compute in.
        weights: see `WEIGHT_KINDS`.
    """

    def __init__(self, mlp: MLP, dtype: torch.dtype, weights: str):
        config, up, down = mlp.config, mlp.linear_fc1, mlp.linear_fc2
        self.world = config.tensor_model_parallel_size
        self.up = lean_linear(up.weight, bias_of(up), dtype, weights)
        self.bias = bias_of(down) if self.world > 1 else None
        self.down = lean_linear(down.weight, None if self.world > 1 else bias_of(down), dtype, weights)
        self.gated, self.activation = config.gated_linear_unit, config.activation_func
        if config.bias_activation_fusion and self.activation is gelu:
            self.activation = tanh_gelu  # what the fused kernel computes

    @property
    def has_kernels(self) -> bool:
        """Whether our CPU kernels compute it whole; not with tensor parallelism, whose sums are torch's."""
        return self.world == 1 and self.activation in ACTIVATIONS and bool(self.up.kernels)

    def inside(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, F/TP], what the second matrix reads."""
        x = self.up(x)
        if not self.gated:
            return self.activation(x)
        gate, value = x.chunk(2, dim=-1)
        return self.activation(gate) * value

    def onto(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + MLP(x), [T, H]. Collectives: an all-reduce of [T, H] where TP > 1."""
        return add_down(self.down, self.bias, residual, self.inside(x), self.world)


class LeanLayer:
    """A layer as functions of its weights, which are not copied if they have the dtype.

    Args:
        layer: of modules that we know, see `is_lean`.
        dtype: to compute in.
        weights: see `WEIGHT_KINDS`.
    """

    def __init__(self, layer: TransformerLayer, dtype: torch.dtype, weights: str = "native"):
        attention, config = layer.self_attention, layer.config
        self.dtype, self.world = dtype, config.tensor_model_parallel_size
        self.groups = attention.num_query_groups_per_partition
        self.head_size = attention.hidden_size_per_attention_head
        qkv, out = attention.linear_qkv, attention.linear_proj
        self.norm = norm_before(layer.input_layernorm, qkv)
        self.qkv = lean_linear(qkv.weight, bias_of(qkv), dtype, weights)
        self.bias = bias_of(out) if self.world > 1 else None
        self.out = lean_linear(out.weight, None if self.world > 1 else bias_of(out), dtype, weights)
        self.mlp_norm = norm_before(layer.pre_mlp_layernorm, layer.mlp.linear_fc1)
        self.mlp = LeanMLP(layer.mlp, dtype, weights)
        self.head_norms = head_norms(attention)
        self.scale = config.softmax_scale or self.head_size**-0.5
        self.interleaved = config.rotary_interleaved

    def project(self, x: Tensor) -> Tensor:
        """See `LayerMathematics`."""
        qkv = self.qkv(normed(self.norm, x, self.dtype)).view(len(x), self.groups, -1, self.head_size)
        if self.head_norms is not None:
            query, key, value = qkv.split([qkv.shape[2] - 2, 1, 1], dim=2)
            qkv = torch.cat([self.head_norms[0](query), self.head_norms[1](key), value], dim=2)
        return qkv

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """See `LayerMathematics`. Collectives: two all-reduces of [T, H] where TP > 1."""
        x = add_down(self.out, self.bias, x, attended, self.world)
        return self.mlp.onto(x, normed(self.mlp_norm, x, self.dtype))

    @cached_property
    def kernels(self) -> list[tuple[int, Layer]]:
        """See `LayerMathematics`."""
        linears = (self.qkv, self.out, self.mlp.up, self.mlp.down)
        if not self.mlp.has_kernels:
            return []
        query_norm, key_norm = self.head_norms or (None, None)
        norms = [kernel_norm(n, self.dtype) for n in (self.norm, query_norm, key_norm, self.mlp_norm)]
        kernels = []
        for (limit, qkv), (_, out), (_, up), (_, down) in zip(
            *(each.kernels for each in linears), strict=True
        ):
            activation = ACTIVATIONS[self.mlp.activation]
            attention = (norms[0], qkv, norms[1], norms[2], self.scale, self.interleaved, out)
            kernels.append((limit, Layer(*attention, norms[3], up, down, self.mlp.gated, activation)))
        return kernels

    @property
    def bytes(self) -> int:
        """See `LayerMathematics`."""
        return sum(part.bytes for part in (self.qkv, self.out, self.mlp.up, self.mlp.down))


class ModuleLayer:
    """A layer through its own modules, whatever they are: slower.

    Args:
        layer: sequence parallelism must be off.
    """

    def __init__(self, layer: TransformerLayer):
        self.layer = layer
        self.groups = layer.self_attention.num_query_groups_per_partition

    def project(self, x: Tensor) -> Tensor:
        """See `LayerMathematics`."""
        layer = self.layer
        query, key, value = layer.self_attention.get_query_key_value_tensors(
            layer.input_layernorm(x[:, None])
        )
        parts = (
            query.view(len(x), self.groups, -1, query.shape[-1]),
            key[:, 0, :, None],
            value[:, 0, :, None],
        )
        return torch.cat(parts, dim=2)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """See `LayerMathematics`. Collectives: those of the modules."""
        layer, x = self.layer, x[:, None]
        out, bias = layer.self_attention.linear_proj(attended[:, None])
        x = x + (out if bias is None else out + bias)
        out, bias = layer.mlp(layer.pre_mlp_layernorm(x))
        return (x + (out if bias is None else out + bias))[:, 0]

    @property
    def kernels(self) -> list[tuple[int, Layer]]:
        """See `LayerMathematics`: none."""
        return []

    @property
    def bytes(self) -> int:
        """See `LayerMathematics`."""
        return sum(parameter.nbytes for parameter in self.layer.parameters())


def layer_mathematics(layer: TransformerLayer, dtype: torch.dtype, weights: str) -> LayerMathematics:
    """The layer's weights as functions where we know its modules, else the modules themselves.

    Raises:
        NotImplementedError: other than native weights for modules that we do not know.
    """
    if is_lean(layer):
        return LeanLayer(layer, dtype, weights)
    if weights != "native":
        raise NotImplementedError(
            f"weights={weights}: some layer has modules whose weights decoding does not read (FP8, experts, …); "
            "use native weights"
        )
    return ModuleLayer(layer)


def normed(norm: LeanNorm, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The norm in the input's dtype, then in the one to compute in."""
    x = norm(x)
    return x if x.dtype == dtype else x.to(dtype)


def add_down(down: Any, bias: Tensor | None, residual: Tensor, x: Tensor, world: int) -> Tensor:
    """residual + the sum over tensor-parallel ranks of x W^T + bias. Collectives: see `sum_over_ranks`."""
    if world == 1:
        return down.onto(residual, x)
    out = sum_over_ranks(down(x), world)
    return residual + (out if bias is None else out + bias)


ACTIVATIONS = {silu: SILU, gelu: GELU, tanh_gelu: TANH_GELU, relu: RELU}
"""That our CPU kernels know."""
