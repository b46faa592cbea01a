# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The guarantee of calibrated thresholds: exactly where that can be computed, else over many calibrations."""

import itertools
import math
from functools import cache

import numpy as np
import pytest
from scipy import stats

from nemo_ee.calibration import risk_control
from nemo_ee.calibration.exit_decisions import TokenScores
from nemo_ee.calibration.threshold_choice import Requirement, certify, estimate, plan, split_documents
from nemo_ee.calibration.vector_price import seconds_per_token
from tests.support.calibration_population import LARGEST, draw, made_up_prices, population

TARGET, DELTA = 0.85, 0.1
REQUIREMENT = Requirement(TARGET, DELTA, LARGEST)
TUNING, TEST, LEVELS = 60, 200, 10
CALIBRATIONS, BROKEN = 120, 80
BAD_SHARE = 0.12
PRICES = made_up_prices()


def test_wealth_is_the_product_of_the_bets():
    losses, sizes = np.array([0.0, 2.0, 5.0]), np.array([4, 9, 10])
    wealth = 1.0
    for lost, size in zip(losses, sizes, strict=True):
        wealth *= 1.0 + 0.07 * (0.3 * size - lost)
    assert risk_control.log_wealth(losses, sizes, 0.3, 0.07) == pytest.approx(math.log(wealth))
    assert risk_control.p_value(losses, sizes, 0.3, 0.07) == pytest.approx(min(1.0, 1.0 / wealth))
    assert risk_control.p_value(np.array([10.0]), np.array([10]), 0.0, 0.1) == 1.0, "a total loss"


@pytest.mark.parametrize("bet", [0.03, 0.1, 0.25])
def test_mean_wealth_is_at_most_one_where_the_hypothesis_holds(bet):
    """Over all sequences of five documents of four kinds, every one equally probable."""
    kinds = [(0.0, 4), (1.0, 1), (2.0, 3), (0.0, 2)]
    true_risk = sum(lost for lost, _ in kinds) / sum(size for _, size in kinds)
    for risk, above in ((true_risk, False), (0.8 * true_risk, False), (1.2 * true_risk, True)):
        wealths = []
        for drawn in itertools.product(kinds, repeat=5):
            losses, sizes = map(np.array, zip(*drawn, strict=True))
            wealths.append(math.exp(risk_control.log_wealth(losses, sizes, risk, bet)))
        assert (np.mean(wealths) > 1.0 + 1e-9) == above
        if risk == true_risk:
            assert np.mean(wealths) == pytest.approx(1.0), "a fair game"


