# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Plans of filled pipelines: they cost no time, respect what each pass needs, and are unbiased."""

import itertools
from fractions import Fraction

import pytest

from nemo_ee.training.bubble_plan import (
    COOLDOWN,
    FULL,
    WARMUP,
    cooldown_fills,
    most_fills,
    plan_step,
    warmup_fills,
)

SIZES = [(p, m) for p in (2, 3, 4, 5, 8, 12) for m in sorted({1, 2, p - 1, p, p + 1, 3 * p}) if m >= 1]
RATIOS = (0.5, 1.0, 2.0, 2.5, 3.0)


def filled(stages: int, full: int, ratio: float):
    return plan_step(stages, full, ratio, (True,) * stages, True, True)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("stages, full", SIZES)
def test_fills_cost_no_time(stages, full, ratio):
    plain, plan = plan_step(stages, full, ratio), filled(stages, full, ratio)
    assert plain.makespan == pytest.approx((full + stages - 1) * (1 + ratio))
    assert plan.makespan == pytest.approx(plain.makespan)
    for stage in range(stages):
        mine = [p for p in plan.passes[stage] if p.kind == FULL]
        assert mine == list(plain.passes[stage]), "full micro-batches are where they were"
        for before, after in itertools.pairwise(plan.passes[stage]):
            assert before.end <= after.start + 1e-9, "one pass at a time"


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("stages, full", SIZES)
def test_every_pass_has_what_it_needs(stages, full, ratio):
    plan = filled(stages, full, ratio)
    ends = {(s, p.backward, p.sample): p.end for s, passes in enumerate(plan.passes) for p in passes}
    for stage, passes in enumerate(plan.passes):
        for p in passes:
            if not p.backward and stage:
                assert ends[stage - 1, False, p.sample] <= p.start + 1e-9
            if p.backward:
                assert ends[stage, False, p.sample] <= p.start + 1e-9
                if (stage + 1, True, p.sample) in ends:
                    assert ends[stage + 1, True, p.sample] <= p.start + 1e-9
                else:
                    deepest = stages - 1 if p.kind != WARMUP else plan.warmup_depth[p.sample - full]
                    assert stage == deepest


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("stages", (2, 3, 4, 8, 12))
def test_as_many_fills_as_the_formulas_say(stages, ratio):
    plan = filled(stages, 2 * stages, ratio)
    assert len(plan.warmup_depth) <= most_fills(stages, ratio) >= len(plan.cooldown_depth)
    for stage in range(stages):
        assert plan.warmup_fills(stage) == warmup_fills(stage, stages, ratio)
        assert plan.cooldown_fills(stage) == cooldown_fills(stage, stages, ratio)


def test_four_stages_by_hand():
    """r=2: K=2; warm-up max(0, floor((2(3-s)-s)/3)) = 2, 1, 0, 0; cool-down floor(2s/3) = 0, 0, 1, 2."""
    plan = filled(4, 8, 2.0)
    assert plan.warmup_depth == (1, 0) and plan.cooldown_depth == (2, 3)
    assert [plan.warmup_fills(s) for s in range(4)] == [2, 1, 0, 0]
    assert [plan.cooldown_fills(s) for s in range(4)] == [0, 0, 1, 2]
    assert plan.samples == 12


def test_warm_up_fills_go_no_deeper_than_an_exit():
    assert plan_step(4, 8, 2.0, (True, False, False, True), True).warmup_depth == (0, 0)
    assert plan_step(4, 8, 2.0, (False, True, False, True), True).warmup_depth == (1,)
    assert plan_step(4, 8, 2.0, (False, False, False, True), True).warmup_depth == ()


@pytest.mark.parametrize("stages, full, ratio", [(3, 3, 2), (3, 4, 3), (4, 4, 2)])
def test_the_expected_gradient_is_that_of_one_sample(stages, full, ratio):
    """Exactly: over every way to draw the step's samples from two, each with its own gradients.

    Stage s's parameters get g[x][t] from the loss of stage t >= s on sample x.
    """
    values = [Fraction(2), Fraction(-7, 3)]
    plan = filled(stages, full, float(ratio))
    assert plan.samples > full

    def gradient(x: int, s: int, t: int) -> Fraction:
        return values[x] * (3 * s + 1) + (x + 1) ** (t + 1)

    def step(drawn: tuple[int, ...], s: int) -> Fraction:
        total = Fraction(0)
        returns = {p.sample for p in plan.passes[s] if p.backward}
        for sample, x in enumerate(drawn):
            if sample not in returns:
                continue
            for t in range(s, stages):
                kind = next(p.kind for p in plan.passes[0] if p.sample == sample)
                if kind == WARMUP and t > plan.warmup_depth[sample - full]:
                    continue
                scale = Fraction(plan.full, plan.full + plan.warmup_fills(t)) if kind != COOLDOWN else 1
                assert float(scale) == plan.loss_scale(kind, t)
                total += scale * gradient(x, s, t) / plan.full
        factor = Fraction(plan.full, plan.full + plan.cooldown_fills(s))
        assert float(factor) == plan.gradient_scale(s)
        return factor * total

    for s in range(stages):
        drawings = list(itertools.product(range(2), repeat=plan.samples))
        mean = sum(step(drawn, s) for drawn in drawings) / len(drawings)
        wanted = sum(gradient(x, s, t) for x in range(2) for t in range(s, stages)) / Fraction(2)
        assert mean == wanted
