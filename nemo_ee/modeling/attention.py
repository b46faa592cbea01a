# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Core attention by torch's scaled_dot_product_attention, for machines without Transformer Engine."""

from contextlib import AbstractContextManager, nullcontext

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class TorchAttention(MegatronModule):
    """Causal, padded, grouped-query and KV-cached attention; the heads of this tensor-parallel rank only.

    Args:
        config: backbone configuration.
        layer_number: 1-based; unused: scaling by layer (`apply_query_key_layer_scaling`) cancels out.
        attn_mask_type: what the layer's mask means when a call does not say.
        softmax_scale: default 1/sqrt(head size).

    Raises:
        NotImplementedError: for context parallelism and sliding windows, which need Transformer Engine.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str = "self",
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **_: object,
    ):
        super().__init__(config=config)
        if config.context_parallel_size > 1:
            raise NotImplementedError(
                f"context_parallel_size={config.context_parallel_size}: torch attention needs whole "
                "sequences; install Transformer Engine or set it to 1"
            )
        if config.window_size is not None:
            raise NotImplementedError(
                f"window_size={config.window_size}: torch attention sees the whole sequence; install "
                "Transformer Engine, or set it to null where no sequence exceeds the window"
            )
        self.attn_mask_type = attn_mask_type
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attends.

        Args:
            query: [Sq, B, heads, D].
            key: [Sk, B, groups, D]; with a KV cache Sk > Sq and the queries are the last Sq positions.
            value: as `key`.
            attention_mask: bool, broadcastable to [B, heads, Sq, Sk]; True hides.
            attn_mask_type: overrides the layer's; `no_mask` sees everything (a single cached query).

        Returns:
            [Sq, B, heads * D].

        Raises:
            NotImplementedError: for packed sequences and attention biases, which need Transformer Engine.
        """
        if packed_seq_params is not None or attention_bias is not None:
            raise NotImplementedError("packed sequences and attention biases need Transformer Engine")
        mask_type = self.attn_mask_type if attn_mask_type is None else attn_mask_type
        causal = mask_type in (AttnMaskType.causal, AttnMaskType.padding_causal)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        visible = visible_positions(q.shape[2], k.shape[2], causal, attention_mask, q.device)
        with self._random_numbers_of_own():
            out = torch.nn.functional.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=visible,
                is_causal=causal and visible is None and q.shape[2] > 1,
                dropout_p=self.dropout if self.training else 0.0,
                scale=self.scale,
                enable_gqa=k.shape[1] != q.shape[1],
            )
        return out.permute(2, 0, 1, 3).reshape(q.shape[2], q.shape[0], -1)

    def _random_numbers_of_own(self) -> AbstractContextManager:
        """Other heads, other dropout: tensor-parallel ranks share the default random numbers.

        With sequence parallelism megatron-core's transformer block has forked already.
        """
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        if not (self.training and self.dropout and ranks > 1) or self.config.sequence_parallel:
            return nullcontext()
        return get_cuda_rng_tracker().fork()


def visible_positions(
    queries: int, keys: int, causal: bool, hidden: Tensor | None, device: torch.device
) -> Tensor | None:
    """The boolean mask (True is visible) for SDPA, or None where its causal flag or no mask will do."""
    if hidden is None and (not causal or queries in (1, keys)):
        return None
    visible = None if hidden is None else ~hidden
    if causal:
        lower = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
        visible = lower if visible is None else visible & lower
    return visible
