# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Intervals and spreads against what is known about them."""

import numpy as np
import pytest
import scipy.stats

from nemo_ee.report.statistics import bootstrap_mean, spread


def test_mean_weighs_sequences_by_their_tokens():
    mean, interval = bootstrap_mean([10.0, 1.0], [10, 2])
    assert mean == pytest.approx(11 / 12)
    assert interval.low == pytest.approx(0.5) and interval.high == pytest.approx(1.0)


def test_interval_matches_the_normal_approximation_over_sequences():
    means = np.random.default_rng(0).normal(3.0, 0.5, size=400)
    mean, interval = bootstrap_mean(means * 32, np.full(400, 32))
    half = 1.96 * means.std() / 20
    assert mean == pytest.approx(means.mean())
    assert interval.low == pytest.approx(means.mean() - half, abs=0.15 * half)
    assert interval.high == pytest.approx(means.mean() + half, abs=0.15 * half)


@pytest.mark.parametrize("sequences", [2, 40, 300])
def test_interval_is_that_of_scipy(sequences):
    generator = np.random.default_rng(sequences)
    counts = generator.integers(1, 300, sequences)
    totals = generator.binomial(counts, 0.7)
    _, interval = bootstrap_mean(totals, counts, level=0.9, seed=3)
    theirs = scipy.stats.bootstrap(
        (totals, counts),
        lambda total, count, axis: total.sum(axis) / count.sum(axis),
        paired=True,
        n_resamples=2000,
        confidence_level=0.9,
        method="percentile",
        rng=np.random.default_rng(3),
    ).confidence_interval
    assert (interval.low, interval.high) == pytest.approx((theirs.low, theirs.high), rel=1e-12)


def test_tokens_of_one_sequence_do_not_count_as_independent():
    """Splitting each sequence's tokens into fake sequences would shrink the interval; clusters must not."""
    totals = np.array([0.0, 8.0] * 10)
    _, clustered = bootstrap_mean(totals, np.full(20, 8))
    _, as_tokens = bootstrap_mean(np.repeat(totals / 8, 8), np.ones(160))
    assert clustered.high - clustered.low > 2.0 * (as_tokens.high - as_tokens.low)


def test_same_seed_same_interval_and_one_sequence_none():
    totals, counts = np.random.default_rng(0).normal(size=30), np.arange(1, 31)
    assert bootstrap_mean(totals, counts, seed=1) == bootstrap_mean(totals, counts, seed=1)
    assert bootstrap_mean(totals, counts, seed=1) != bootstrap_mean(totals, counts, seed=2)
    assert bootstrap_mean([3.0, 0.0], [4, 0]) == (0.75, None)


def test_spread_is_median_and_quartiles():
    result = spread([4.0, 1.0, 3.0, 2.0, 5.0])
    assert (result.median, result.q25, result.q75) == (3.0, 2.0, 4.0)
    assert spread([7.0]) == spread([7.0, 7.0])
