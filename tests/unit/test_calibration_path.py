# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Decisions of thresholds and the path through them, against slow references."""

import numpy as np
import pytest
import torch

from nemo_ee.calibration.exit_decisions import TokenScores, first_exits
from nemo_ee.calibration.threshold_choice import Requirement, certify, plan
from nemo_ee.calibration.threshold_path import threshold_levels, threshold_path
from nemo_ee.evaluation.teacher_forced import ExitScores, TextScores
from tests.support.calibration_population import LARGEST, population


@pytest.fixture(scope="module")
def scores():
    return population(0, documents=40)


def slow_exit(confidences, thresholds):
    for n, (value, threshold) in enumerate(zip(confidences, thresholds, strict=True)):
        if threshold < 1.0 and value > threshold:
            return n
    return len(thresholds)


@pytest.mark.parametrize("thresholds", [(0.7, 0.6), (1.0, 0.5), (0.0, 0.0), (1.0, 1.0), (0.9, 0.0)])
def test_outcome_equals_a_loop_over_tokens(scores, thresholds):
    outcome = scores.leave_with(thresholds)
    wrong, sizes, left, layers = np.zeros(40), np.zeros(40), [0, 0, 0], 0
    for token, document in enumerate(scores.documents):
        n = slow_exit(scores.confidences[:, token], thresholds)
        wrong[document] += n < 2 and scores.disagrees[n, token]
        sizes[document] += 1
        left[n] += 1
        layers += (10, 20, 30)[n]
    assert np.array_equal(outcome.disagreements, wrong) and np.array_equal(outcome.sizes, sizes)
    assert outcome.share_per_exit == pytest.approx(np.array(left) / sum(left))
    assert outcome.mean_layers == pytest.approx(layers / sum(left))
    assert outcome.agreement == pytest.approx(1 - wrong.sum() / sizes.sum())


def test_ties_and_certainty_are_decided_as_in_decoding():
    """At equal confidence a token stays; a threshold of 1 never lets go, not even of what exceeds 1."""
    values = torch.tensor([[0.5, 0.50001, 1.0, 1.0000001, 0.0]])
    exits = {
        2: ExitScores(torch.full((1, 5), 2), values, values, values > 9),
        4: ExitScores(torch.full((1, 5), 4), values.flip(1), values, values > 9),
    }
    final = ExitScores(torch.zeros(1, 5, dtype=torch.long), values, values, values > 9)
    for thresholds in ((0.5, 0.5), (1.0, 0.5), (0.5, 1.0), (0.0, 1.0), (0.9, 0.2)):
        _, layers = TextScores(final, exits).leaving(dict(zip((2, 4), thresholds, strict=True)))
        confidences = np.concatenate([exits[2].confidences.numpy(), exits[4].confidences.numpy()])
        mine = np.array([2, 4, 0])[first_exits(confidences.astype(np.float64), thresholds)]
        assert mine.tolist() == layers[0].tolist()


def test_documents_can_be_taken_out(scores):
    part = scores.of_documents([7, 3])
    assert part.sizes.tolist() == scores.sizes[[7, 3]].tolist()
    for new, old in ((0, 7), (1, 3)):
        for values, all_values in (
            (part.confidences, scores.confidences),
            (part.disagrees, scores.disagrees),
        ):
            assert np.array_equal(values[:, part.documents == new], all_values[:, scores.documents == old])


def test_levels_let_equal_shares_go():
    values = np.random.default_rng(0).random(1000)
    levels = threshold_levels(values, 10)
    assert levels == sorted(levels, reverse=True) and levels[-1] == 0.0 and max(levels) < 1.0
    assert [(values > level).mean() for level in levels[:10]] == pytest.approx(
        np.arange(1, 11) / 10, abs=0.002
    )
    assert all(f"{level:g}" == str(level) or level == 0.0 for level in levels), "short to write"


