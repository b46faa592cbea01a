# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Decisions of thresholds and the path through them, against slow references."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from nemo_ee.calibration.exit_decisions import TokenScores, first_exits
from nemo_ee.calibration.threshold_choice import Requirement, certify, estimate, plan
from nemo_ee.calibration.threshold_grid import threshold_grid, threshold_levels
from nemo_ee.calibration.vector_price import seconds_per_token
from nemo_ee.evaluation.teacher_forced import ExitScores, TextScores
from tests.support.calibration_population import LARGEST, made_up_prices, population


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
    at_worst = np.zeros(40)
    for token, document in enumerate(scores.documents):
        n = slow_exit(scores.confidences[:, token], thresholds)
        wrong[document] += n < 2 and scores.disagrees[n, token]
        at_worst[document] += any(
            slow_exit(scores.confidences[[k], token], [thresholds[k]]) == 0 and scores.disagrees[k, token]
            for k in range(2)
        )
        sizes[document] += 1
        left[n] += 1
        layers += (10, 20, 30)[n]
    assert np.array_equal(outcome.at_worst, at_worst)
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


class SlowDecoder:
    """What a decoder does with one text after another, token by token, and what that costs: what waits at each exit is
    counted as decoding counts it."""

    def __init__(self, scores, thresholds, prices):
        self.scores, self.thresholds, self.prices = scores, thresholds, prices
        self.asked = [n for n, threshold in enumerate(thresholds) if threshold < 1.0]
        self.seconds = 0.0

    def run(self):
        for document in range(len(self.scores.sizes)):
            self.waiting = dict.fromkeys(self.asked, 0)
            for token in np.flatnonzero(self.scores.documents == document):
                self.step(token)
        return self.seconds / len(self.scores.documents)

    def step(self, token):
        low, width = 0, 1
        for n in self.asked:
            layer = self.scores.layers[n]
            self.seconds += self.prices.segment(low, layer, width) if layer > low else 0.0
            self.seconds += self.prices.head(layer, 1)
            self.waiting[n] += width
            if self.scores.confidences[n, token] > self.thresholds[n]:
                return
            low, width, self.waiting[n] = layer, self.waiting[n], 0
        if low < self.scores.num_layers:
            self.seconds += self.prices.segment(low, self.scores.num_layers, width)
        self.seconds += self.prices.output(1)


VECTORS = [(0.7, 0.6), (1.0, 0.5), (0.3, 1.0), (0.0, 0.0), (1.0, 1.0), (0.9, 0.0), (0.2, 0.3)]


@pytest.mark.parametrize("thresholds", VECTORS)
@pytest.mark.parametrize("layers", [(10, 20), (12, 30)])
def test_the_price_is_that_of_a_decoder_token_by_token(scores, thresholds, layers):
    scores, prices = dataclasses.replace(scores, layers=layers), made_up_prices(layers)
    found = seconds_per_token(scores, scores.leave_with(thresholds).exits, thresholds, prices)
    assert found == pytest.approx(SlowDecoder(scores, thresholds, prices).run())
    if thresholds == (1.0, 1.0):
        assert found == pytest.approx(prices.full_depth(1)), "heads that are not asked cost nothing"


def test_grid_counts_as_thresholds_do(scores):
    """All vectors, all numbers; seconds nearly, as a pass's time grows not quite linearly."""
    prices = made_up_prices()
    grid = threshold_grid(scores, 6, prices)
    assert grid.ladders[0][0] == grid.ladders[1][0] == 1.0 and grid.seconds.size >= 49
    for at in np.ndindex(grid.seconds.shape):
        thresholds = tuple(row[n] for row, n in zip(grid.ladders, at, strict=True))
        outcome = scores.leave_with(thresholds)
        assert grid.disagreements[at] == outcome.disagreements.sum()
        assert grid.at_worst[at] == outcome.at_worst.sum()
        exact = seconds_per_token(scores, outcome.exits, thresholds, prices)
        assert grid.seconds[at] == pytest.approx(exact, rel=0.08)
    assert grid.seconds[0, 0] == pytest.approx(prices.full_depth(1))
    linear = dataclasses.replace(prices, layer=tuple(1.0 + 0.2 * (n - 1) for n in prices.tokens))
    text = dataclasses.replace(scores, documents=0 * scores.documents)  # one end, where hardly anything waits
    grid = threshold_grid(text, 6, linear)
    for at in ((3, 4), (0, 5), (4, 0), (5, 3)):
        thresholds = tuple(row[n] for row, n in zip(grid.ladders, at, strict=True))
        exact = seconds_per_token(text, text.leave_with(thresholds).exits, thresholds, linear)
        assert grid.seconds[at] == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("head", [0.5, 3.0])
