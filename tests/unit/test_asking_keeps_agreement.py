# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What calibration certifies of exits that are asked always holds where they are asked as that pays."""

import itertools

import numpy as np
import pytest

from nemo_ee.calibration.exit_decisions import first_exits
from nemo_ee.decoding.leaving import NEVER
from nemo_ee.decoding.policy.exit_policy import ExitPolicy
from tests.support.calibration_population import LAYERS, NUM_LAYERS, population
from tests.unit.test_exit_policy import made_up


def wrong_tokens(scores, asked, thresholds):
    """[T] whether each token leaves with another answer than full depth's, and the exit that it leaves at.

    Args:
        asked: [E, T] which exits are asked for which token.
    """
    exits = first_exits(np.where(asked, scores.confidences, -1.0), thresholds)
    left = exits < len(LAYERS)
    wrong = np.zeros(len(exits), dtype=bool)
    wrong[left] = scores.disagrees[exits[left], np.flatnonzero(left)]
    return wrong, exits


def asked_by_policy(scores, thresholds, policy, sequences):
    """[E, T] what a policy asks, as it learns from the tokens, of so many sequences at a time."""
    asked = np.zeros(scores.confidences.shape, dtype=bool)
    for first in range(0, asked.shape[1], sequences):
        together = range(first, min(first + sequences, asked.shape[1]))
        rows = [list(thresholds)] * len(together)
        count = policy.ask(rows, 0)
        asked[:count, together] = True
        _, exits = wrong_tokens(scores, asked, thresholds)  # of these tokens alone, the rest is read later
        for token in together:
            layer = [*LAYERS, NUM_LAYERS][exits[token]]
            policy.observe([*thresholds[:count], *[NEVER] * (len(LAYERS) - count)], layer)
        full = policy.prices.full_depth(len(together))
        policy.settle(len(together), full * (1.02 if first // sequences % 40 < 20 else 0.9), len(together), 0)
    return asked


@pytest.mark.parametrize("sequences", [1, 4])
@pytest.mark.parametrize("seed", range(3))
def test_no_document_agrees_less_where_exits_are_asked_as_they_pay(seed, sequences):
    """Token by token, whatever the thresholds, certified ones among them: one that is not asked agrees, and one that is
    asked leaves where it would."""
    everyone, skipped = population(seed, documents=40, bad_share=0.1), 0
    every = np.ones(everyone.confidences.shape, dtype=bool)
    for thresholds in ((0.5, 0.5), (0.8, 0.6), (0.9, 0.9), (NEVER, 0.7), (0.6, NEVER)):
        always, _ = wrong_tokens(everyone, every, thresholds)
        asked = asked_by_policy(
            everyone, thresholds, ExitPolicy(made_up(exits=LAYERS, head=0.1), LAYERS), sequences
        )
        skipping, _ = wrong_tokens(everyone, asked, thresholds)
        assert not (skipping & ~always).any()
        for document in range(len(everyone.sizes)):
            of = everyone.documents == document
            assert skipping[of].sum() <= always[of].sum()
        skipped += asked.any() and not asked.all()
    assert skipped, "some are asked, and some are not"


def test_asking_a_deeper_exit_alone_could_lower_agreement():
    """Why no exit is asked behind one that is left out."""
    scores = population(0, documents=200)
    for thresholds in itertools.product((0.5, 0.6), repeat=2):
        every = np.ones(scores.confidences.shape, dtype=bool)
        always, _ = wrong_tokens(scores, every, thresholds)
        every[0] = False
        alone, _ = wrong_tokens(scores, every, thresholds)
        assert (alone & ~always).any()
