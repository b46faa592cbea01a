# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Rounds of lossless decoding: an exit drafts, then one pass over the deeper layers verifies all drafts."""

from collections.abc import Sequence

from nemo_ee.decoding.drafts.drafting import DraftingPolicy, Outcome, Round
from nemo_ee.decoding.generated_sequence import GeneratedSequence
from nemo_ee.decoding.leaving import NEVER, is_asked


class LosslessRounds:
    """Which lossless sequences of a session draft and which wait.

    In a round each drafts until the round's exit is not sure of a token, until it has as many drafts as the
    round allows, or until the drafts end it. That token, or the last draft, is fed no deeper than that exit,
    and the sequence waits. When all wait they are verified together: a pass over the deeper layers costs
    about the same for one sequence as for all. A sequence that does not use the round's exit, or that comes while
    the round goes on, decodes at full depth until the next one, a token with every pass.

    Args:
        policy: chooses rounds.
        exit_layers: of the session, ascending.

    Attributes:
        round: that goes on; None for a token at full depth.
        members: sequences that draft in the round: those that use its exit.
        waiting: those of them that wait to be verified.
    """

    def __init__(self, policy: DraftingPolicy, exit_layers: Sequence[int]):
        self.round: Round | None = None
        self.members: set[GeneratedSequence] = set()
        self.waiting: set[GeneratedSequence] = set()
        self._policy, self._layers = policy, list(exit_layers)
        self._outcome = Outcome()

    def begin(self, lossless: Sequence[GeneratedSequence]) -> None:
        """Chooses a round for some sequences, unless one goes on that some of them are in."""
        self.members.intersection_update(lossless)
        if self.members:
            return
        self.abandon()
        if not lossless:
            return
        asked = [
            k for k in range(len(self._layers)) if any(is_asked(self._threshold(s, k)) for s in lossless)
        ]
        self.round, self._outcome = self._policy.next(len(lossless), asked), Outcome()
        if self.round is None:
            self._policy.observe_full_depth(len(lossless))
        else:
            k = self.round.exit_index
            self.members.update(s for s in lossless if is_asked(self._threshold(s, k)))

    def abandon(self) -> None:
        """Ends a round whose sequences were all removed, if there is one: what it cost is lost."""
        if self.round is not None:
            self._close(self.round, sequences=1)

    def thresholds(self, sequence: GeneratedSequence) -> list[float]:
        """Of all exits, for the sequence's next token."""
        row = [NEVER] * len(self._layers)
        if self.round is not None and sequence in self.members and len(sequence.drafts) < self.round.length:
            k = self.round.exit_index
            row[k] = self._threshold(sequence, k)
        return row

    def note_pass(self, thresholds: Sequence[Sequence[float]], drafts: int) -> None:
        """Counts a pass to the round's exit, of sequences with these thresholds, and the drafts that it gave."""
        assert self.round is not None, "a round goes on"
        costs, k = self._policy.costs, self.round.exit_index
        asked = sum(is_asked(row[k]) for row in thresholds)
        self._outcome.cost += costs.shallow(k, len(thresholds)) + (costs.asked(k, asked) if asked else 0.0)
        self._outcome.asked += asked
        self._outcome.drafts += drafts

    def note_verified(self, tokens: int, accepted: int, rejected: bool) -> None:
        """Counts a sequence's share of a verification: tokens that it got, drafts accepted, one rejected or not."""
        self._outcome.tokens += tokens
        self._outcome.accepted += accepted
        self._outcome.rejected += rejected

    def end(self, verified: int, sequences: int) -> None:
        """Ends a round of some sequences in which so many tokens went through the deeper layers."""
        assert self.round is not None, "a round goes on"
        self._outcome.cost += self._policy.costs.verify(self.round.exit_index, verified)
        self._close(self.round, sequences)

    def _close(self, round_: Round, sequences: int) -> None:
        self._policy.observe(round_, self._outcome, sequences)
        self.round = None
        self.members.clear()
        self.waiting.clear()

    def _threshold(self, sequence: GeneratedSequence, exit_index: int) -> float:
        return sequence.request.threshold(self._layers[exit_index])
