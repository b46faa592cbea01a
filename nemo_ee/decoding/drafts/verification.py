# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Which drafts the full model accepts (speculative sampling, arXiv:2211.17192, algorithm 1)."""

from collections.abc import Sequence
from random import Random

import torch
from torch import Tensor

from nemo_ee.decoding.generated_sequence import Draft
from nemo_ee.decoding.sampling import draw


def agreeing_prefix(drafts: Sequence[Draft], chosen: Sequence[int]) -> int:
    """How many drafts in a row, from the first, are what the full model chose greedily in their place."""
    count = 0
    for draft, token in zip(drafts, chosen, strict=False):
        if draft.token != token:
            break
        count += 1
    return count


class Acceptance:
    """Accepts drafts such that every token has the full model's distribution.

    Draft i, drawn from q, is accepted with probability min(1, p(draft) / q(draft)); the first that is not is
    replaced by a token drawn from max(p - q, 0), normalised, or from p where that is zero everywhere as p and q
    differ by rounding alone. Behind the last draft a token is drawn from p.

    Args:
        drafts: n of them, with the distributions that they were drawn from.
        distributions: [n, V] or [n + 1, V], the full model's in the same places, and behind the last draft.
        random: of the sequence.
        ahead: draw a token for every place that may turn out to be the last, so that a GPU is waited for once; else
            the one that is needed.
    """

    def __init__(self, drafts: Sequence[Draft], distributions: Tensor, random: Random, ahead: bool):
        self._drafts, self._distributions, self._ahead = drafts, distributions, ahead
        # The i-th draft is judged by the i-th number, and what replaces it is drawn by the next one.
        self._uniforms = [random.random() for _ in range(len(drafts) + 1)]

    def readings(self) -> list[Tensor]:
        """Two tensors whose numbers `outcome` asks for."""
        drafts, every = self._drafts, self._distributions
        if not drafts:
            chances = every.new_empty(0, dtype=torch.float64)
        else:
            p = [every[i, draft.token] for i, draft in enumerate(drafts)]
            q = [_drawn_from(draft)[draft.token] for draft in drafts]
            chances = torch.stack([*p, *q]).double()
        return [chances, self._behind(0, len(every)) if self._ahead else chances.new_empty(0)]

    def outcome(self, chances: list[float], behind: list[int]) -> tuple[int, int | None]:
        """How many drafts are accepted, and the token behind them; None if nothing is known of that."""
        count, good = len(self._drafts), 0
        # Strictly: a token that the full model never emits is never accepted.
        while good < count and self._uniforms[good] * chances[count + good] < chances[good]:
            good += 1
        if good == len(self._distributions):
            return good, None
        return good, behind[good] if self._ahead else int(self._behind(good, good + 1))

    def _behind(self, first: int, end: int) -> Tensor:
        """Tokens drawn behind so many accepted drafts, from `first` to `end` - 1 of them."""
        rows, drafts = self._distributions[first:end].double(), self._drafts[first:end]
        if drafts:
            full = rows[: len(drafts)]
            rest = (full - torch.stack([_drawn_from(draft) for draft in drafts])).clamp_min(0)
            judged = torch.where(rest.any(-1, keepdim=True), rest, full)
            rows = torch.cat([judged, rows[len(drafts) :]])
        count = len(self._drafts)
        return draw(rows, [self._uniforms[min(i + 1, count)] for i in range(first, end)])


def _drawn_from(draft: Draft) -> Tensor:
    """[V]; of a sequence that samples."""
    assert draft.distribution is not None, "only greedy drafts have none"
    return draft.distribution
