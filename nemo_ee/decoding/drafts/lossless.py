# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Rounds of lossless decoding: an exit drafts, then one pass over the deeper layers verifies all drafts."""

from collections.abc import Sequence

from nemo_ee.decoding.generated_sequence import GeneratedSequence
from nemo_ee.decoding.leaving import NEVER, is_asked
from nemo_ee.decoding.policy.exit_policy import ExitPolicy, Round


class LosslessRounds:
    """Which lossless sequences of a session draft and which wait.

    In a round each that uses its exit drafts until that is not sure of a token, until it has as many drafts as the
    round allows, or until the drafts end it. That token, or the last draft, is fed no deeper than that exit,
    and the sequence waits. When all wait they are verified together: a pass over the deeper layers costs
    about the same for one sequence as for all. A sequence that does not use the round's exit, or that comes while
    the round goes on, decodes at full depth until the next one, a token with every pass.

    Args:
        policy: chooses rounds.

    Attributes:
        round: that goes on; None for a token at full depth.
        members: sequences that take part in it.
        waiting: those of them that wait to be verified.
    """

    def __init__(self, policy: ExitPolicy):
        self.round: Round | None = None
        self.members: set[GeneratedSequence] = set()
        self.waiting: set[GeneratedSequence] = set()
        self._policy = policy

    def begin(self, lossless: Sequence[GeneratedSequence]) -> None:
        """Chooses a round for some sequences, unless one goes on that some of them are in."""
        self.members.intersection_update(lossless)
        if self.members:
            return
        self.end()
        if not lossless:
            return
        self.round = self._policy.draft([self._own(s) for s in lossless])
        if self.round is not None:
            k = self.round.exit_index
            self.members.update(s for s in lossless if is_asked(self._own(s)[k]))

    def end(self) -> None:
        """Ends the round, if there is one."""
        self.round = None
        self.members.clear()
        self.waiting.clear()

    def thresholds(self, sequence: GeneratedSequence) -> list[float]:
        """Of all exits, for the sequence's next token."""
        own, row = self._own(sequence), [NEVER] * len(self._policy.layers)
        if self.round is not None and sequence in self.members and len(sequence.drafts) < self.round.length:
            row[self.round.exit_index] = own[self.round.exit_index]
        return row

    def note_asked(self, sequence: GeneratedSequence, is_sure: bool) -> None:
        """A member whose exit was asked, or that had as many drafts as the round allows."""
        assert self.round is not None, "a round goes on"
        k = self.round.exit_index
        if len(sequence.drafts) < self.round.length:
            self._policy.share("sure", k, self._own(sequence)[k]).observe(is_sure, 1)

    def note_verified(self, sequence: GeneratedSequence, accepted: int, drafts: int) -> None:
        """A member's drafts; those behind the first one that is not accepted say nothing."""
        assert self.round is not None, "a round goes on"
        k = self.round.exit_index
        share = self._policy.share("right", k, self._own(sequence)[k])
        share.observe(accepted, accepted + (accepted < drafts))

    def _own(self, sequence: GeneratedSequence) -> list[float]:
        return [sequence.request.threshold(n) for n in self._policy.layers]
