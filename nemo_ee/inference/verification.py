# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Which drafts the full model accepts (speculative sampling, arXiv:2211.17192, algorithm 1)."""

from collections.abc import Sequence
from random import Random

import torch
from torch import Tensor

from nemo_ee.inference.sampling import draw
from nemo_ee.inference.sequence import Draft


def agreeing_prefix(drafts: Sequence[Draft], chosen: Sequence[int]) -> int:
    """How many drafts in a row, from the first, are what the full model chose greedily in their place."""
    count = 0
    for draft, token in zip(drafts, chosen, strict=False):
        if draft.token != token:
            break
        count += 1
    return count


def accept_drafts(drafts: Sequence[Draft], distributions: Tensor, random: Random) -> tuple[int, int | None]:
    """Accepts drafts such that every token has the full model's distribution.

    Draft i, drawn from q, is accepted with probability min(1, p(draft) / q(draft)); the first that is not is
    replaced by a token drawn from max(p - q, 0), normalised, or from p where that is zero everywhere as p and q
    differ by rounding alone. Behind the last draft a token is drawn from p.

    Args:
        drafts: n of them, with the distributions that they were drawn from.
        distributions: [n, V] or [n + 1, V], the full model's in the same places, and behind the last draft.
        random: of the sequence.

    Returns:
        How many drafts are accepted, and the token behind them; None if nothing is known of that.
    """
    chances = _chances(drafts, distributions) if drafts else []
    for i, (p, q) in enumerate(chances):
        # Strictly: a token that the full model never emits is never accepted.
        if random.random() * q < p:
            continue
        full = distributions[i].double()
        rest = (full - _drawn_from(drafts[i]).double()).clamp_min(0)
        return i, int(draw((rest if rest.any() else full)[None], [random.random()]))
    if len(distributions) == len(drafts):
        return len(drafts), None
    return len(drafts), int(draw(distributions[-1:], [random.random()]))


def _chances(drafts: Sequence[Draft], distributions: Tensor) -> list[list[float]]:
    """[n][2] p and q of each draft, read from the device at once."""
    p = [distributions[i, draft.token] for i, draft in enumerate(drafts)]
    q = [_drawn_from(draft)[draft.token] for draft in drafts]
    return torch.stack([*p, *q]).double().view(2, -1).t().tolist()


def _drawn_from(draft: Draft) -> Tensor:
    """[V]; of a sequence that samples."""
    assert draft.distribution is not None, "only greedy drafts have none"
    return draft.distribution