def test_levels_of_few_and_of_extreme_values():
    assert threshold_levels(np.array([0.5, 1.0, 0.5, 1.0]), 4) == [0.9999, 0.4999, 0.0]
    assert threshold_levels(np.array([0.99999, 1.0]), 2) == [0.9999, 0.0]
    assert threshold_levels(np.zeros(5), 3) == [0.0]


def slow_path(scores, levels):
    """The definition, token by token: which exit's next levels save most per disagreement, one level of it."""
    ladders = [threshold_levels(row, levels) for row in scores.confidences]
    depths, thresholds, path = (*scores.layers, scores.num_layers), [1.0] * len(ladders), []

    def costs(candidate):
        layers = wrong = 0
        for token in range(len(scores.documents)):
            n = slow_exit(scores.confidences[:, token], candidate)
            layers += depths[n]
            wrong += n < len(ladders) and bool(scores.disagrees[n, token])
        return layers, wrong

    while True:
        layers, wrong = costs(thresholds)
        best, chosen = 0.0, None
        for n, ladder in enumerate(ladders):
            for level in (level for level in ladder if level < thresholds[n]):
                lower = [*thresholds[:n], level, *thresholds[n + 1 :]]
                new_layers, new_wrong = costs(lower)
                rate = (layers - new_layers) / (1 + max(0, new_wrong - wrong))
                if rate > best + 1e-12:
                    best, chosen = rate, n
        if chosen is None:
            return path
        thresholds[chosen] = max(level for level in ladders[chosen] if level < thresholds[chosen])
        path.append(tuple(thresholds))


def test_path_equals_its_definition():
    for seed in range(3):
        few = population(seed, documents=6)
        path = threshold_path(few, 4)
        assert path == slow_path(few, 4) and len(path) >= 4


def test_path_descends_and_ends_where_nothing_is_left_to_save(scores):
    path = threshold_path(scores, 20)
    previous = (1.0, 1.0)
    for thresholds in path:
        assert sum(a != b for a, b in zip(thresholds, previous, strict=True)) == 1
        assert all(a <= b for a, b in zip(thresholds, previous, strict=True))
        previous = thresholds
    layers = [scores.leave_with(thresholds).mean_layers for thresholds in path]
    assert layers == sorted(layers, reverse=True)
    assert layers[-1] == scores.leave_with((0.0, 0.0)).mean_layers


def test_path_without_anything_to_save_is_empty(scores):
    last_layer = TokenScores((30,), 30, scores.confidences[:1], scores.disagrees[:1], scores.documents)
    assert threshold_path(last_layer, 5) == []
    unsure = TokenScores((10,), 30, 0 * scores.confidences[:1], scores.disagrees[:1], scores.documents)
    assert threshold_path(unsure, 5) == []


def test_any_confidence_fits(scores):
    """Counts, as patience has them, make few levels; the path then has few points."""
    counts = np.round(2 * scores.confidences) / 2
    patience = TokenScores(scores.layers, 30, counts, scores.disagrees, scores.documents)
    path = threshold_path(patience, 50)
    assert set(np.array(path).ravel().tolist()) <= {1.0, 0.9999, 0.4999, 0.0} and len(path) >= 3


def test_what_is_tested_was_planned_without_the_test_documents(scores):
    tuning, test = scores.of_documents(range(15)), scores.of_documents(range(15, 40))
    requirement = Requirement(0.7, 0.2, LARGEST)
    planned = plan(tuning, requirement, 8, 25)
    spoilt = TokenScores(test.layers, 30, test.confidences, test.disagrees | True, test.documents)
    honest, other = (certify(planned, each, requirement) for each in (test, spoilt))
    assert [point.planned for point in honest.points] == planned
    assert [point.planned for point in other.points] == planned
    assert honest.certified > other.certified
    for point in honest.points:
        assert (point.p_value <= 0.2) == (point.agreement_bound(0.2) >= 0.7 - 1e-6)
        assert point.agreement_bound(0.2) <= point.outcome.agreement
    assert honest.chosen is honest.points[honest.certified - 1]
    assert all(point.p_value <= 0.2 for point in honest.points[: honest.certified])
