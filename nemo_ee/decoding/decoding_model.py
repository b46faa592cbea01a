# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A model as decoding reads it: functions of its weights, taken once and shared by any number of decoders."""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from torch import Tensor

from nemo_ee.decoding.cpu.cpu_kernels import KERNEL_TOKENS, run_head, runs_kernels
from nemo_ee.decoding.cpu.lean_weights import HEAD_KIND
from nemo_ee.decoding.cuda.flash_attention import MASKED, chosen_attention
from nemo_ee.decoding.layers.cached_attention import CachedAttention
from nemo_ee.decoding.layers.cached_layers import CachedLayer
from nemo_ee.decoding.layers.lean_head import LeanHead, LeanOutput, Readout, SearchedOutput
from nemo_ee.decoding.layers.lean_layer import layer_mathematics
from nemo_ee.decoding.layers.packed_tokens import PackedTokens, PositionTable
from nemo_ee.decoding.layers.segment import Segment
from nemo_ee.decoding.pass_prices import PassPrices
from nemo_ee.decoding.policy.exit_policy import Shares
from nemo_ee.modeling.gpt import EarlyExitGPTModel

_COMPILED: set[tuple] = set()


class DecodingModel:
    """The layers, heads and output of a model on one pipeline stage or of one stage of several.

    Weights of another dtype than the computation's, and 8-bit ones, are copies made here; a model that is
    trained further needs a new one. Build it under `generating`, which sets autocast.

    Args:
        gpt: in eval mode, sequence parallelism off.
        weights: see `nemo_ee.decoding.cpu.lean_weights.WEIGHT_KINDS`.
        eight_bit_heads: exits are asked, and draft, with 8-bit copies of their weights as they are (but for blocks)
            where our CPU kernels compute, whatever `weights`; worth making for more than one call.
        output_layer: see `nemo_ee.decoding.cpu.output_search.OUTPUT_LAYERS`; a search has an 8-bit copy of the layer.

    Attributes:
        weights: as given.
        output_kind: `output_layer` as given.
        captured: caches and captured passes that its decoders may borrow; None where all passes run eagerly.
        prices: of its passes, as measured; None where nobody has.
        drafts: per confidence rule, what exits' greedy drafts came to so far, see `ExitPolicy`.
        layers: global 1-based layer number -> mathematics, ascending.
        heads: exit layer -> head, all of this stage.
        output: the final exit; None on stages before the last.
        greedy_output: the final exit for passes of which only the most probable tokens are asked; `output` itself
            where there is no search.
        embedding_rows: [Vp, H] what a token alone is embedded as; None where its position or a module has a say.
        dtype: of the backbone's computation.
        device: of its weights.
        hidden: [0, H], an empty example of a hidden state.
        attention: on cached keys, of all layers and blocks.
        refused_attention: why it is not another.
    """

    def __init__(
        self,
        gpt: EarlyExitGPTModel,
        weights: str = "native",
        eight_bit_heads: bool = False,
        output_layer: str = "full",
    ):
        self.gpt, self.weights, self.output_kind = gpt, weights, output_layer
        self.captured: Any = (
            None  # a `nemo_ee.decoding.cuda.captured_decoding.CapturedDecoding`, of an outer ring
        )
        self.prices: PassPrices | None = None
        self.drafts: dict[str, Shares] = {}
        some = gpt.decoder.layers[0].self_attention.linear_proj.weight
        self.device, self.dtype = some.device, compute_dtype(some)
        self.layers = {
            layer.layer_number: layer_mathematics(layer, self.dtype, weights) for layer in gpt.decoder.layers
        }
        self.heads: dict[int, LeanHead] = {}
        self.blocks = {}
        for n in gpt.exit_layers:
            self.heads[n] = read_head(gpt, n, weights, eight_bit_heads)
            block = gpt.exits[str(n)].block
            if block is not None:
                self.blocks[n] = layer_mathematics(block, self.heads[n].dtype, weights)
        self.output = LeanOutput(gpt, self.dtype, weights) if gpt.post_process else None
        self.greedy_output: LeanOutput | SearchedOutput | None = self.output
        if output_layer == "exact8" and self.output is not None and self.output.can_be_searched:
            self.greedy_output = SearchedOutput(self.output)
        self.final_layer = gpt.config.num_layers
        self.hidden = torch.empty(0, gpt.config.hidden_size, dtype=self._hidden_dtype(), device=self.device)
        self.attention, self.refused_attention = self._choose_attention()
        self._compile_kernels()
        self.embedding_rows: Tensor | None = None
        plain = parallel_state.get_tensor_model_parallel_world_size() == 1
        wide = gpt.config.fp32_residual_connection
        # NeMo makes a subclass of embeddings that it scales.
        known = gpt.pre_process and type(gpt.embedding) is LanguageModelEmbedding
        if known and plain and not wide and not gpt.embedding.add_position_embedding:
            self.embedding_rows = gpt.embedding.word_embeddings.weight.detach()

    @property
    def is_whole(self) -> bool:
        """Whether all layers are here: on one pipeline stage."""
        return bool(self.gpt.pre_process and self.gpt.post_process)

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """[T] token ids and positions -> [T, H]. Collectives: an all-reduce of [T, H] where TP > 1."""
        if self.embedding_rows is not None:
            return self.embedding_rows[tokens]
        return self.gpt.embedding(input_ids=tokens[None], position_ids=positions[None])[:, 0]

    def table(self, max_length: int) -> PositionTable:
        """Positions for decoders of that length."""
        return PositionTable.of(self.gpt, max_length, self.dtype, self.device)

    def cached_layers(self, rows: int, max_length: int) -> dict[int, CachedLayer]:
        """The layers with caches of their own."""
        return {n: self._cached_layer(n, rows, max_length) for n in self.layers}

    def cached_block(self, n: int, rows: int, max_length: int) -> Segment | None:
        """The block of the exit on layer n with a cache of its own, if that exit has one."""
        if n not in self.blocks:
            return None
        block = self.gpt.exits[str(n)].block
        dtype = self.heads[n].dtype
        return Segment(
            [CachedLayer(block, self.blocks[n], rows, max_length, dtype, self.device, self.attention)]
        )

    def layer_bytes(self, n: int) -> int:
        """Of weights that a pass through layer n reads."""
        return self.layers[n].bytes

    def _choose_attention(self) -> tuple[CachedAttention, tuple[str, ...]]:
        if any(self.heads[n].dtype != self.dtype for n in self.blocks):
            return MASKED, ()
        attention = self.gpt.decoder.layers[0].self_attention
        groups = attention.num_query_groups_per_partition
        repeats = attention.num_attention_heads_per_partition // groups
        size = attention.hidden_size_per_attention_head
        return chosen_attention(self.device, self.dtype, groups, repeats, size)

    def _cached_layer(self, n: int, rows: int, max_length: int) -> CachedLayer:
        module = self.gpt.decoder.layers[n - min(self.layers)]
        return CachedLayer(module, self.layers[n], rows, max_length, self.dtype, self.device, self.attention)

    def _compile_kernels(self) -> None:
        """Once per process, and before a request is waiting."""
        head_kinds = frozenset(type(head.projection) for head in self.heads.values())
        kind = self.weights, self.dtype, type(self.greedy_output), head_kinds
        if kind in _COMPILED or not runs_kernels(self.device, self.dtype):
            return
        layer = self._cached_layer(min(self.layers), 1, KERNEL_TOKENS)
        whole = layer.mathematics.kernels
        for limit, _ in whole:
            x = self.hidden.new_zeros(limit, self.hidden.shape[-1])
            Segment([layer])(x, PackedTokens(self.table(limit), [0], [0], [limit]))
        if self.output is not None:
            self._run_head_kernels(self.output)
            self.greedy_output.predict(self.hidden.new_zeros(1, self.hidden.shape[-1]))
            for limit, _ in [] if whole else self.output.kernels:  # layers take their products one by one
                self.output.projection(self.hidden.new_zeros(limit, self.hidden.shape[-1], dtype=self.dtype))
        for head in self.heads.values():
            self._run_head_kernels(head)
        _COMPILED.add(kind)

    def _run_head_kernels(self, readout: Readout) -> None:
        for limit, kernel in readout.kernels:
            x = self.hidden.new_zeros(limit, self.hidden.shape[-1], dtype=readout.dtype)
            run_head(kernel, readout.rows.emittable, x)

    def _hidden_dtype(self) -> torch.dtype:
        if self.gpt.config.fp32_residual_connection:
            return torch.float32
        weight = self.gpt.decoder.layers[0].self_attention.linear_proj.weight
        return weight.dtype


