# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Intervals and spreads for what is measured on sequences and by repeated timing."""

from collections.abc import Sequence

import numpy as np

from nemo_ee.report.schema import Interval, Spread


def bootstrap_mean(
    totals: Sequence[float],
    counts: Sequence[float],
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, Interval | None]:
    """The mean per token and its confidence interval, by bootstrap over sequences.

    Tokens of one sequence are not independent, so whole sequences are drawn (a cluster bootstrap, percentile
    interval); each draw's mean weighs sequences by their tokens.

    Args:
        totals: per sequence, the sum over its tokens (of losses, of agreements as 0 and 1, ...), [sequences].
        counts: per sequence, its number of tokens, [sequences].
        level: of the interval.
        resamples: draws.
        seed: of the draws; the same seed gives the same interval.

    Returns:
        The mean over all tokens, and its interval. A single sequence says nothing about the spread between
        sequences: the interval is then None.
    """
    total, count = np.asarray(totals, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    assert total.shape == count.shape and total.ndim == 1 and count.sum() > 0, (
        "one total and count per sequence"
    )
    mean = float(total.sum() / count.sum())
    used = count > 0
    total, count = total[used], count[used]
    if len(total) < 2:
        return mean, None
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    for index in range(resamples):
        drawn = generator.integers(len(total), size=len(total))
        means[index] = total[drawn].sum() / count[drawn].sum()
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return mean, Interval(float(low), float(high))


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of at least one repetition."""
    low, median, high = np.quantile(np.asarray(values, dtype=np.float64), [0.25, 0.5, 0.75])
    return Spread(float(median), float(low), float(high))
