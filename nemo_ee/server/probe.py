# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Whether a model predicts numbers at all: weights that were damaged, on disk or in memory, make NaN of everything."""

import math
from typing import Protocol

from nemo_ee.decoding.generated_sequence import GeneratedSequence
from nemo_ee.decoding.request import GenerationRequest, SamplingOptions
from nemo_ee.errors import GenerationError

PROMPT = [0]
LIMIT = 2
POSITIONS = len(PROMPT) + LIMIT - 1
"""Of a session that can be probed."""


class Decodes(Protocol):
    """What a probe needs of a session."""

    def add(self, sequences: list[GeneratedSequence]) -> list[GeneratedSequence]: ...

    def step(self) -> list[GeneratedSequence]: ...


class NotFiniteError(GenerationError):
    """The model's predictions are NaN or infinite, whatever it is asked."""


def check_finite(session: Decodes) -> None:
    """Generates a prompt's first tokens, at full depth: one pass of each kind that decoding has.

    Args:
        session: with a free slot; its other sequences advance.

    Raises:
        NotFiniteError: the model is not sure of them by a finite number.
    """
    request = GenerationRequest(sampling=SamplingOptions(all_probs=True))  # by the whole output layer
    probe = GeneratedSequence(list(PROMPT), request, frozenset(), (), LIMIT)
    session.add([probe])
    while probe.finish_reason is None:
        session.step()
    if not all(map(math.isfinite, probe.confidences)):
        raise NotFiniteError(
            "the model's predictions are NaN or infinite; its weights are damaged, or trainer.precision is too narrow"
        )
