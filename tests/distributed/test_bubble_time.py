# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Filling bubbles costs no time, on stages whose passes are sleeps: no cores needed, but real messages."""

import itertools
import statistics

import pytest

from nemo_ee.training.bubble_plan import plan_step
from tests.support.slept_stages import durations, run_alternately

STAGES, MICRO_BATCHES, RATIO, UNIT, STEPS = 4, 8, 2.0, 0.05, 5
OF = (STAGES, MICRO_BATCHES, RATIO, (True,) * STAGES)
PLANS = {"plain": plan_step(*OF), "filled": plan_step(*OF, warmup=True, cooldown=True)}
SLOWER = 1.15
"""By the plan the factor is 1, and 1.36 if all twelve samples were full ones. Between: processes of a busy
machine wake up late, and a stage with fewer bubbles has less time to make up for that."""


@pytest.fixture(scope="module")
def ranks(workers):
    return workers(STAGES).run(run_alternately, PLANS, UNIT, RATIO, STEPS, timeout=300)


def test_a_step_with_fills_takes_no_longer(ranks):
    plain, filled = (durations(ranks, name) for name in ("plain", "filled"))
    assert PLANS["filled"].samples == MICRO_BATCHES + 4
    assert min(plain) >= PLANS["plain"].makespan * UNIT, "stages wait for each other"
    assert statistics.median(filled) / statistics.median(plain) < SLOWER, (filled, plain)


def test_passes_run_in_the_order_of_the_plan(ranks):
    for stage, steps in enumerate(ranks):
        assert [step.plan for step in steps] == ["plain", "filled"] * STEPS
        for step in steps:
            assert [event.step for event in step.events] == list(PLANS[step.plan].passes[stage])
            for event in step.events:
                length = UNIT * (RATIO if event.step.backward else 1.0)
                assert event.stage == stage and event.start <= event.ready
                assert event.end - event.ready >= 0.99 * length, "waiting is no part of the pass"
            for before, after in itertools.pairwise(step.events):
                assert before.end <= after.start


def test_no_pass_begins_before_its_input_is_there(ranks):
    for step in zip(*ranks, strict=True):
        ran = {(e.stage, e.step.backward, e.step.sample): e for stage in step for e in stage.events}
        for (stage, backward, sample), event in ran.items():
            source = ran.get((stage + (1 if backward else -1), backward, sample))
            if source is not None:  # it may send a little before it notes its end
                length = UNIT * (RATIO if backward else 1.0)
                assert source.ready + 0.99 * length <= event.ready
