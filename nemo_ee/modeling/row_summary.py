# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The most probable token that can be emitted, and its probability, from logits whose rows are sharded.

Each tensor-parallel rank reduces its own rows to a few numbers per token (`RowSummary`), and these are combined.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_ee.modeling.vocab_parallel import log_sum_over_ranks, max_over_ranks


@dataclass
class RowSummary:
    """What logits say about each of N tokens (float32 or wider): one shard of them, or all.

    Attributes:
        best: [N] the highest logit of an emittable row; -inf without one.
        row: [N] that row, counted within the shard; the lowest of equal ones.
        log_sum: [N] log of the sum of exp over all rows; -inf without one that counts.
    """

    best: Tensor
    row: Tensor
    log_sum: Tensor

    @property
    def confidence(self) -> Tensor:
        """[N] the probability of `row`, if this is of all logits."""
        return confidence(self.best, self.log_sum)

    def over_ranks(self, first_row: int, *others: Tensor) -> tuple["RowSummary", *tuple[Tensor, ...]]:
        """The same of all ranks' rows, and the maxima of other tensors [N].

        Collectives: where TP > 1, three all-reduces of [N] over the tensor-parallel group.

        Args:
            first_row: where this shard begins.
            others: taken along in the same all-reduce.
        """
        best, row, top, *maxima = max_over_ranks(self.best, self.row + first_row, self.log_sum, *others)
        return RowSummary(best, row, log_sum_over_ranks(self.log_sum, top)), *maxima


def summarise_rows(logits: Tensor, emittable: int) -> RowSummary:
    """Reduces one shard.

    Args:
        logits: [N, R]; all count towards the softmax, so what must not is -inf.
        emittable: the first `emittable` rows stand for a token that can be emitted.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return RowSummary(*best_row(logits, emittable), logits.logsumexp(-1))


def best_row(logits: Tensor, emittable: int) -> tuple[Tensor, Tensor]:
    """`best` and `row` of `RowSummary`, from logits [N, R]."""
    if emittable:
        best, row = logits[:, :emittable].max(-1)
        return best, row
    row = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    return logits.new_full((len(logits),), float("-inf")), row


def confidence(best: Tensor, log_normaliser: Tensor) -> Tensor:
    """The highest probability: exp(best logit - log of the softmax's normaliser), element by element."""
    return (best - log_normaliser).exp()
