# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""One choice of a request on its way through the engine."""

import math
import time
from dataclasses import dataclass, field

from nemo_ee.decoding.generated_sequence import GeneratedSequence
from nemo_ee.server.answers.delta import Delta
from nemo_ee.server.answers.reply import Reply


@dataclass(eq=False)
class Job:
    """A sequence that waits or runs, and where its tokens go. The engine's thread alone changes it.

    Attributes:
        sequence: with its text.
        reply: the request's.
        index: of the choice in the request.
        deadline: of the request, by `time.monotonic`.
        accepted: when it was queued.
        started: when it left the queue for a slot.
        last_token: when its newest token came; None before the first.
        cancelled: nobody waits for it any more; set by the request's coroutine.
    """

    sequence: GeneratedSequence
    reply: Reply
    index: int
    deadline: float
    accepted: float = field(default_factory=time.monotonic)
    started: float | None = None
    last_token: float | None = None
    cancelled: bool = False
    _settled: int = 0
    _begun: bool = False

    @property
    def prompt_tokens(self) -> int:
        """Length of its prompt."""
        return len(self.sequence.prompt)

    @property
    def is_finite(self) -> bool:
        """Whether the model is sure of the sequence's new tokens by a finite number; it is not where logits are NaN."""
        scores = [] if self._begun else [each.logprob for each in self.sequence.prompt_logprobs if each]
        return all(map(math.isfinite, [*self.sequence.confidences[self._settled :], *scores]))

    def advance(self) -> Delta | None:
        """What the sequence's new tokens settle; None if that is nothing. Ends with `finish_reason`."""
        sequence, reason = self.sequence, self.sequence.finish_reason
        pieces = sequence.text.pieces[self._settled :]
        if not pieces and reason is None:
            return None
        start, self._settled = self._settled, self._settled + len(pieces)
        new = slice(start, self._settled)
        prompt, self._begun = [] if self._begun else sequence.prompt_logprobs, True
        return Delta(
            pieces,
            sequence.exit_layers[new],
            sequence.confidences[new],
            reason,
            sequence.statistics if reason else None,
            sequence.logprobs[new],
            prompt,
        )