@pytest.mark.parametrize("seed", range(2))
def test_the_estimate_is_the_fastest_of_all_vectors(seed, head):
    """Every vector of the grid, priced token by token: none that agrees as often is more than a little faster."""
    people, prices = population(seed, documents=30), made_up_prices(head=head)
    requirement = Requirement(0.85, 0.1, LARGEST)
    choice = estimate(people, requirement, 12, prices)
    best = prices.full_depth(1)
    for thresholds in itertools.product(*((1.0, *threshold_levels(row, 12)) for row in people.confidences)):
        outcome = people.leave_with(thresholds)
        if outcome.agreement >= 0.85:
            best = min(best, seconds_per_token(people, outcome.exits, thresholds, prices))
    chosen = choice.chosen
    assert chosen.outcome.agreement >= 0.85 and choice.full_depth == prices.full_depth(1)
    assert best <= chosen.seconds <= 1.01 * best < prices.full_depth(1)
    assert chosen.seconds == min(point.seconds for point in choice.points[: choice.kept])
    assert all(
        (point.outcome.agreement >= 0.85) == (n < choice.kept) for n, point in enumerate(choice.points)
    )
    assert all(point.p_value is None and point.agreement_bound(0.1) is None for point in choice.points)


def test_what_pays_depends_on_prices():
    """Of two exits of which the later says all that the first does and more, the first is left out where its head is
    dear; with dear heads nothing pays."""
    people, requirement = population(1, documents=60), Requirement(0.9, 0.1, LARGEST)
    found = {head: estimate(people, requirement, 30, made_up_prices(head=head)) for head in (0.01, 2.0, 40.0)}
    asked = {head: sum(t < 1.0 for t in c.chosen.planned.thresholds) for head, c in found.items() if c.chosen}
    assert asked == {0.01: 2, 2.0: 1} and found[40.0].points == () and found[40.0].number == 0


def test_many_exits_are_searched_a_few_at_a_time():
    """Of six exits, of which five know nothing, the one that does is found."""
    rng, people = np.random.default_rng(0), population(2, documents=40)
    layers, tokens = (4, 8, 12, 16, 20, 24), len(people.documents)
    confidences, disagrees = rng.random((6, tokens)), np.ones((6, tokens), dtype=bool)
    confidences[4], disagrees[4] = people.confidences[1], people.disagrees[1]
    scores = TokenScores(layers, 30, confidences, disagrees, people.documents)
    choice = estimate(scores, Requirement(0.9, 0.1, LARGEST), 12, made_up_prices(layers))
    asked = [
        n for n, threshold in zip(layers, choice.chosen.planned.thresholds, strict=True) if threshold < 1.0
    ]
    alone = TokenScores((20,), 30, confidences[4:5], disagrees[4:5], people.documents)
    best = estimate(alone, Requirement(0.9, 0.1, LARGEST), 12, made_up_prices((20,)))
    assert asked == [20] and choice.chosen.seconds <= 1.01 * best.chosen.seconds


def test_path_goes_from_strict_to_lenient_and_is_ever_faster(scores):
    prices, requirement = made_up_prices(), Requirement(0.85, 0.1, LARGEST)
    planned = plan(scores, requirement, 20, 40, prices)
    outcomes = [scores.leave_with(each.thresholds) for each in planned]
    seconds = [
        seconds_per_token(scores, outcome.exits, each.thresholds, prices)
        for each, outcome in zip(planned, outcomes, strict=True)
    ]
    worst = [outcome.at_worst.sum() for outcome in outcomes]
    assert len(planned) > 10 and prices.full_depth(1) > seconds[0]
    assert seconds == sorted(seconds, reverse=True) and len(set(seconds)) == len(seconds)
    assert worst == sorted(worst) and worst[0] <= 0.02 * len(scores.documents)


def test_path_without_anything_to_save_is_empty(scores):
    requirement = Requirement(0.85, 0.1, LARGEST)
    last_layer = TokenScores((30,), 30, scores.confidences[:1], scores.disagrees[:1], scores.documents)
    assert plan(last_layer, requirement, 5, 9, made_up_prices((30,), output=0.5)) == []
    unsure = TokenScores((10,), 30, 0 * scores.confidences[:1], scores.disagrees[:1], scores.documents)
    assert plan(unsure, requirement, 5, 9, made_up_prices((10,))) == []


def test_any_confidence_fits(scores):
    """Counts, as patience has them, make few levels; the path then has few points."""
    counts = np.round(2 * scores.confidences) / 2
    patience = TokenScores(scores.layers, 30, counts, scores.disagrees, scores.documents)
    path = [
        each.thresholds for each in plan(patience, Requirement(0.6, 0.1, LARGEST), 50, 9, made_up_prices())
    ]
    assert set(np.array(path).ravel().tolist()) <= {1.0, 0.9999, 0.4999, 0.0} and len(path) >= 2


def test_what_is_tested_was_planned_without_the_test_documents(scores):
    tuning, test = scores.of_documents(range(15)), scores.of_documents(range(15, 40))
    requirement = Requirement(0.7, 0.2, LARGEST)
    prices = made_up_prices()
    planned = plan(tuning, requirement, 8, 25, prices)
    spoilt = TokenScores(test.layers, 30, test.confidences, test.disagrees | True, test.documents)
    honest, other = (certify(planned, each, requirement, prices) for each in (test, spoilt))
    assert [point.planned for point in honest.points] == planned
    assert [point.planned for point in other.points] == planned
    assert honest.kept > other.kept
    for point in honest.points:
        assert (point.p_value <= 0.2) == (point.agreement_bound(0.2) >= 0.7 - 1e-6)
        assert point.agreement_bound(0.2) <= point.outcome.agreement_at_worst <= point.outcome.agreement
    assert honest.chosen.seconds == min(point.seconds for point in honest.points[: honest.kept])
    assert all(point.p_value <= 0.2 for point in honest.points[: honest.kept])
