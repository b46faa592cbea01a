# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Transformer layers with a KV cache, on packed tokens of several sequences at different positions.

Suffixes: T packed tokens, N sequences in the pack, Q most tokens of one sequence in the pack, L keys looked
at, G query groups and R queries per group of this tensor-parallel rank, D head size.
"""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from nemo_ee.megatron.gpt import EarlyExitGPTModel


class PositionTable:
    """Positions 0..max_length-1 and their rotary factors, looked up by every pack of one decoder.

    Args:
        gpt: the model; its position embedding is rotary, learned or none.
        max_length: positions.
        dtype: of queries and keys.
        device: where they are.

    Raises:
        NotImplementedError: for position embeddings that need more than a position per token.
    """

    def __init__(self, gpt: EarlyExitGPTModel, max_length: int, dtype: torch.dtype, device: torch.device):
        self.positions = torch.arange(max_length, device=device)
        self.cos = self.sin = None
        kind = gpt.position_embedding_type
        if kind not in ("rope", "learned_absolute", "none"):
            raise NotImplementedError(
                f"position_embedding_type={kind}: decoding knows rope, learned_absolute and none"
            )
        if kind == "rope":
            # The module caches what it returns; a cached inference tensor would break the next training step.
            with torch.inference_mode(False), torch.no_grad():
                angles = gpt.rotary_pos_emb(max_length).to(device)
            self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)


class PackedTokens:
    """New tokens of N sequences, each sequence's contiguous, one after the other along the T axis.

    Args:
        table: shared positions.
        batch_size: sequences that the caches hold.
        sequences: the N sequences, ascending.
        starts: position of each sequence's first new token; its keys before that are in the cache.
        counts: new tokens per sequence, each at least 1.

    Attributes:
        positions: [T].
        last: [N] index within T of each sequence's last token, or a slice where that is a view.
        cos, sin: [T, 1, 1, rotary size], or None.
    """

    def __init__(
        self,
        table: PositionTable,
        batch_size: int,
        sequences: list[int],
        starts: list[int],
        counts: list[int],
    ):
        self.sequences, self.starts, self.counts = sequences, starts, counts
        self.whole_batch = len(sequences) == batch_size
        self.single = len(sequences) == 1
        self.width = max(counts)
        self.length = max(start + count for start, count in zip(starts, counts, strict=True))
        self.from_scratch = max(starts) == 0
        self._mask: tuple[int, Tensor | None] | None = None
        device = table.positions.device
        self.last: Tensor | slice
        if self.single:
            span: Tensor | slice = slice(starts[0], self.length)
            self.positions = table.positions[span]
            self.last = slice(self.width - 1, self.width)
        else:
            layout = torch.tensor([sequences, starts, counts], device=device)
            self.sequence_index = layout[0]
            ends = layout[2].cumsum(0)
            row = torch.repeat_interleave(layout[2], output_size=sum(counts))
            offset = table.positions.new_tensor(range(sum(counts))) - (ends - layout[2])[row]
            span = self.positions = layout[1][row] + offset
            self.token_sequences = layout[0][row]
            self.slots = row * self.width + offset
            self.last = slice(0, len(sequences)) if self.width == 1 else ends - 1
        self.cos = None if table.cos is None else table.cos[span]
        self.sin = None if table.sin is None else table.sin[span]

    def mask(self, repeats: int) -> Tensor | None:
        """[N, 1, R x Q, L], True where a key is visible; None if all are. R is `repeats`."""
        if self._mask is None or self._mask[0] != repeats:
            self._mask = repeats, self._build_mask(repeats)
        return self._mask[1]

    def _build_mask(self, repeats: int) -> Tensor | None:
        ends = [start + count for start, count in zip(self.starts, self.counts, strict=True)]
        if self.width == 1 and min(ends) == self.length:
            return None
        if self.single:
            query = self.positions[None]
        else:
            query = self.positions.new_zeros(len(self.sequences) * self.width)
            query[self.slots] = self.positions
            query = query.view(len(self.sequences), self.width)
        keys = torch.arange(self.length, device=query.device)
        return (keys <= query[:, :, None]).repeat(1, repeats, 1)[:, None]

    def pad(self, packed: Tensor) -> Tensor:
        """[T, ...] -> [N, Q, ...], zeros where a sequence has fewer tokens."""
        if self.single or self.width == 1:
            return packed.view(len(self.sequences), self.width, *packed.shape[1:])
        padded = packed.new_zeros(len(self.sequences) * self.width, *packed.shape[1:])
        padded[self.slots] = packed
        return padded.view(len(self.sequences), self.width, *packed.shape[1:])

    def unpad(self, padded: Tensor) -> Tensor:
        """[N, Q, ...] -> [T, ...], the inverse of `pad`."""
        flat = padded.reshape(-1, *padded.shape[2:])
        return flat if self.single or self.width == 1 else flat[self.slots]


class CachedLayer:
    """A transformer layer of the model together with the keys and values of the tokens that went through it.

    Args:
        layer: local or Transformer Engine modules; sequence parallelism must be off.
        batch_size: sequences.
        max_length: positions.
        dtype: of keys and values.
        device: where they are.

    Raises:
        NotImplementedError: for attention that a plain KV cache cannot express.
    """

    def __init__(
        self,
        layer: TransformerLayer,
        batch_size: int,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        check_attention(layer.config)
        attention = layer.self_attention
        self.layer = layer
        self.groups = attention.num_query_groups_per_partition
        self.repeats = attention.num_attention_heads_per_partition // self.groups
        no_rope = getattr(layer.config, "no_rope_freq", None)
        self.rotary = not (no_rope and no_rope[layer.layer_number - 1])
        shape = (batch_size, self.groups, max_length, attention.hidden_size_per_attention_head)
        # Zeros, not garbage: a masked key has weight 0, and 0 times a NaN is a NaN.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def keep(self, index: Tensor) -> None:
        """Keeps only some sequences, in that order."""
        self.keys, self.values = self.keys[index], self.values[index]

    def __call__(self, x: Tensor, packed: PackedTokens) -> Tensor:
        """Writes the tokens' keys and values and returns the layer's output, [T, 1, H] -> [T, 1, H].

        Collectives: those of the layer's own modules (two all-reduces of [T, 1, H] where TP > 1).
        """
        layer = self.layer
        query, key, value = layer.self_attention.get_query_key_value_tensors(layer.input_layernorm(x))
        if packed.cos is not None and self.rotary:
            query = rotate(query, packed, layer.config)
            key = rotate(key, packed, layer.config)
        self._write(key, value, packed)
        out, bias = layer.self_attention.linear_proj(self._attend(query, packed))
        x = x + (out if bias is None else out + bias)
        out, bias = layer.mlp(layer.pre_mlp_layernorm(x))
        return x + (out if bias is None else out + bias)

    def _write(self, key: Tensor, value: Tensor, packed: PackedTokens) -> None:
        if packed.single:
            sequence, span = packed.sequences[0], slice(packed.starts[0], packed.length)
            self.keys[sequence, :, span] = key[:, 0].transpose(0, 1)
            self.values[sequence, :, span] = value[:, 0].transpose(0, 1)
        else:
            self.keys[packed.token_sequences, :, packed.positions] = key[:, 0]
            self.values[packed.token_sequences, :, packed.positions] = value[:, 0]

    def _read(self, cache: Tensor, packed: PackedTokens) -> Tensor:
        """[N, G, L, D]: a view, but for a part of the batch."""
        if packed.whole_batch:
            return cache[:, :, : packed.length]
        if packed.single:
            return cache[packed.sequences[0] : packed.sequences[0] + 1, :, : packed.length]
        return cache[:, :, : packed.length][packed.sequence_index]

    def _attend(self, query: Tensor, packed: PackedTokens) -> Tensor:
        """[T, 1, heads, D] -> [T, 1, heads x D]."""
        keys, values = self._read(self.keys, packed), self._read(self.values, packed)
        scale = self.layer.config.softmax_scale
        q = packed.pad(query[:, 0])  # [N, Q, heads, D]
        sequences, width, heads, size = q.shape
        if packed.from_scratch and width > 1:
            # Padding comes after a sequence's own tokens, so none of these sees it.
            out = scaled_dot_product_attention(
                q.transpose(1, 2), keys, values, is_causal=True, scale=scale, enable_gqa=self.repeats > 1
            ).transpose(1, 2)
        else:
            # The heads that share keys become one longer query, so that no backend repeats the keys.
            q = q.view(sequences, width, self.groups, self.repeats, size).permute(0, 2, 3, 1, 4)
            q = q.reshape(sequences, self.groups, self.repeats * width, size)
            mask = packed.mask(self.repeats)
            out = scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale)
            out = out.view(sequences, self.groups, self.repeats, width, size).permute(0, 3, 1, 2, 4)
        return packed.unpad(out.reshape(sequences, width, heads * size))[:, None]


def rotate(x: Tensor, packed: PackedTokens, config: TransformerConfig) -> Tensor:
    """Rotary position embedding of [T, 1, heads, D], as megatron-core's `apply_rotary_pos_emb`."""
    size = packed.cos.shape[-1]
    turned, rest = x[..., :size], x[..., size:]
    if config.rotary_interleaved:
        half = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        half = torch.cat((-second, first), dim=-1)
    turned = turned * packed.cos + half * packed.sin
    return turned if not rest.shape[-1] else torch.cat((turned, rest), dim=-1)


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
