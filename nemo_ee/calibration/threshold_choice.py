# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Which thresholds: the fastest, by the prices of passes, that keep an agreement.

With a guarantee, Learn then Test (arXiv:2110.01052): a path is planned on some documents, tested on others. `plan`
sees the tuning documents alone and fixes everything that the tests depend on: which thresholds, in which order, with
which bets. `certify` then walks along the path on the test documents for as long as the agreement is certain enough.
As the plan does not depend on the test documents, all thresholds up to where it stops keep their promise at once with
a probability of at least 1 - delta, whatever the tuning documents were; the fastest of them is taken. Agreement is
1 - risk of `nemo_ee.calibration.risk_control`: a share of tokens, not a mean of documents' shares. Tested is the
agreement at worst (`ExitOutcome.at_worst`), so that it holds, too, where decoding does not ask an exit.

Without one, a point estimate: `estimate` takes the fastest thresholds whose agreement on the documents at hand is as
asked for. As the same documents choose and measure, further ones agree less, more often than not.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from nemo_ee.calibration.exit_decisions import ExitOutcome, TokenScores, first_exits
from nemo_ee.calibration.risk_control import choose_bet, fixed_sequence, p_value, upper_bound
from nemo_ee.calibration.threshold_grid import threshold_grid
from nemo_ee.calibration.vector_price import seconds_per_token
from nemo_ee.decoding.leaving import NEVER
from nemo_ee.decoding.pass_prices import PassPrices

STEPS = 25
"""Points of the path up to the risk that is allowed, and as many behind it, evenly spaced."""
SHOWN_RISK, SHOWN_STEPS = 0.3, 20
"""How far the path goes on, for the frontier that is shown, and in how many steps."""
ROUNDING = 1e-6
"""Of numbers of tokens."""
GRID_EXITS = 4
"""Exits whose thresholds are searched together; of more, so many are taken."""


@dataclass(frozen=True)
class Requirement:
    """What is asked of thresholds.

    Attributes:
        agreement: share of tokens that shall equal the final exit's, within (0, 1).
        delta: probability with which less may be kept, within (0, 1).
        largest: tokens that a document can have.
    """

    agreement: float
    delta: float
    largest: int

    @property
    def risk(self) -> float:
        """Share of tokens that may differ from the final exit's."""
        return 1.0 - self.agreement


@dataclass(frozen=True)
class PlannedPoint:
    """Thresholds, one per exit, and the bet that tests them; a point estimate has none."""

    thresholds: tuple[float, ...]
    bet: float | None


@dataclass(frozen=True)
class PathPoint:
    """What the test documents said about one point of the path.

    Attributes:
        planned: its thresholds and bet.
        p_value: of the hypothesis that their agreement at worst is lower than required; None of a point estimate.
        outcome: on the test documents.
        seconds: that a token takes on them by the prices, mean.
    """

    planned: PlannedPoint
    p_value: float | None
    outcome: ExitOutcome
    seconds: float

    def agreement_bound(self, delta: float) -> float | None:
        """The agreement at worst lies above it with a probability of at least 1 - delta, for this point taken alone;
        None of a point estimate."""
        if self.planned.bet is None:
            return None
        return 1.0 - upper_bound(self.outcome.at_worst, self.outcome.sizes, delta, self.planned.bet)


@dataclass(frozen=True)
class Choice:
    """The path as far as it was planned, and how far it holds.

    Attributes:
        points: all of the path, from strict to lenient.
        kept: how many from the first on keep the required agreement: certified, all at once with a probability of at
            least 1 - delta; or, of a point estimate, on the documents at hand.
        full_depth: seconds of a token without exits.
    """

    points: tuple[PathPoint, ...]
    kept: int
    full_depth: float

    @property
    def number(self) -> int:
        """Of the fastest point that keeps the agreement, from 1; 0 if none does and is faster than full depth."""
        seconds = [point.seconds for point in self.points[: self.kept]]
        if not seconds or min(seconds) >= self.full_depth:
            return 0
        return 1 + seconds.index(min(seconds))

    @property
    def chosen(self) -> PathPoint | None:
        """That point."""
        return self.points[self.number - 1] if self.number else None


