# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Next-token predictions from rows of logits sharded over the tensor-parallel group.

Suffixes: N tokens, R rows of this rank, V vocabulary, Vp vocabulary padded to a multiple of TP.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from megatron.core import parallel_state
from torch import Tensor

from nemo_ee.decoding.transfer import to_device
from nemo_ee.modeling.gpt import EarlyExitGPTModel
from nemo_ee.modeling.projection import ExitProjection
from nemo_ee.modeling.row_summary import RowSummary, summarise_rows
from nemo_ee.modeling.vocab_parallel import gather_columns


@dataclass(frozen=True)
class Rows:
    """What this rank's columns of logits stand for; columns after these rows hold a shortlist's bucket.

    Attributes:
        first: index of this rank's first row.
        count: rows on this rank, the same on all ranks.
        emittable: how many of them stand for a token of their own; the others are padding.
        tokens: [k] the tokens of the emittable rows of all ranks, ascending; None if row i is token i.
    """

    first: int
    count: int
    emittable: int
    tokens: Tensor | None = None

    def columns(self, tokens: Tensor, spare: int) -> Tensor:
        """Where the logits of some tokens [k] are on this rank; `spare` for tokens that have no row here."""
        row = tokens if self.tokens is None else torch.searchsorted(self.tokens, tokens)
        column, here = row - self.first, torch.ones_like(tokens, dtype=torch.bool)
        if self.tokens is not None:
            here = self.tokens[row.clamp_max(len(self.tokens) - 1)] == tokens
        return torch.where(here & (column >= 0) & (column < self.emittable), column, spare)

    @classmethod
    def of_exit(cls, projection: ExitProjection) -> "Rows":
        """The rows of an exit's projection."""
        tokens = projection.token_ids if projection.kind == "shortlist" else None
        return cls(projection.first_row, projection.rows_per_rank, projection.emittable_rows(), tokens)

    @classmethod
    def of_output_layer(cls, gpt: EarlyExitGPTModel) -> "Rows":
        """The rows of the final exit: the vocabulary in order."""
        count = len(gpt.output_weight())
        first = count * parallel_state.get_tensor_model_parallel_rank()
        return cls(first, count, max(0, min(count, gpt.true_vocab_size - first)))


@dataclass(frozen=True)
class Prediction:
    """What one exit says about N tokens; the same on all tensor-parallel ranks but for `logits`.

    Attributes:
        rows: what the logits stand for.
        source: `logits`, or what computes them if they are asked for.
        tokens: [N] the most probable emittable token.
        confidence: [N] its probability, in float32 or wider. By logits of 8-bit weights where it comes from a search,
            see `nemo_ee.decoding.layers.lean_head.SearchedOutput`: approximate, to be reported and no more.
        own_logits: the model's own, where `logits` are what a request makes of them; None where they are the same.
    """

    rows: Rows
    source: Tensor | Callable[[], Tensor]
    tokens: Tensor
    confidence: Tensor
    own_logits: Tensor | None = None

    @cached_property
    def logits(self) -> Tensor:
        """[N, R] of this rank, padding at -inf. To be asked for before the decoder's next pass."""
        return self.source if isinstance(self.source, Tensor) else self.source()

    @classmethod
    def from_logits(cls, logits: Tensor, rows: Rows) -> "Prediction":
        """Collectives: see `from_summary`."""
        return cls.from_summary(logits, summarise_rows(logits, rows.emittable), rows)

    @classmethod
    def from_summary(cls, logits: Tensor, summary: RowSummary, rows: Rows) -> "Prediction":
        """Collectives: see `RowSummary.over_ranks`."""
        whole, *_ = summary.over_ranks(rows.first)
        tokens = whole.row if rows.tokens is None else rows.tokens[whole.row]
        return cls(rows, logits, tokens, whole.confidence)

    def select(self, indices: list[int]) -> "Prediction":
        """The prediction for some of the tokens."""
        if len(indices) == len(self.tokens):
            return self
        index = to_device(indices, self.tokens.device)
        logits = self.logits[index] if isinstance(self.source, Tensor) else lambda: self.logits[index]
        own = None if self.own_logits is None else self.own_logits[index]
        return Prediction(self.rows, logits, self.tokens[index], self.confidence[index], own)

    def with_own(self, logits: Tensor) -> "Prediction":
        """The same, with the model's own logits [N, R] beside."""
        return replace(self, own_logits=logits)

    def own_normaliser(self) -> Tensor:
        """[N] log of the softmax's normaliser, in float32 or wider, of the model's own logits, a shortlist's bucket
        included. Collectives: see `RowSummary.over_ranks`."""
        own = self.logits if self.own_logits is None else self.own_logits
        return summarise_rows(own, self.rows.emittable).over_ranks(self.rows.first)[0].log_sum

    def vocabulary_shard(self, shard_size: int, own: bool = False) -> Tensor:
        """Logits [N, Vp/TP] of this rank's share of the vocabulary; -inf for what cannot be emitted.

        Args:
            shard_size: Vp/TP.
            own: the model's own logits, whatever a request makes of them.

        Collectives: for a shortlist at TP > 1, one all-gather of [N, R].
        """
        rows = self.rows
        given = self.own_logits if own and self.own_logits is not None else self.logits
        if rows.tokens is None:
            return given
        gathered = gather_columns(given[:, : rows.count])[:, : len(rows.tokens)]
        first = shard_size * parallel_state.get_tensor_model_parallel_rank()
        whole = shard_size * parallel_state.get_tensor_model_parallel_world_size()
        logits = gathered.new_full((len(gathered), whole), float("-inf"))
        logits[:, rows.tokens] = gathered
        return logits[:, first : first + shard_size]
