# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Global batches that grow while exits are trained: losses of all exits and steps are those of a plain reference
that is told each step's number of micro-batches. Resuming on the way: `test_pretraining_resume`."""

from dataclasses import replace

import pytest

from tests.distributed.test_pretraining_parallel import compare, section
from tests.support.pretraining import Case, pretrain
from tests.support.tuning import Layout, write_text

STEPS, FULL = 6, 6
RAMP_UP = [2, 2, 12]
"""From 2 by 2 over 12 samples: the size grows after 6 and 12 samples."""
SIZES = (2, 2, 2, 4, 4, 6)
"""By hand: before the steps 0, 2, 4, 6, 10 and 14 samples have been consumed."""
FACTORS = (0.2, 0.4, 0.6, 0.8, 1.0, 1.0)
"""Of the losses' weights by the schedule below: a function of the step, whatever has been consumed."""

TRAINED = section("norm, tied", [2, 6], schedule="linear", initial_factor=0.2, schedule_steps=4)
CONSTANT = dict(micro_batch_size=1, global_batch_size=FULL)
GROWING = Case(TRAINED, dict(CONSTANT, rampup_batch_size=RAMP_UP), steps=STEPS)
TOLD = Case(TRAINED, CONSTANT, steps=STEPS, micro_batches=SIZES)
EARLY = 2


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def plain(text, workers):
    cases = {"growing": TOLD, "ended early": replace(TOLD, steps=EARLY)}
    return workers(1).run(pretrain, text, cases, Layout(), True)[0]


@pytest.mark.parametrize("layout", [Layout(pp=2), Layout(dp=2)], ids=["PP2", "DP2"])
def test_growing_batches_equal_plain_ones_of_these_sizes(layout, text, plain, workers):
    found = compare(text, plain, workers, layout, {"growing": GROWING})
    assert found[0]["growing"].logged["consumed_samples"] == sum(SIZES)
    assert found[0]["growing"].logged["global_batch_size"] == FULL
    for n in (2, 6):
        weights = [step[f"train_loss_weight/exit_{n}"] for step in found[0]["growing"].statistics]
        assert weights == pytest.approx([factor * n / 8 for factor in FACTORS])


def test_validation_has_full_batches_while_they_grow(text, plain, workers):
    """The reference's are full from the start; `compare` holds the statistics of validation against them."""
    found = compare(text, plain, workers, Layout(), {"ended early": replace(GROWING, steps=EARLY)})
    assert found[0]["ended early"].logged["global_batch_size"] == SIZES[EARLY - 1] < FULL