def split_documents(count: int, tuning_share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the tuning documents, two at least, and of the test documents: disjoint, drawn at random."""
    tuning = max(2, round(count * tuning_share))
    order = np.random.default_rng(seed).permutation(count)
    return np.sort(order[:tuning]), np.sort(order[tuning:])


def plan(
    tuning: TokenScores, requirement: Requirement, levels: int, tested: int, prices: PassPrices
) -> list[PlannedPoint]:
    """The path to test: for more and more disagreements on the tuning documents, the fastest thresholds.

    Args:
        tuning: scores of the tuning documents, two at least.
        requirement: what is asked.
        levels: thresholds per exit; see `threshold_grid`.
        tested: documents that it will be tested on.
        prices: of passes.
    """
    planned = []
    for thresholds in _frontier(tuning, requirement, levels, prices, at_worst=True):
        outcome = tuning.leave_with(thresholds)
        bet = choose_bet(
            outcome.at_worst,
            outcome.sizes,
            requirement.risk,
            requirement.delta,
            tested,
            requirement.largest,
        )
        planned.append(PlannedPoint(thresholds, bet))
    return planned


def certify(
    planned: Sequence[PlannedPoint], test: TokenScores, requirement: Requirement, prices: PassPrices
) -> Choice:
    """Walks along the path.

    Args:
        planned: without any knowledge of the test documents.
        test: scores of the test documents.
        requirement: what was asked when it was planned.
        prices: of passes.
    """
    points = []
    for each in planned:
        assert each.bet is not None, "planned to be tested"
        outcome = test.leave_with(each.thresholds)
        p = p_value(outcome.at_worst, outcome.sizes, requirement.risk, each.bet)
        points.append(_point(each, p, outcome, test, prices))
    certified = fixed_sequence([point.p_value for point in points], requirement.delta)
    return Choice(tuple(points), certified, prices.full_depth(1))


def estimate(scores: TokenScores, requirement: Requirement, levels: int, prices: PassPrices) -> Choice:
    """The point estimate, of which nothing is promised; all documents choose, and measure.

    Args:
        scores: of all documents.
        requirement: what is asked; its delta means nothing here.
        levels: thresholds per exit; see `threshold_grid`.
        prices: of passes.
    """
    points = []
    for thresholds in _frontier(scores, requirement, levels, prices, at_worst=False):
        outcome = scores.leave_with(thresholds)
        points.append(_point(PlannedPoint(thresholds, None), None, outcome, scores, prices))
    allowed = requirement.risk * len(scores.documents) + ROUNDING
    kept = fixed_sequence([point.outcome.disagreements.sum() for point in points], allowed)
    return Choice(tuple(points), kept, prices.full_depth(1))


def _point(
    planned: PlannedPoint, p: float | None, outcome: ExitOutcome, scores: TokenScores, prices: PassPrices
) -> PathPoint:
    return PathPoint(
        planned, p, outcome, seconds_per_token(scores, outcome.exits, planned.thresholds, prices)
    )


def _frontier(
    scores: TokenScores, requirement: Requirement, levels: int, prices: PassPrices, at_worst: bool
) -> list[tuple[float, ...]]:
    """For ascending numbers of tokens that may differ, the fastest thresholds, as far as they beat full depth."""
    tokens, risk = len(scores.documents), requirement.risk

    @cache
    def seconds(thresholds: tuple[float, ...]) -> float:
        return seconds_per_token(scores, first_exits(scores.confidences, thresholds), thresholds, prices)

    exits = _few_exits(scores, levels, prices, at_worst, risk * tokens, seconds)
    limits = np.linspace(0.0, 2.0 * risk, 2 * STEPS + 1)
    limits = [*limits, *np.linspace(2.0 * risk, max(SHOWN_RISK, 2.0 * risk), SHOWN_STEPS + 1)[1:]]
    path = [nothing_leaves(scores.layers)]
    grid = threshold_grid(scores, levels, prices, exits)
    for vectors in grid.fastest(at_worst, [tokens * limit + ROUNDING for limit in limits]):
        best = min((path[-1], *vectors), key=seconds)
        path += [best] * (best != path[-1])
    return path[1:]


def _few_exits(
    scores: TokenScores,
    levels: int,
    prices: PassPrices,
    at_worst: bool,
    limit: float,
    seconds: Callable[[tuple[float, ...]], float],
) -> list[int]:
    """Positions of all exits, or of the few that are searched together: one after the other, each that which makes a
    token fastest beside those before it, with `limit` tokens that differ."""
    left, taken = list(range(len(scores.layers))), []
    if len(left) <= GRID_EXITS:
        return left

    def with_it(n: int) -> float:
        grid = threshold_grid(scores, min(levels, SHOWN_STEPS), prices, sorted([*taken, n]))
        return min(map(seconds, grid.fastest(at_worst, [limit])[0]))

    while len(taken) < GRID_EXITS:
        best = min(left, key=with_it)
        left.remove(best)
        taken.append(best)
    return sorted(taken)


def nothing_leaves(layers: Sequence[int]) -> tuple[float, ...]:
    """Thresholds that keep every agreement: no token leaves early."""
    return (NEVER,) * len(layers)
