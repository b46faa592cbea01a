# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Rounds of lossless decoding: exits draft, then one pass over the deeper layers verifies all drafts."""

from collections.abc import Sequence as Several

from nemo_ee.inference.draft_length import DraftLength, PassCosts
from nemo_ee.inference.sequence import Sequence
from nemo_ee.megatron.decoding_model import DecodingModel


class LosslessRounds:
    """Which lossless sequences of a session draft and which wait.

    In a round each drafts until its exits are not sure of a token, until it has `length` drafts, or until the
    drafts end it. That token, or the last draft, is fed no deeper than the last exit, and the sequence waits.
    When all wait they are verified together: a pass over the deeper layers costs about the same for one
    sequence as for all.

    Args:
        model: whose passes cost.
        exit_layers: of the session, ascending.

    Attributes:
        active: a round goes on.
        length: drafts per sequence in it.
        waiting: sequences that wait to be verified.
    """

    def __init__(self, model: DecodingModel, exit_layers: Several[int]):
        self.active, self.length = False, 0
        self.waiting: set[Sequence] = set()
        self._lengths = DraftLength(pass_costs(model, exit_layers)) if exit_layers else None
        self._cost = 0.0

    def begin(self, sequences: int) -> None:
        """Begins a round, unless one goes on or drafting does not pay.

        Args:
            sequences: that are lossless.
        """
        if not self.active:
            self.length = self._lengths.next(sequences)
            self.active, self._cost = self.length > 0, 0.0

    def abandon(self) -> None:
        """Forgets a round whose sequences were all removed."""
        self.active = False
        self.waiting.clear()

    def note_drafting(self, thresholds: list[list[float]]) -> None:
        """Counts a pass to the last exit, of the sequences with these thresholds."""
        if thresholds:
            costs, asked = self._lengths.costs, any(min(row) < 1.0 for row in thresholds)
            self._cost += (costs.draft if asked else costs.shallow_pass)(len(thresholds))

    def end(self, committed: int, accepted: int, rejected: int, verified: int, sequences: int) -> None:
        """Ends a round.

        Args:
            committed: tokens that it gave.
            accepted: drafts that the full model agreed with.
            rejected: sequences with a draft that it did not agree with.
            verified: tokens that went through the deeper layers.
            sequences: in the round.
        """
        self._cost += self._lengths.costs.verify(verified)
        self._lengths.observe(self._cost, committed, accepted, rejected, sequences)
        self.active = False
        self.waiting.clear()


def pass_costs(model: DecodingModel, exit_layers: Several[int]) -> PassCosts:
    """Costs as the bytes of weights that passes read; layers that do not tell count alike."""
    known = {n: model.layer_bytes(n) for n in model.layers}
    typical = max(known.values()) or 1
    sizes = {n: size or typical for n, size in known.items()}
    last = exit_layers[-1]
    return PassCosts(
        shallow=sum(size for n, size in sizes.items() if n <= last),
        heads=sum(model.heads[n].bytes for n in exit_layers),
        deep=sum(size for n, size in sizes.items() if n > last) + model.output.bytes,
    )
