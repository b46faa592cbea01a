# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The ridge accumulator against numpy's least squares on stacked rows."""

import numpy as np
import pytest
import torch

from nemo_ee.modeling.first_weights.ridge import RidgeAccumulator

ROWS, FEATURES, TARGETS = 60, 7, 3


@pytest.fixture
def data():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(ROWS, FEATURES)) * np.array([1, 1, 1, 30, 30, 30, 30])
    return x, x @ generator.normal(size=(FEATURES, TARGETS)) + 5.0 + generator.normal(size=(ROWS, TARGETS))


def accumulate(x, y, parts: int = 1) -> RidgeAccumulator:
    sums = RidgeAccumulator(FEATURES, TARGETS)
    for some_x, some_y in zip(np.array_split(x, parts), np.array_split(y, parts), strict=True):
        sums.update(torch.from_numpy(some_x), torch.from_numpy(some_y))
    return sums


def by_lstsq(x, y, penalties) -> tuple[np.ndarray, np.ndarray]:
    """Ridge as ordinary least squares with one row sqrt(penalty) e_i, target 0, for each coefficient."""
    ones = np.hstack([x, np.ones((len(x), 1))])
    rows = np.vstack([ones, np.diag(np.sqrt(penalties))])
    solution = np.linalg.lstsq(rows, np.vstack([y, np.zeros((FEATURES + 1, TARGETS))]), rcond=None)[0]
    return solution[:-1].T, solution[-1]


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("groups", [None, [3, 4]])
@pytest.mark.parametrize("penalty", [1e-3, 0.1, 2.0])
def test_against_least_squares(data, penalty, groups, parts):
    x, y = data
    squares = (x**2).sum(0)
    bounds = np.cumsum([0, *(groups or [FEATURES])])
    penalties = np.empty(FEATURES + 1)
    for first, last in zip(bounds[:-1], bounds[1:], strict=True):
        penalties[first:last] = penalty * squares[first:last].mean()
    penalties[-1] = 1e-6 * ROWS
    weight, bias = accumulate(x, y, parts).solve(penalty, groups)
    expected_weight, expected_bias = by_lstsq(x, y, penalties)
    np.testing.assert_allclose(weight.numpy(), expected_weight, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(bias.numpy(), expected_bias, rtol=1e-8, atol=1e-10)


def test_sums_add_up(data):
    x, y = data
    whole, first, second = accumulate(x, y), accumulate(x[:20], y[:20]), accumulate(x[20:], y[20:])
    torch.testing.assert_close(first.gram + second.gram, whole.gram)
    torch.testing.assert_close(first.cross + second.cross, whole.cross)


def test_rows_that_do_not_count_are_as_if_they_were_not_there(data):
    x, y = (torch.from_numpy(rows) for rows in data)
    counts = torch.arange(ROWS) % 3 > 0
    x, y = (rows.where(counts[:, None], float("nan")) for rows in (x, y))
    found, expected = RidgeAccumulator(FEATURES, TARGETS), RidgeAccumulator(FEATURES, TARGETS)
    found.update(x, y, counts)
    expected.update(x[counts], y[counts])
    torch.testing.assert_close(found.gram, expected.gram)
    torch.testing.assert_close(found.cross, expected.cross)


def test_an_exact_map_is_found_from_float32(data):
    x, _ = data
    x = torch.from_numpy(x).float()
    weight, bias = torch.randn(TARGETS, FEATURES), torch.randn(TARGETS)
    sums = RidgeAccumulator(FEATURES, TARGETS)
    sums.update(x, torch.nn.functional.linear(x, weight, bias))
    found_weight, found_bias = sums.solve(1e-9)
    assert found_weight.dtype == torch.float64
    torch.testing.assert_close(found_weight.float(), weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found_bias.float(), bias, rtol=1e-4, atol=1e-4)


def test_fewer_rows_than_features_is_solvable():
    sums = RidgeAccumulator(FEATURES, TARGETS)
    sums.update(torch.randn(2, FEATURES), torch.randn(2, TARGETS))
    weight, bias = sums.solve(0.01)
    assert torch.isfinite(weight).all() and torch.isfinite(bias).all()


def test_solving_makes_no_second_gram_matrix():
    """From the events of torch's allocator; targets are few, so that only the Gram matrix is large."""
    from torch.profiler import ProfilerActivity, profile

    sums, size = RidgeAccumulator(400, 2), 8 * 401**2
    sums.update(torch.randn(500, 400), torch.randn(500, 2))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        sums.solve(0.01, [100, 300])
    events = recorded.profiler.kineto_results.events()
    highest = now = 0
    for _, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        now += change
        highest = max(highest, now)
    assert 0 < highest < 0.2 * size