def read_head(gpt: EarlyExitGPTModel, layer: int, weights: str, in_eight_bits: bool) -> LeanHead:
    """An exit's head behind its block, for decoding.

    Args:
        gpt: a stage that has this exit.
        layer: the exit's.
        weights: see `nemo_ee.decoding.cpu.lean_weights.WEIGHT_KINDS`.
        in_eight_bits: where our CPU kernels compute, 8-bit copies of the weights as they are, whatever `weights`.
    """
    head, output_weight = gpt.exits[str(layer)], gpt.output_weight()
    assert output_weight is not None, "a stage with exits has an output weight or a copy of it"
    dtype = compute_dtype(next(head.parameters(), output_weight))
    kind = HEAD_KIND if in_eight_bits and runs_kernels(output_weight.device, dtype) else weights
    return LeanHead(head, output_weight, dtype, kind)


def asked_heads(gpt: EarlyExitGPTModel) -> dict[int, LeanHead]:
    """The exits whose heads prepared decoding reads in 8 bits, with these heads: on a CPU all, elsewhere none. By them
    text is scored, so that thresholds mean there what they mean in decoding."""
    heads = {n: read_head(gpt, n, "native", in_eight_bits=True) for n in gpt.exit_layers}
    return {n: head for n, head in heads.items() if head.in_eight_bits}


def compute_dtype(weight: Tensor) -> torch.dtype:
    """What a matrix product with this weight returns: autocast's dtype where autocast is on, else its own."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
