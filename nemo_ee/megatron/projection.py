# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Output projections of exits, sharded over the vocabulary: tied, untied, or a shortlist with a bucket."""

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_sharded_tensor_for_checkpoint, make_tp_sharded_tensor_for_checkpoint
from torch import Tensor

from nemo_ee.config import HeadConfig

BUCKET = -1
"""The token id that stands for "any token not on the shortlist"; it is never emitted."""
PADDING = -2
"""The token id of rows that exist only so that the rows divide among tensor-parallel ranks."""


class ExitProjection(MegatronModule):
    """From an exit's state [..., H] to logits over its rows; this rank holds rows/TP of them.

    Rows are tokens: all of the (padded) vocabulary in order, or for a shortlist the kept tokens in ascending
    order, then one bucket for all others, then padding.

    Args:
        config: configuration of the exits (its `params_dtype` is that of the weights).
        head: the exits' modules.
        vocab_size: V, the tokenizer's vocabulary; rows beyond it never count.
        padded_vocab_size: V padded to a multiple of TP.

    Attributes:
        weight: [rows/TP, H], or None when tied: then pass the backbone's output weight.
        bias: [rows/TP], only for a shortlist, else None.
        token_ids: [k] the kept tokens in ascending order (a buffer in checkpoints), only for a shortlist.
    """

    def __init__(self, config: TransformerConfig, head: HeadConfig, vocab_size: int, padded_vocab_size: int):
        super().__init__(config=config)
        self.kind, self.vocab_size = head.projection, vocab_size
        self.trainable = head.train_projection
        world = parallel_state.get_tensor_model_parallel_world_size()
        kept = head.shortlist_size if self.kind == "shortlist" else padded_vocab_size
        self.num_rows = -(-(kept + 1) // world) * world if self.kind == "shortlist" else padded_vocab_size
        self.rows_per_rank = self.num_rows // world
        self.first_row = parallel_state.get_tensor_model_parallel_rank() * self.rows_per_rank
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)
        self.register_buffer("token_ids", None)
        if self.kind != "tied":
            self.weight = self._parameter(self.rows_per_rank, config.hidden_size)
        if self.kind == "shortlist":
            self.bias = self._parameter(self.rows_per_rank)
            self.set_shortlist(torch.arange(kept))

    def _parameter(self, *shape: int) -> torch.nn.Parameter:
        data = torch.zeros(shape, dtype=self.config.params_dtype, device=_device(self.config))
        parameter = torch.nn.Parameter(data, requires_grad=self.trainable)
        parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, 0, 1
        return parameter

    def set_shortlist(self, token_ids: Tensor) -> None:
        """Sets the kept tokens: [k] distinct ids within 0..V-1, in any order."""
        ids = token_ids.to(dtype=torch.long, device=_device(self.config)).sort().values
        self.token_ids = ids
        self._refresh()

    def _refresh(self) -> None:
        """Derives the lookups between rows and tokens from `token_ids`."""
        kept = len(self.token_ids)
        row_tokens = self.token_ids.new_full((self.num_rows,), PADDING)
        row_tokens[:kept], row_tokens[kept] = self.token_ids, BUCKET
        self.row_tokens = row_tokens
        self.token_rows = self.token_ids.new_full((self.vocab_size,), kept)
        self.token_rows[self.token_ids] = torch.arange(kept, device=self.token_ids.device)

    def load_state_dict(self, *args: object, **kwargs: object) -> object:
        """As torch's; derives the lookups anew."""
        result = super().load_state_dict(*args, **kwargs)
        if self.kind == "shortlist":
            self._refresh()
        return result

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.kind == "shortlist":
            self._refresh()

    @property
    def num_kept(self) -> int:
        """Rows that stand for a token of their own."""
        return len(self.token_ids) if self.kind == "shortlist" else self.vocab_size

    def rows_of(self, tokens: Tensor) -> Tensor:
        """Rows of token ids (any shape); tokens off the shortlist have the bucket's row."""
        return self.token_rows[tokens] if self.kind == "shortlist" else tokens

    def tokens_of(self, rows: Tensor) -> Tensor:
        """Token ids of rows (any shape); `BUCKET` for the bucket."""
        return self.row_tokens[rows] if self.kind == "shortlist" else rows

    def valid_rows(self) -> int:
        """How many of this rank's rows count (padding comes last)."""
        valid = self.num_kept + (self.kind == "shortlist")
        return max(0, min(self.rows_per_rank, valid - self.first_row))

    def emittable_rows(self) -> int:
        """How many of this rank's rows stand for a token of their own."""
        return max(0, min(self.rows_per_rank, self.num_kept - self.first_row))

    def local_logits(self, state: Tensor, tied_weight: Tensor | None = None) -> Tensor:
        """Logits of this rank's rows, before any collective: [..., H] -> [..., rows/TP]."""
        weight = tied_weight if self.weight is None else self.weight
        bias = None if self.bias is None else self.bias.to(state.dtype)
        return torch.nn.functional.linear(state, weight.to(state.dtype), bias)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Rows shard over TP; their padded number may differ between the saving and the loading layout."""
        state = {}
        for name in ("weight", "bias"):
            if getattr(self, name) is not None:
                key = f"{prefix}{name}"
                state[key] = make_tp_sharded_tensor_for_checkpoint(
                    getattr(self, name).data, key, prepend_offsets=sharded_offsets, allow_shape_mismatch=True
                )
        if self.token_ids is not None:
            key = f"{prefix}token_ids"
            replica = (0, parallel_state.get_tensor_model_parallel_rank(), _data_parallel_rank())
            state[key] = make_sharded_tensor_for_checkpoint(
                self.token_ids, key, prepend_offsets=sharded_offsets, replica_id=replica
            )
        return state


def _data_parallel_rank() -> int:
    return parallel_state.get_data_parallel_rank(with_context_parallel=True)


def _device(config: TransformerConfig) -> torch.device:
    on_cpu = config.use_cpu_initialization or not torch.cuda.is_available()
    return torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
