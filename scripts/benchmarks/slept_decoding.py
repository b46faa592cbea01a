# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A stage that decodes, its passes lengthened by a sleep, and a sequence that notes when its tokens come."""

import time
from dataclasses import dataclass, field

from torch import Tensor

from nemo_ee.inference.pipeline_stage import Answer, Stage, Tokens
from nemo_ee.inference.request import GenerationRequest
from nemo_ee.inference.sequence import Sequence


@dataclass
class SleptStage(Stage):
    """A stage whose pass takes `seconds` and what the model computes.

    Attributes:
        seconds: of the sleep.
        passes: of every pass when it began, awoke and ended, by `time.perf_counter`: one clock for all
            processes of a machine.
    """

    seconds: float = 0.0
    passes: list[tuple[float, float, float]] = field(default_factory=list)

    def run(self, tokens: Tokens, hidden: Tensor | None) -> tuple[Tensor, list[Answer]]:
        """As Stage's, after a sleep."""
        begin = time.perf_counter()
        time.sleep(self.seconds)
        awake = time.perf_counter()
        result = super().run(tokens, hidden)
        self.passes.append((begin, awake, time.perf_counter()))
        return result


class TimedSequence(Sequence):
    """A sequence that only its length ends.

    Args:
        prompt: token ids.
        request: its length, sampling and exits.
        seed: of its draws.

    Attributes:
        times: of its tokens, by `time.perf_counter`.
    """

    def __init__(self, prompt: list[int], request: GenerationRequest, seed: int):
        super().__init__(prompt, request, lambda tokens: False, eos=(0,), limit=request.max_length, seed=seed)
        self.times: list[float] = []

    def commit(self, token: int, exit_layer: int, confidence: float) -> bool:
        """As Sequence's."""
        self.times.append(time.perf_counter())
        return super().commit(token, exit_layer, confidence)
