# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Learn then Test (arXiv:2110.01052) for exit thresholds: a path is planned on some documents, tested on others.

`plan` sees the tuning documents alone and fixes everything that the tests depend on: which thresholds, in which
order, with which bets. `certify` then walks along the path on the test documents for as long as the agreement is
certain enough. As the plan does not depend on the test documents, the thresholds it stops at keep their promise
with a probability of at least 1 - delta, whatever the tuning documents were. Agreement is 1 - risk of
`nemo_ee.calibration.risk_control`: a share of tokens, not a mean of documents' shares.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nemo_ee.calibration.exit_decisions import ExitOutcome, TokenScores
from nemo_ee.calibration.risk_control import choose_bet, fixed_sequence, p_value, upper_bound
from nemo_ee.calibration.threshold_path import threshold_path
from nemo_ee.decoding.leaving import NEVER


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
    """Thresholds, one per exit, and the bet that tests them."""

    thresholds: tuple[float, ...]
    bet: float


@dataclass(frozen=True)
class PathPoint:
    """What the test documents said about one point of the path.

    Attributes:
        planned: its thresholds and bet.
        p_value: of the hypothesis that their agreement is lower than required.
        outcome: on the test documents.
    """

    planned: PlannedPoint
    p_value: float
    outcome: ExitOutcome

    def agreement_bound(self, delta: float) -> float:
        """The agreement lies above it with a probability of at least 1 - delta, for this point taken alone."""
        return 1.0 - upper_bound(self.outcome.disagreements, self.outcome.sizes, delta, self.planned.bet)


@dataclass(frozen=True)
class Choice:
    """The path as far as it was planned, and how far it is certified.

    Attributes:
        points: all of the path, from strict to lenient.
        certified: how many from the first on keep the required agreement, all at once with a probability of at
            least 1 - delta.
    """

    points: tuple[PathPoint, ...]
    certified: int

    @property
    def chosen(self) -> PathPoint | None:
        """The last certified point, which lets most tokens leave; None if nothing is certified."""
        return self.points[self.certified - 1] if self.certified else None


def split_documents(count: int, tuning_share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the tuning documents, two at least, and of the test documents: disjoint, drawn at random."""
    tuning = max(2, round(count * tuning_share))
    order = np.random.default_rng(seed).permutation(count)
    return np.sort(order[:tuning]), np.sort(order[tuning:])


def plan(tuning: TokenScores, requirement: Requirement, levels: int, tested: int) -> list[PlannedPoint]:
    """The path to test.

    Args:
        tuning: scores of the tuning documents, two at least.
        requirement: what is asked.
        levels: thresholds per exit; see `threshold_path`.
        tested: documents that it will be tested on.
    """
    planned = []
    for thresholds in threshold_path(tuning, levels):
        outcome = tuning.leave_with(thresholds)
        bet = choose_bet(
            outcome.disagreements,
            outcome.sizes,
            requirement.risk,
            requirement.delta,
            tested,
            requirement.largest,
        )
        planned.append(PlannedPoint(thresholds, bet))
    return planned


def certify(planned: Sequence[PlannedPoint], test: TokenScores, requirement: Requirement) -> Choice:
    """Walks along the path.

    Args:
        planned: without any knowledge of the test documents.
        test: scores of the test documents.
        requirement: what was asked when it was planned.
    """
    points = []
    for each in planned:
        outcome = test.leave_with(each.thresholds)
        p = p_value(outcome.disagreements, outcome.sizes, requirement.risk, each.bet)
        points.append(PathPoint(each, p, outcome))
    certified = fixed_sequence([point.p_value for point in points], requirement.delta)
    return Choice(tuple(points), certified)


def nothing_leaves(layers: Sequence[int]) -> tuple[float, ...]:
    """Thresholds that keep every agreement: no token leaves early."""
    return (NEVER,) * len(layers)
