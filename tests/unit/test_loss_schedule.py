# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Weights of exits' losses and rates of dropped layers, by hand."""

import pytest

from nemo_ee.config import LayerDropoutConfig, TrainingConfig
from nemo_ee.training.loss_schedule import layer_dropout_rate, loss_weights

LAYERS = (2, 4, 6)


def weights(step: int, **settings) -> list[float]:
    return list(loss_weights(TrainingConfig(**settings), LAYERS, 8, step).values())


def test_without_weights_depth_counts():
    assert weights(0) == [0.25, 0.5, 0.75]
    assert weights(10**6, loss_weights=(1.0, 0.0, 2.0)) == [1.0, 0.0, 2.0]


@pytest.mark.parametrize("step, factor", [(0, 0.2), (25, 0.4), (50, 0.6), (100, 1.0), (1000, 1.0)])
def test_linear(step, factor):
    given = dict(loss_weights=(1.0, 1.0, 1.0), schedule="linear", initial_factor=0.2, schedule_steps=100)
    assert weights(step, **given) == pytest.approx([factor] * 3)


@pytest.mark.parametrize("step, factor", [(0, 3.0), (50, 2.0), (100, 1.0), (101, 1.0)])
def test_cosine_cools_down(step, factor):
    given = dict(loss_weights=(1.0, 1.0, 1.0), schedule="cosine", initial_factor=3.0, schedule_steps=100)
    assert weights(step, **given) == pytest.approx([factor] * 3)


def test_cosine_starts_and_ends_flat():
    given = dict(loss_weights=(1.0, 1.0, 1.0), schedule="cosine", initial_factor=0.0, schedule_steps=100)
    assert weights(1, **given)[0] < 0.001 and weights(99, **given)[0] > 0.999


def test_rotational_takes_turns():
    given = dict(loss_weights=(1.0, 1.0, 1.0), curriculum="rotational")
    assert [weights(step, **given) for step in range(4)] == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]]
    given["curriculum_period"] = 2
    assert [weights(step, **given) for step in range(3)] == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]


def test_gradual_begins_with_the_deepest():
    given = dict(loss_weights=(1.0, 1.0, 1.0), curriculum="gradual", curriculum_steps=100)
    assert [weights(step, **given) for step in (0, 49, 50, 99, 100)] == [
        [0, 0, 1],
        [0, 0, 1],
        [0, 1, 1],
        [0, 1, 1],
        [1, 1, 1],
    ]


def test_layer_dropout_grows_with_depth_and_time():
    constant = LayerDropoutConfig(max_rate=0.2)
    rates = [layer_dropout_rate(constant, n, 9, 0) for n in range(1, 10)]
    assert rates[0] == 0.0 and rates[-1] == pytest.approx(0.2) and rates == sorted(rates)
    assert rates[4] == pytest.approx(0.2 * (2**0.5 - 1))
    growing = LayerDropoutConfig(max_rate=0.2, schedule="exponential", steps=100)
    assert layer_dropout_rate(growing, 9, 9, 0) == 0.0
    assert layer_dropout_rate(growing, 9, 9, 50) == pytest.approx(0.2 * (2**0.5 - 1))
    assert layer_dropout_rate(growing, 9, 9, 500) == pytest.approx(0.2)
    assert layer_dropout_rate(LayerDropoutConfig(), 9, 9, 500) == 0.0
