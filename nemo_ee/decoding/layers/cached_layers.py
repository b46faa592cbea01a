# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Transformer layers with a KV cache, on packed tokens of several sequences at different positions.

Suffixes: T packed tokens, H hidden size, G query groups and R queries per group of this tensor-parallel rank,
D head size.
"""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from nemo_ee.decoding.layers.cached_attention import CachedAttention
from nemo_ee.decoding.layers.lean_layer import LayerMathematics
from nemo_ee.decoding.layers.packed_tokens import PackedTokens


class CachedLayer:
    """A transformer layer together with the keys and values of the tokens that went through it.

    Args:
        layer: the modules, for their shapes; sequence parallelism must be off.
        mathematics: what it computes around attention.
        rows: sequences that fit.
        max_length: positions.
        dtype: of keys and values.
        device: where they are.
        attention: reads the keys.

    Raises:
        NotImplementedError: for attention that a plain KV cache cannot express.
    """

    def __init__(
        self,
        layer: TransformerLayer,
        mathematics: LayerMathematics,
        rows: int,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device,
        attention: CachedAttention,
    ):
        check_attention(layer.config)
        modules = layer.self_attention
        self.mathematics, self._attention = mathematics, attention
        self.groups = modules.num_query_groups_per_partition
        self.scale = layer.config.softmax_scale
        self.interleaved = layer.config.rotary_interleaved
        no_rope = getattr(layer.config, "no_rope_freq", None)
        self.rotary = not (no_rope and no_rope[layer.layer_number - 1])
        self.cache = attention.empty_cache(
            rows, self.groups, max_length, modules.hidden_size_per_attention_head, dtype, device
        )

    def move(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` keys and values of one row to another."""
        self.cache[:, target, :, :length] = self.cache[:, source, :, :length]

    def __call__(self, x: Tensor, packed: PackedTokens) -> Tensor:
        """Writes the tokens' keys and values and returns the layer's output, [T, H] -> [T, H].

        With torch's operations; see `Segment`. Collectives: two all-reduces of [T, H] where TP > 1.
        """
        query = self._project(x, packed)
        return self.mathematics.finish(x, self._attention(query, self.cache, packed, self.scale))

    def fill(self, x: Tensor, packed: PackedTokens) -> None:
        """Writes the tokens' keys and values as if [T, H] were the layer's input."""
        self._project(x, packed)

    def _project(self, x: Tensor, packed: PackedTokens) -> Tensor:
        """Queries [T, G, R, D]; keys and values go into the cache."""
        qkv = self.mathematics.project(x)
        if self.rotary:
            qkv = packed.rotate(qkv, self.interleaved)
        new = qkv[:, :, -2:]  # [T, G, 2, D]
        if packed.single:
            self.cache[:, packed.rows[0], :, packed.starts[0] : packed.length] = new.permute(2, 1, 0, 3)
        else:
            self.cache[:, packed.token_rows, :, packed.positions] = new.transpose(1, 2)
        return qkv[:, :, :-2]


def check_attention(config: TransformerConfig) -> None:
    """Raises NotImplementedError for attention that a plain KV cache cannot express."""
    if config.multi_latent_attention:
        raise NotImplementedError(
            "multi_latent_attention: decoding with exits needs plain or grouped-query attention"
        )
    if getattr(config, "window_size", None) is not None:
        raise NotImplementedError(
            f"window_size={config.window_size}: decoding with exits needs full attention"
        )