@pytest.mark.parametrize("delta", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("bet", [0.2, 0.6, 1.0])
def test_p_values_are_valid_for_single_tokens(bet, delta):
    """Documents of one token each: the number of bad ones is binomial, so the level is a finite sum."""
    documents, risk = 80, 0.1
    sizes = np.ones(documents, dtype=int)
    level = 0.0
    for bad in range(documents + 1):
        losses = (np.arange(documents) < bad).astype(float)
        if risk_control.p_value(losses, sizes, risk, bet) <= delta:
            level += stats.binom.pmf(bad, documents, risk)
    assert level <= delta
    assert level > 0.0 or bet < 0.3 or delta < 0.05, "the case must be tried"


def test_upper_bound_inverts_the_test():
    rng = np.random.default_rng(0)
    for _ in range(20):
        sizes = rng.integers(1, 21, 60)
        losses = rng.binomial(sizes, 0.1).astype(float)
        bound = risk_control.upper_bound(losses, sizes, 0.05, 0.03)
        assert risk_control.p_value(losses, sizes, bound, 0.03) <= 0.05
        assert risk_control.p_value(losses, sizes, bound - 1e-4, 0.03) > 0.05
        assert bound > losses.sum() / sizes.sum()
    assert risk_control.upper_bound(np.array([3.0]), np.array([4]), 0.05, 0.05) == 1.0, (
        "one document says little"
    )


def hoeffding_bentkus(losses, sizes, risk):
    """Learn then Test's p-value (arXiv:2110.01052), of documents padded to the largest size by loss `risk`."""
    means = (losses + risk * (LARGEST - sizes)) / LARGEST
    mean, count = min(means.mean(), risk), len(means)
    entropy = (1 - mean) * math.log((1 - mean) / (1 - risk)) + (mean * math.log(mean / risk) if mean else 0.0)
    bentkus = math.e * stats.binom.cdf(math.ceil(count * means.mean()), count, risk)
    return min(1.0, bentkus, math.exp(-count * entropy))


def test_betting_is_stronger_than_hoeffding_bentkus():
    rng = np.random.default_rng(1)
    people = population(3)
    outcome = draw(people, 400, rng).leave_with((0.85, 0.8))
    risk = 1.0 - outcome.agreement + 0.02
    bet = risk_control.choose_bet(outcome.disagreements, outcome.sizes, risk, 0.05, 400, LARGEST)
    test = draw(people, 400, rng).leave_with((0.85, 0.8))
    ours = risk_control.p_value(test.disagreements, test.sizes, risk, bet)
    assert ours < 0.5 * hoeffding_bentkus(test.disagreements, test.sizes, risk)


def test_the_bet_is_about_the_best_there_is():
    """Where a test can just succeed, no other constant bet needs much fewer bad tokens."""
    rng = np.random.default_rng(2)
    sizes = rng.integers(1, 21, 10_000)
    losses = rng.binomial(sizes, 0.1).astype(float)
    bet = risk_control.choose_bet(losses[:5000], sizes[:5000], 0.11, 0.05, 5000, 20)
    assert 0.0 < bet < 1 / 20
    bounds = [
        risk_control.upper_bound(losses[5000:], sizes[5000:], 0.05, other)
        for other in np.geomspace(1e-4, 0.05, 60)
    ]
    ours = risk_control.upper_bound(losses[5000:], sizes[5000:], 0.05, bet)
    assert ours - 0.1 < 1.05 * (min(bounds) - 0.1)
    even = np.full(9, 4)
    assert risk_control.choose_bet(np.zeros(9), even, 0.1, 0.05, 50, 20) == 1 / 20, "no variance: the most"


def test_fixed_sequence_stops_at_the_first_that_is_not_rejected():
    assert risk_control.fixed_sequence([0.01, 0.05, 0.2, 0.001], 0.05) == 2
    assert risk_control.fixed_sequence([0.9, 0.0], 0.05) == 0
    assert risk_control.fixed_sequence([0.0, 0.0], 0.05) == 2 and risk_control.fixed_sequence([], 0.05) == 0


@pytest.mark.parametrize("sizes", [[128], [128, 40], [7, 90, 128]])
def test_documents_needed_is_where_a_faultless_test_succeeds(sizes):
    sizes = np.array(sizes)
    count = risk_control.documents_needed(sizes, 0.05, 0.05, 128)
    for documents, enough in ((count + len(sizes), True), (count - len(sizes), False)):
        drawn = np.resize(sizes, documents)
        assert (risk_control.p_value(drawn * 0.0, drawn, 0.05, 1 / 128) <= 0.05) == enough
    assert risk_control.documents_needed(np.array([128]), 0.05, 0.05, 128) == 62


@cache
def calibrations(bad_share, choose, count=CALIBRATIONS):
    """What many calibrations chose, full depth where they failed: true agreements, these at worst, speed-ups."""
    people, rng = population(5, bad_share=bad_share), np.random.default_rng(7)
    found = []
    for _ in range(count):
        thresholds = choose(draw(people, TUNING, rng), draw(people, TEST, rng))
        found.append(truth(people, thresholds or (1.0, 1.0)))
    return np.array(found).T


def truth(people, thresholds):
    outcome = people.leave_with(thresholds)
    seconds = seconds_per_token(people, outcome.exits, thresholds, PRICES)
    return outcome.agreement, outcome.agreement_at_worst, PRICES.full_depth(1) / seconds


def calibrated(tuning, test):
    planned = plan(tuning, REQUIREMENT, LEVELS, len(test.sizes), PRICES)
    choice = certify(planned, test, REQUIREMENT, PRICES)
    return choice.chosen and choice.chosen.planned.thresholds


def measured_only(tuning, test):
    """Takes the last point that kept the target on the test documents, as if that were certain."""
    points = plan(tuning, REQUIREMENT, LEVELS, len(test.sizes), PRICES)
    kept = [point.thresholds for point in points if test.leave_with(point.thresholds).agreement >= TARGET]
    return kept[-1] if kept else None


def point_estimate(tuning, test):
    choice = estimate(test, REQUIREMENT, LEVELS, PRICES)
    return choice.chosen and choice.chosen.planned.thresholds


def tokens_as_documents(tuning, test):
    """The same procedure, were every token independent of the others of its document."""

    def alone(scores):
        owner = np.arange(len(scores.documents))
        return TokenScores(scores.layers, scores.num_layers, scores.confidences, scores.disagrees, owner)

    tuning, test = alone(tuning), alone(test)
    requirement = Requirement(TARGET, DELTA, 1)
    choice = certify(plan(tuning, requirement, LEVELS, len(test.sizes), PRICES), test, requirement, PRICES)
    return choice.chosen and choice.chosen.planned.thresholds


def violations(agreements):
    """99 % Clopper-Pearson interval of the probability of an agreement below the target."""
    broken, count = int((agreements < TARGET).sum()), len(agreements)
    low = stats.beta.ppf(0.005, broken, count - broken + 1) if broken else 0.0
    return low, stats.beta.ppf(0.995, broken + 1, count - broken)


@pytest.mark.parametrize("bad_share", [0.0, BAD_SHARE])
def test_the_target_is_missed_no_more_often_than_delta(bad_share):
    """Also at worst, so whichever exits decoding asks; the agreement itself is no lower."""
    agreements, at_worst, _ = calibrations(bad_share, calibrated)
    assert violations(at_worst)[1] <= DELTA and (agreements >= at_worst).all()
    assert (agreements < 1.0).mean() > 0.9, "what certifies nothing keeps every promise"


@pytest.mark.parametrize("seed", range(3))
def test_agreement_at_worst_bounds_every_way_to_skip_exits(seed):
    """Whatever decides at each token which exits are asked: here chance, and an adversary who knows the tokens."""
    people, rng = population(seed, documents=60), np.random.default_rng(seed)
    for thresholds in ((0.7, 0.6), (0.5, 0.8), (1.0, 0.4)):
        outcome = people.leave_with(thresholds)
        skipped = [rng.random(people.confidences.shape) < share for share in (0.2, 0.7)]
        skipped.append(~people.disagrees)
        for each in skipped:
            asked = TokenScores(
                people.layers,
                people.num_layers,
                np.where(each, 0.0, people.confidences),
                people.disagrees,
                people.documents,
            )
            wrong = asked.leave_with(thresholds).disagreements
            assert (wrong <= outcome.at_worst).all()
        assert (wrong == outcome.at_worst).all(), "the adversary reaches the bound"
        assert thresholds[0] == 1.0 or (outcome.at_worst > outcome.disagreements).any()


def test_power():
    """Most of what could be saved, did one know the truth, is saved."""
    agreements, _, speedups = calibrations(0.0, calibrated)
    people = population(5)
    possible = estimate(people, REQUIREMENT, LEVELS, PRICES).chosen
    best = truth(people, possible.planned.thresholds)[2]
    assert best > 1.2 and (speedups.mean() - 1.0) / (best - 1.0) > 0.7
    assert TARGET < agreements.mean() < TARGET + 0.05


@pytest.mark.parametrize("choose", [measured_only, tokens_as_documents, point_estimate])
def test_the_simulation_would_show_a_broken_promise(choose):
    agreements, _, _ = calibrations(BAD_SHARE, choose, BROKEN)
    assert violations(agreements)[0] > DELTA


def test_the_split_is_disjoint_and_complete():
    tuning, test = split_documents(41, 0.25, seed=3)
    assert sorted([*tuning, *test]) == list(range(41)) and len(tuning) == 10
    assert len(split_documents(5, 0.01, seed=0)[0]) == 2, "a variance needs two"
    assert not np.array_equal(tuning, split_documents(41, 0.25, seed=4)[0])
