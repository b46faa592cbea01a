# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""How sure an exit is of its next token: the highest probability of a token that it can emit.

Logits may be sharded over ranks by rows. Each rank reduces its own rows to a few numbers per token
(`RowSummary`); combining those over ranks is one maximum and one sum, after which `confidence` is local.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class RowSummary:
    """What one shard of logits says about each of N tokens (float32 or wider).

    Attributes:
        best: [N] the highest logit of an emittable row; -inf without one.
        row: [N] that row, counted within the shard; the lowest of equal ones.
        log_sum: [N] log of the sum of exp over all rows; -inf without one that counts.
    """

    best: Tensor
    row: Tensor
    log_sum: Tensor


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


def is_sure(confidences: list[float], threshold: float) -> list[bool]:
    """Whether each token leaves: strictly above the threshold, so that 1.0 never exits."""
    return [value > threshold and threshold < 1.0 for value in confidences]
