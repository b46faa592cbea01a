# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Which drafts the full model accepts (speculative sampling, arXiv:2211.17192, algorithm 1)."""

from collections.abc import Sequence
from random import Random

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
    for i, draft in enumerate(drafts):
        p, q = distributions[i].double(), draft.distribution.double()
        # Strictly: a token that the full model never emits is never accepted.
        if random.random() * float(q[draft.token]) < float(p[draft.token]):
            continue
        rest = (p - q).clamp_min(0)
        return i, int(draw((rest if rest.any() else p)[None], [random.random()]))
    if len(distributions) == len(drafts):
        return len(drafts), None
    return len(drafts), int(draw(distributions[-1:], [random.random()]))
