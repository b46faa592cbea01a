# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""When tokens are there if pipeline stages decode by `PipelineSession`'s rules and every pass takes one unit."""

import heapq
from collections.abc import Sequence

MESSAGE = 1e-6
"""Units of a message: next to nothing."""


def token_times(passed: Sequence[Sequence[float]]) -> list[list[float]]:
    """The timetable of several sequences whose prompts are fed together.

    It is the first stage's: what that one feeds, the others run one behind the other, and passes that begin a
    unit apart there come a unit apart everywhere, so nothing waits behind it. The first stage feeds all tokens
    that it has, and waits a little before it begins a pass for answers that are due (`PATIENCE`).

    Args:
        passed: [B][T] stages from the first to that whose exit chose the token.

    Returns:
        [B][T] units from the prompts' start until the first stage has the token.
    """
    from nemo_ee.inference.pipeline_session import (
        PATIENCE,
    )  # imports megatron-core: only behind `stand_ins.enable`

    times: list[list[float]] = [[] for _ in passed]
    answers: list[tuple[float, int]] = []
    ready, now = list(range(len(passed))), 0.0
    while ready or answers:
        for sequence in ready:
            stages = passed[sequence][len(times[sequence])]
            messages = 0 if stages == 1 else stages
            heapq.heappush(answers, (now + stages + messages * MESSAGE, sequence))
        now = now + 1 if ready else answers[0][0]
        ready = []
        while answers and answers[0][0] <= (now + PATIENCE if ready else now):
            now, sequence = max(now, answers[0][0]), heapq.heappop(answers)[1]
            times[sequence].append(now)
            if len(times[sequence]) < len(passed[sequence]):
                ready.append(sequence)
    return times
