# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""How many tokens to draft before the full model verifies them."""

from dataclasses import dataclass

LONGEST = 8
"""Tokens drafted at most."""
MEMORY = 0.9
"""How much of an average a new round leaves."""
TRIAL = 6
"""Rounds before drafting may be found not to pay."""
FIRST_PAUSE, LONGEST_PAUSE = 16, 256
"""Tokens at full depth after drafting did not pay: doubled every time in a row that it did not."""


@dataclass(frozen=True)
class PassCosts:
    """What passes of one token cost, in any unit, and how that grows with tokens.

    Deterministic, not measured: the same request then drafts alike, on every rank and in every run.

    Attributes:
        shallow: to the last exit.
        heads: of the exits asked.
        deep: from the last exit to the final one, output layer included.
        marginal: cost of each further token of a pass over that of the first. Decoding reads all weights for a
            pass, whatever its tokens; until arithmetic dominates these are almost free.
    """

    shallow: float
    heads: float
    deep: float
    marginal: float = 0.05

    def full_depth(self, sequences: int) -> float:
        """One token for each of some sequences, without exits."""
        return (self.shallow + self.deep) * self._growth(sequences)

    def shallow_pass(self, sequences: int) -> float:
        """One token to the last exit, no exit asked."""
        return self.shallow * self._growth(sequences)

    def draft(self, sequences: int) -> float:
        """One token to the last exit, exits asked."""
        return (self.shallow + self.heads) * self._growth(sequences)

    def verify(self, tokens: int) -> float:
        """Some tokens from the last exit on."""
        return self.deep * self._growth(tokens)

    def _growth(self, tokens: int) -> float:
        return 1 + self.marginal * (max(tokens, 1) - 1)


class DraftLength:
    """Chooses the number of drafts of the next round of a batch, from how earlier rounds went.

    A round drafts tokens with exits, then verifies all at once. With acceptance rate a, n drafts give
    1 + a + … + a^n tokens expected; the n with most tokens per cost is chosen. If rounds as they really went
    (exits that were not sure included) gave fewer tokens per cost than full depth, drafting pauses.

    Args:
        costs: of passes.
    """

    def __init__(self, costs: PassCosts):
        self.costs = costs
        self.acceptance = 0.8
        self._pause, self._waiting = FIRST_PAUSE, 0
        self._begin_trial()

    def _begin_trial(self) -> None:
        self._rounds, self._worth, self._cost = 0, 0.0, 0.0

    def next(self, sequences: int) -> int:
        """Tokens to draft per sequence now; 0 for a token at full depth.

        Args:
            sequences: that decode together.
        """
        if self._waiting > 0:
            self._waiting -= 1
            return 0
        return max(range(1, LONGEST + 1), key=lambda n: self._rate(n, sequences))

    def observe(self, cost: float, committed: int, accepted: int, rejected: int, sequences: int) -> None:
        """Reports a round.

        Args:
            cost: of its passes.
            committed: tokens that it gave.
            accepted: drafts that the full model agreed with.
            rejected: first drafts of sequences that it did not agree with; those behind say nothing.
            sequences: that took part.
        """
        if accepted + rejected:
            share = accepted / (accepted + rejected)
            self.acceptance += (1 - MEMORY) * (share - self.acceptance)
        self._rounds += 1
        self._worth = MEMORY * self._worth + committed / sequences * self.costs.full_depth(sequences)
        self._cost = MEMORY * self._cost + cost
        if self._rounds < TRIAL:
            return
        if self._worth < self._cost:
            self._waiting, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE)
            self._begin_trial()
        else:
            self._pause = FIRST_PAUSE

    def _rate(self, drafts: int, sequences: int) -> float:
        tokens = sum(self.acceptance**n for n in range(drafts + 1))
        verified = self.costs.shallow_pass(sequences) + self.costs.verify(sequences * (drafts + 1))
        return tokens / (drafts * self.costs.draft(sequences) + verified)
