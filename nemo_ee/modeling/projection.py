# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Output projections of exits, sharded over the vocabulary: tied, untied, or a shortlist with a bucket."""

from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor

from nemo_ee.head_config import HeadConfig
from nemo_ee.modeling.replicated import replicated

BUCKET = -1
"""The token id that stands for "any token not on the shortlist"; it is never emitted."""
PADDING = -2
"""The token id of rows that exist only so that the rows divide among tensor-parallel ranks."""
WIDENED_BYTES = 2**25
"""Rows whose states are of a wider dtype are widened so many bytes at a time."""


@dataclass(frozen=True)
class ProjectionWeights:
    """What a call of `ExitProjection` gives to multiply states with.

    Attributes:
        rows: [rows/TP, H].
        bucket_weight: [H], only for a shortlist, else None.
        bucket_bias: [1], likewise.
    """

    rows: Tensor
    bucket_weight: Tensor | None = None
    bucket_bias: Tensor | None = None


class ExitProjection(MegatronModule):
    """From an exit's state [..., H] to logits over its rows, sharded over the tensor-parallel group.

    Rows are tokens: all of the (padded) vocabulary in order, or for a shortlist the kept tokens in ascending
    order, then padding, then one bucket for all other tokens. Every rank holds `rows_per_rank` rows of the
    weight; the bucket is one more column of logits on the last rank, with a weight and a bias of its own that
    are always trainable and whole on every rank.

    Args:
        config: configuration of the exits (its `params_dtype` is that of the weights).
        head: the exits' modules.
        vocab_size: V, the tokenizer's vocabulary; rows beyond it never count.
        padded_vocab_size: V padded to a multiple of TP.

    Attributes:
        weight: [rows/TP, H], or None when tied: then pass the backbone's output weight.
        bucket_weight: [H], only for a shortlist, else None.
        bucket_bias: [1], likewise.
        token_ids: [k] the kept tokens in ascending order (a buffer in checkpoints), only for a shortlist.
    """

    def __init__(self, config: TransformerConfig, head: HeadConfig, vocab_size: int, padded_vocab_size: int):
        super().__init__(config=config)
        self.kind, self.vocab_size = head.projection, vocab_size
        world = parallel_state.get_tensor_model_parallel_world_size()
        rank = parallel_state.get_tensor_model_parallel_rank()
        kept = head.shortlist_size if self.kind == "shortlist" else padded_vocab_size
        self.num_rows = -(-kept // world) * world
        self.rows_per_rank = self.num_rows // world
        self.first_row = rank * self.rows_per_rank
        self.holds_bucket = self.kind == "shortlist" and rank == world - 1
        for name in ("weight", "bucket_weight", "bucket_bias"):
            self.register_parameter(name, None)
        self.register_buffer("token_ids", None)
        for name in ("row_tokens", "token_rows"):  # derived from token_ids; they move with the module
            self.register_buffer(name, None, persistent=False)
        if self.kind != "tied":
            self.weight = self._parameter((self.rows_per_rank, config.hidden_size), head.train_projection)
            self.weight.tensor_model_parallel = True
            self.weight.partition_dim, self.weight.partition_stride = 0, 1
        if self.kind == "shortlist":
            self.bucket_weight = self._parameter((config.hidden_size,), True)
            self.bucket_bias = self._parameter((1,), True)
            self.set_shortlist(torch.arange(kept))

    def _parameter(self, shape: tuple[int, ...], trainable: bool) -> torch.nn.Parameter:
        data = torch.zeros(shape, dtype=self.config.params_dtype, device=_device(self.config))
        return torch.nn.Parameter(data, requires_grad=trainable)

    @property
    def columns(self) -> int:
        """Columns of this rank's logits: its rows, and the bucket on the last rank."""
        return self.rows_per_rank + self.holds_bucket

    def set_shortlist(self, token_ids: Tensor) -> None:
        """Sets the kept tokens: [k] distinct ids within 0..V-1, in any order."""
        ids = token_ids.to(dtype=torch.long, device=self.bucket_weight.device).sort().values
        self.token_ids = ids
        self._refresh()

    def _refresh(self) -> None:
        """Derives the lookups between rows and tokens from `token_ids`."""
        kept = len(self.token_ids)
        row_tokens = self.token_ids.new_full((self.num_rows + 1,), PADDING)
        row_tokens[:kept], row_tokens[-1] = self.token_ids, BUCKET
        self.row_tokens = row_tokens
        self.token_rows = self.token_ids.new_full((self.vocab_size,), self.num_rows)
        self.token_rows[self.token_ids] = torch.arange(kept, device=self.token_ids.device)

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

    def emittable_rows(self) -> int:
        """How many of this rank's rows stand for a token of their own."""
        return max(0, min(self.rows_per_rank, self.num_kept - self.first_row))

    def forward(
        self, tied_weight: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> ProjectionWeights:
        """The weights, for all tokens of one micro-batch.

        Who reads them calls the module: where parameters are gathered over data parallelism while the model
        computes, Megatron waits for a module's own when that module is called.

        Args:
            tied_weight: the backbone's output weight [Vp/TP, H], if this projection is tied.
            dtype: to cast to, once; None leaves the weights as they are.
        """
        rows = tied_weight if self.weight is None else self.weight
        weights = (rows, self.bucket_weight, self.bucket_bias)
        return ProjectionWeights(*(w if w is None or dtype is None else w.to(dtype) for w in weights))

    def logits(self, state: Tensor, weights: ProjectionWeights) -> Tensor:
        """This rank's logits before any collective, padding at -inf: [..., H] -> [..., columns].

        Weights of another dtype than the state's are cast some rows at a time.
        """
        if weights.rows.dtype == state.dtype:
            logits = torch.nn.functional.linear(state, weights.rows)
        else:
            logits = state.new_empty(*state.shape[:-1], self.rows_per_rank)
            count = max(1, WIDENED_BYTES // (state.shape[-1] * state.element_size()))
            for first in range(0, self.rows_per_rank, count):
                rows = weights.rows[first : first + count].to(state.dtype)
                logits[..., first : first + count] = torch.nn.functional.linear(state, rows)
        logits[..., self.emittable_rows() :] = float("-inf")
        if not self.holds_bucket:
            return logits
        bucket = state @ weights.bucket_weight.to(state.dtype) + weights.bucket_bias.to(state.dtype)
        return torch.cat([logits, bucket[..., None]], dim=-1)

    def local_logits(self, state: Tensor, tied_weight: Tensor | None = None) -> Tensor:
        """`logits` of a single call."""
        return self.logits(state, self(tied_weight))

    def held(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Columns [C] of the rows [C] on this rank, and which of them it holds; others have some column.

        No indices of those that it holds: to count them, a GPU would have to be waited for.
        """
        columns = rows - self.first_row
        return columns.clamp(0, self.columns - 1), (columns >= 0) & (columns < self.columns)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Rows shard over TP; their padded number may differ between the saving and the loading layout."""
        state = {}
        if self.weight is not None:
            key = f"{prefix}weight"
            state[key] = make_tp_sharded_tensor_for_checkpoint(
                self.weight, key, prepend_offsets=sharded_offsets, allow_shape_mismatch=True
            )
        for name in ("bucket_weight", "bucket_bias", "token_ids"):
            tensor = getattr(self, name)
            if tensor is not None:
                state[f"{prefix}{name}"] = replicated(tensor, f"{prefix}{name}", sharded_offsets)
        return state


def _device(config: TransformerConfig) -> torch.device:
    on_cpu = config.use_cpu_initialization or not torch.cuda.is_available()
    return torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
