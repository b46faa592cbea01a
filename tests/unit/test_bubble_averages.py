# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Fills leave the expected gradient as it is: averages over random global batches, with a bound for chance.

Of every global batch the gradient with fills is compared with plain autograd of the written objective on the
batch's full micro-batches, in a simulated pipeline (`tests.support.toy_pipeline`). Over N independent batches the
mean difference of every coordinate, in units of its standard error, is a standard normal variable if there is no
bias (means of 4000 bounded values). `BOUND` is such that all coordinates of all cases together exceed it with a
probability of at most `FALSE_ALARM` (Bonferroni). The same statistic finds wrong divisions, by far.
"""

import math
from statistics import NormalDist

import pytest
import torch

from nemo_ee.training.bubble_plan import Plan, plan_step
from tests.support.toy_pipeline import TARGETS, WIDTH, Division, ToyPipeline

BATCHES = 4000
FALSE_ALARM = 1e-6
ROUNDING = 1e-12
"""Added to standard errors: where no fill reaches, differences are float64 rounding."""

CASES = {
    "four stages": (plan_step(4, 8, 2.0, (True,) * 4, True, True), (0, 1, 2, 3)),
    "exits on two of four": (plan_step(4, 6, 3.0, (False, True, False, True), True, True), (1, 3)),
    "six stages, few micro-batches": (plan_step(6, 6, 2.5, (True,) * 6, True, True), (0, 1, 2, 3, 4, 5)),
    "warm-up only": (plan_step(4, 8, 2.0, (True,) * 4, True, False), (0, 1, 2, 3)),
    "cool-down only": (plan_step(4, 8, 2.0, (True,) * 4, False, True), (0, 1, 2, 3)),
}
"""Plans, and which stages have an exit; the last one is the final exit's."""

COORDINATES = sum(
    len(plan.passes) * WIDTH * WIDTH + len(exits) * TARGETS * WIDTH for plan, exits in CASES.values()
)
BOUND = NormalDist().inv_cdf(1 - FALSE_ALARM / (2 * COORDINATES))


def ours(plan: Plan) -> Division:
    return Division(plan.loss_scale, plan.gradient_scale)


def one_count(plan: Plan) -> Division:
    """EE-LLM's (`megatron/core/pipeline_parallel/schedules.py`): all losses of all samples are divided by the
    number of full and cool-down micro-batches."""
    count = plan.full + len(plan.cooldown_depth)
    return Division(lambda kind, stage: plan.full / count, lambda stage: 1.0)


def count_of_the_stage(plan: Plan) -> Division:
    """Every stage divides by the number of micro-batches that come back through it."""
    returns = [sum(p.backward for p in passes) for passes in plan.passes]
    return Division(lambda kind, stage: 1.0, lambda stage: plan.full / returns[stage])


def largest_score(name: str, division) -> float:
    """The largest mean difference of a coordinate, in standard errors."""
    plan, exits = CASES[name]
    assert plan.samples > plan.full
    weights = {stage: 1.0 if stage == exits[-1] else 0.3 + 0.2 * stage for stage in exits}
    toy = ToyPipeline.random(len(plan.passes), weights, plan.samples, BATCHES, seed=len(name))
    filled, plain = toy.step(plan, division(plan)), toy.written_objective(plan.full)
    worst = 0.0
    for key, gradient in filled.items():
        difference = gradient - plain[key]
        error = difference.std(0) / math.sqrt(BATCHES) + ROUNDING
        worst = max(worst, (difference.mean(0) / error).abs().max().item())
    return worst


@pytest.mark.parametrize("name", CASES)
def test_the_average_gradient_is_that_of_the_objective(name):
    assert largest_score(name, ours) < BOUND


@pytest.mark.parametrize("name", CASES)
def test_the_bias_of_one_count_is_seen(name):
    assert largest_score(name, one_count) > 2 * BOUND


@pytest.mark.parametrize(
    "name", [name for name in CASES if name != "cool-down only"]
)  # there it is no other than ours
def test_the_bias_of_a_count_per_stage_is_seen(name):
    assert largest_score(name, count_of_the_stage) > 2 * BOUND


def test_without_fills_the_pipeline_is_plain_autograd():
    """The simulation itself, batch by batch."""
    plan = plan_step(4, 6, 2.0)
    toy = ToyPipeline.random(4, {0: 0.5, 2: 0.7, 3: 1.0}, plan.samples, 5, seed=0)
    found, expected = toy.step(plan, ours(plan)), toy.written_objective(plan.full)
    for key, gradient in expected.items():
        assert gradient.abs().max() > 1e-3
        torch.testing.assert_close(found[key], gradient, rtol=1e-12, atol=1e-13)


def test_fills_change_single_gradients():
    plan, _ = CASES["four stages"]
    toy = ToyPipeline.random(4, dict.fromkeys(range(4), 1.0), plan.samples, 5, seed=0)
    found, plain = toy.step(plan, ours(plan)), toy.written_objective(plan.full)
    assert all((found[key] - plain[key]).abs().amin() > 0 for key in plain)
