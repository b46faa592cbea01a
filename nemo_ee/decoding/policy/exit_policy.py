# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""When asking an exit pays, and drafting with it: by prices of passes, and by what the exits said so far."""

from collections.abc import Sequence
from dataclasses import dataclass

from nemo_ee.decoding.leaving import is_asked
from nemo_ee.decoding.pass_prices import PassPrices
from nemo_ee.decoding.policy.forecast import round_rate, step_price, worst_asking, worst_round
from nemo_ee.decoding.policy.observed_share import Share

LOSS = 0.01
"""Share of full depth's price that exits may lose, all in all, whatever they say. Of n sequences together it is an
n-th of that: a step of theirs teaches n times as much, and there exits have less to gain."""
CREDIT, SAVED = 50, 256
"""Tokens whose share may be lost before they are decoded: without it a text would begin at full depth. Tokens whose
share may be saved up while nothing is lost: what one bad text may lose beyond its own."""
MARGIN = 0.01, 0.03
"""Gain that asking and drafting must promise at least: prices are not more exact than that."""
PRIOR = {"left": 0.5, "sure": 0.5, "right": 0.8}
"""What is expected of an exit before it is asked: hopeful, since `LOSS` bounds what hope costs."""
LONGEST, PLAN_STEPS = 8, 8
"""Tokens drafted at most; steps until what is asked is thought over."""


Shares = dict[tuple[str, int, float], Share]
"""What is counted of an exit, its layer, and the threshold -> how often."""


@dataclass(frozen=True)
class Round:
    """So many drafts of each sequence, at most, by the exit of that index."""

    exit_index: int
    length: int


class ExitPolicy:
    """Decides for a session's sequences what is asked of exits, by equal numbers on all ranks and without a clock.

    All is priced, and an account kept against full depth. What may not pay is done only while the account, after the
    worst that can come of it, is no lower than `LOSS` of full depth's price so far (`CREDIT` and `SAVED` apart). So
    exits that never pay are hardly asked, whatever was expected of them, and learning goes on at that price.

    Args:
        prices: of passes.
        exit_layers: ascending.
        drafts: what exits' greedy drafts came to in sessions before, which this one adds to; None for nothing. Sampled
            ones are learned anew: how many drafts a round has says which random number is for what.

    Attributes:
        owed: tokens times layers that wait at exits, as last booked.
        greedy: whether nobody asks for more than the most probable tokens, in the step to come.
    """

    def __init__(self, prices: PassPrices, exit_layers: Sequence[int], drafts: Shares | None = None):
        self.prices, self.layers = prices, list(exit_layers)
        self._left: Shares = {}
        self._sampled: Shares = {}
        self._drafts: Shares = {} if drafts is None else drafts
        self.owed, self.greedy = 0, False
        self._saved, self._worst, self._steps = 0.0, 0.0, 0
        self._asked_for: tuple = ()
        self._plan = 0

    @property
    def _now(self) -> PassPrices:
        return self.prices.greedy if self.greedy else self.prices

    @property
    def _drafting(self) -> Shares:
        return self._drafts if self.greedy else self._sampled

    def share(self, kind: str, exit_index: int, threshold: float) -> Share:
        """How often a token has "left" by an exit, a draft of it was "sure", and then "right"."""
        key = kind, self.layers[exit_index], round(threshold, 2)
        shares = self._left if kind == "left" else self._drafting
        return shares.setdefault(key, Share(PRIOR[kind]))

    def settle(self, tokens: int, spent: float, sequences: int, owed: int) -> None:
        """Books a step.

        Args:
            tokens: that it gave.
            spent: price of its passes.
            sequences: that decode together.
            owed: tokens times layers that wait at exits; they are booked before they are run.
        """
        full, loss = self._now.full_depth(sequences), LOSS / sequences
        spent += (owed - self.owed) * self._now.later_layer
        self.owed = owed
        self._saved = min(self._saved + (1 + loss) * tokens / sequences * full - spent, loss * SAVED * full)

    def ask(self, rows: Sequence[Sequence[float]], others: int) -> int:
        """How many exits to ask in a step, from the first on; those behind are not asked.

        Never one behind an exit that is left out: so a token leaves where it would if all were asked, or goes through
        all layers, and agrees with full depth no less often.

        Args:
            rows: thresholds of all exits, of the sequences that it is decided for.
            others: sequences beside them, which go through all layers.
        """
        state = tuple(map(tuple, rows)), others, self.greedy
        if state != self._asked_for or self._steps >= PLAN_STEPS:
            self._asked_for, self._steps = state, 0
            self._plan, self._worst = self._best_plan(rows, others)
        self._steps += 1
        if self._worst > self._allowance(len(rows) + others):
            self._steps = PLAN_STEPS
            return 0
        return self._plan

    def observe(self, row: Sequence[float], layer: int) -> None:
        """Counts a token that these thresholds were asked for, `NEVER` for none, and that left at a layer."""
        for k, threshold in enumerate(row):
            if is_asked(threshold):
                self.share("left", k, threshold).observe(layer <= self.layers[k], 1)

    def _best_plan(self, rows: Sequence[Sequence[float]], others: int) -> tuple[int, float]:
        """The exits that promise most, and what asking them may lose."""
        count, plan, worst = len(rows), 0, 0.0
        least = (1 - MARGIN[0]) * self._now.full_depth(count + others)
        asked: list[int] = []
        left: list[float] = []
        for k, layer in enumerate(self.layers):
            users = [row[k] for row in rows if is_asked(row[k])]
            if users:
                asked.append(layer)
                left.append(sum(self.share("left", k, threshold).hoped for threshold in users) / count)
                price = step_price(self._now, asked, left, count, others)
                if price < least:
                    plan, least, worst = k + 1, price, worst_asking(self._now, asked, count, others)
        for k in range(plan, len(self.layers)):
            for threshold in {row[k] for row in rows if is_asked(row[k])}:
                self.share("left", k, threshold).forget(PLAN_STEPS)
        return plan, worst

    def draft(self, rows: Sequence[Sequence[float]]) -> Round | None:
        """The round to come of lossless sequences with these thresholds; None for a token at full depth."""
        best, most = None, 0.0
        for k, layer in enumerate(self.layers):
            users = [row[k] for row in rows if is_asked(row[k])]
            count, before = len(users), 0.0
            for n in range(1, LONGEST + 1) if users else ():
                if worst_round(self._now, layer, n, count) > self._allowance(count):
                    break
                sure, right = (
                    sum(self.share(kind, k, t).mean for t in users) / count for kind in ("sure", "right")
                )
                full = self._now.full_depth(count)
                rate = round_rate(self._now, layer, n, count, sure, right)
                gain = full - count / rate
                if gain > max(most, full * (1 - 1 / (1 + MARGIN[1]))):
                    best, most = Round(k, n), gain
                if rate < before:  # longer rounds are worse still
                    break
                before = rate
        if best is None:  # what others have learned, at other thresholds, stays
            asked = {(k, row[k]) for row in rows for k in range(len(self.layers)) if is_asked(row[k])}
            for k, threshold in asked:
                for kind in ("sure", "right"):
                    self.share(kind, k, threshold).forget()
        return best

    def _allowance(self, sequences: int) -> float:
        return self._saved + LOSS / sequences * CREDIT * self._now.full_depth(sequences)
