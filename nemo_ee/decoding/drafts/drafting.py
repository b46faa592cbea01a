# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Which exit drafts how many tokens before the full model verifies them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from nemo_ee.decoding.drafts.pass_costs import PassCosts

LONGEST = 8
"""Tokens drafted at most."""
LOSS = 0.02
"""Share of full depth's cost that drafting may lose, all in all, whatever happens."""
CREDIT = 16
"""Tokens whose share may be lost before they are decoded; without it a text would begin at full depth, with more a text
of ten tokens could lose over 5 %."""
MARGIN = 0.03
"""Gain that a round must promise at least: `PassCosts` are not more exact than that."""
PRIOR_SURE, PRIOR_ACCEPTED, PRIOR_WEIGHT = 0.5, 0.8, 3.0
"""What is expected of an exit before it is asked, and how many observations that is worth. Hopeful, since
`LOSS` bounds what hope costs, and an exit that is never tried stays unknown."""
MEMORY = 100.0
"""Observations that count; older ones fade, so that expectations follow a text that changes."""
SAVED = 128
"""Tokens whose share may be saved up while nothing is lost, at most: what one bad text may lose beyond its own."""
FORGET = 0.01
"""How far expectations return to those with every token at full depth, so that an exit is tried again."""


@dataclass(frozen=True)
class Round:
    """What the sequences of a batch do next.

    Attributes:
        exit_index: of the exit that drafts.
        length: drafts per sequence, at most.
    """

    exit_index: int
    length: int


@dataclass
class Outcome:
    """How a round went, over all sequences.

    Attributes:
        cost: of its passes.
        tokens: that it gave.
        asked: how often the exit was asked.
        drafts: how often it was sure.
        accepted: drafts that the full model agreed with.
        rejected: first drafts of sequences that it did not agree with; those behind say nothing.
    """

    cost: float = 0.0
    tokens: int = 0
    asked: int = 0
    drafts: int = 0
    accepted: int = 0
    rejected: int = 0


class RoundCosts(Protocol):
    """What the passes of a round cost, see `PassCosts`."""

    def shallow(self, exit_index: int, tokens: float) -> float:
        """Tokens in one pass to an exit that is not asked."""

    def asked(self, exit_index: int, tokens: float) -> float:
        """An exit's head on tokens."""

    def verify(self, exit_index: int, tokens: float) -> float:
        """Tokens in one pass from an exit on."""


class Frequency:
    """How often something happens, as seen so far.

    Args:
        prior: expected before.
    """

    def __init__(self, prior: float):
        self._prior = prior
        self._yes, self._all = prior * PRIOR_WEIGHT, PRIOR_WEIGHT

    @property
    def mean(self) -> float:
        """Between 0 and 1."""
        return self._yes / self._all

    def observe(self, yes: int, of: int) -> None:
        """Counts what happened."""
        self._yes += yes
        self._all += of
        if self._all > MEMORY:
            self._yes *= MEMORY / self._all
            self._all = MEMORY

    def forget(self) -> None:
        """Goes a little towards what was expected before."""
        self._yes += FORGET * (self._prior * PRIOR_WEIGHT - self._yes)
        self._all += FORGET * (PRIOR_WEIGHT - self._all)


class DraftingPolicy:
    """Chooses rounds that are expected to give most tokens per cost, full depth among them.

    An exit that is sure of a token with frequency s, and right then with frequency a, gives in a round of at
    most n drafts 1 + sa + … + (sa)^n tokens expected. What it costs follows from how many sequences are still
    drafting after each. Rounds are only taken if the sum of all costs so far would stay within 1 + `LOSS` of full
    depth's even if every draft were rejected (`CREDIT` tokens' worth apart, and `SAVED` after texts that lost
    nothing): that holds for any text, and exits that never pay are hardly tried. `MARGIN` keeps rounds from being
    taken for gains that are not there.

    Args:
        costs: of passes.
    """

    def __init__(self, costs: PassCosts):
        self.costs = costs
        self.sure = [Frequency(PRIOR_SURE) for _ in costs.head]
        self.right = [Frequency(PRIOR_ACCEPTED) for _ in costs.head]
        self._saved = 0.0
        """Cost that may be lost beyond `CREDIT`; negative where some of that is spent."""

    def next(self, sequences: int, exits: Sequence[int]) -> Round | None:
        """The round to come; None for a token at full depth.

        Args:
            sequences: that decode together.
            exits: indices of those that may draft.
        """
        allowance = self._saved + LOSS * CREDIT * self.costs.full_depth(sequences)
        best, rate = None, (1 + MARGIN) * sequences / self.costs.full_depth(sequences)
        for k in exits:
            before = 0.0
            for n in range(1, LONGEST + 1):
                if self._worst(k, n, sequences) > allowance:
                    break
                expected = expected_rate(self.costs, k, n, sequences, self.sure[k].mean, self.right[k].mean)
                if expected > rate:
                    best, rate = Round(k, n), expected
                if expected < before:  # longer rounds are worse still
                    break
                before = expected
        return best

    def observe(self, round_: Round, outcome: Outcome, sequences: int) -> None:
        """Learns from a round of some sequences."""
        self.sure[round_.exit_index].observe(outcome.drafts, outcome.asked)
        self.right[round_.exit_index].observe(outcome.accepted, outcome.accepted + outcome.rejected)
        self._account(outcome.tokens / sequences, outcome.cost, sequences)

    def observe_full_depth(self, sequences: int) -> None:
        """A token at full depth for each of some sequences."""
        self._account(1, self.costs.full_depth(sequences), sequences)
        for frequency in (*self.sure, *self.right):
            frequency.forget()

    def _account(self, tokens: float, cost: float, sequences: int) -> None:
        """Tokens of each of some sequences, and what they cost in all."""
        full = self.costs.full_depth(sequences)
        self._saved = min(self._saved + (1 + LOSS) * tokens * full - cost, LOSS * SAVED * full)

    def _worst(self, k: int, n: int, sequences: int) -> float:
        """What a round loses whose drafts are all rejected."""
        drafting = n * (self.costs.shallow(k, sequences) + self.costs.asked(k, sequences))
        rest = self.costs.shallow(k, sequences) + self.costs.verify(k, sequences * (n + 1))
        return drafting + rest - self.costs.full_depth(sequences)


def expected_rate(
    costs: RoundCosts, exit_index: int, length: int, sequences: int, sure: float, right: float
) -> float:
    """Tokens that a round is expected to give per cost.

    Args:
        costs: of passes.
        exit_index: of the exit that drafts.
        length: drafts per sequence, at most.
        sequences: that decode together.
        sure: how often the exit is sure of a token.
        right: how often the full model agrees with it then.
    """
    cost = tokens = fed = 0.0
    for i in range(length + 1):
        drafting = sequences * sure**i  # sequences that are not waiting yet
        any_is = 1 - (1 - sure**i) ** sequences
        if any_is > 0:
            together = drafting / any_is
            once = costs.shallow(exit_index, together)
            if i < length:
                once += costs.asked(exit_index, together)
            cost += any_is * once
        fed += drafting
        tokens += sequences * (sure * right) ** i
    return tokens / (cost + costs.verify(exit_index, fed))
