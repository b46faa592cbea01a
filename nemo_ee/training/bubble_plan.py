# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What a pipeline's stages do in which order when extra micro-batches fill the bubbles of 1F1B.

A stage's forward pass takes 1, its backward pass r. In 1F1B the first stages wait between their first forward
passes and their first backward pass, the last stages at the end (arXiv:2312.04916 section 3.3):

- warm-up fills go forward through the first stages and back, as far as an exit's loss reaches;
- cool-down fills go forward through all stages and back through the last ones.

How many fit on stage s (from 0) of P is `warmup_fills` and `cooldown_fills`. Fills are placed into gaps of the
timetable that the plain schedule has, never across one, so that by these times a step takes no longer.

Gradients stay unbiased though not every sample reaches every loss on every stage. Of M full micro-batches and
W_s warm-up fills whose losses include those of stage s, each counts M / (M + W_s) towards them; a cool-down
fill's losses count 1. Stage s divides what its C_s cool-down fills and M others have added to its parameters'
gradients by M + C_s; what is sent to earlier stages is not divided. The expected gradient is then that of one
micro-batch: the weights with which a loss of stage t >= s enters stage s's parameters add up to
M / (M + W_t) * (M + W_t) + C_s = M + C_s.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

FULL, WARMUP, COOLDOWN = "full", "warmup", "cooldown"


@dataclass(frozen=True)
class Pass:
    """One forward or backward pass on one stage.

    Attributes:
        backward: else forward.
        sample: number of the micro-batch: full ones first, then warm-up, then cool-down fills.
        kind: FULL, WARMUP or COOLDOWN.
        start: in units of a forward pass, by the plan.
        end: likewise.
    """

    backward: bool
    sample: int
    kind: str
    start: float
    end: float


@dataclass(frozen=True)
class Plan:
    """Orders of passes of all stages.

    Attributes:
        passes: per stage, in the order of their start.
        full: M, number of full micro-batches.
        warmup_depth: per warm-up fill, the last stage that it reaches.
        cooldown_depth: per cool-down fill, the first stage that it goes back to.
    """

    passes: tuple[tuple[Pass, ...], ...]
    full: int
    warmup_depth: tuple[int, ...]
    cooldown_depth: tuple[int, ...]

    @property
    def samples(self) -> int:
        """Micro-batches per step, fills included."""
        return self.full + len(self.warmup_depth) + len(self.cooldown_depth)

    @property
    def makespan(self) -> float:
        """Time of the step in units of a forward pass."""
        return max(stage[-1].end for stage in self.passes)

    def warmup_fills(self, stage: int) -> int:
        """W_s: warm-up fills whose losses include those of a stage."""
        return sum(depth >= stage for depth in self.warmup_depth)

    def cooldown_fills(self, stage: int) -> int:
        """C_s: cool-down fills that add to a stage's parameters' gradients."""
        return sum(depth <= stage for depth in self.cooldown_depth)

    def loss_scale(self, kind: str, stage: int) -> float:
        """Factor of a stage's losses of one micro-batch, relative to those of a step without fills."""
        return 1.0 if kind == COOLDOWN else self.full / (self.full + self.warmup_fills(stage))

    def gradient_scale(self, stage: int) -> float:
        """Factor of a stage's parameters' gradients at the end of the step."""
        return self.full / (self.full + self.cooldown_fills(stage))


def most_fills(stages: int, ratio: float) -> int:
    """K: fills of either kind that fit into a pipeline's bubbles."""
    return math.floor((stages - 1) * ratio / (1 + ratio) + 1e-9)


def warmup_fills(stage: int, stages: int, ratio: float) -> int:
    """Warm-up fills of a stage (from 0)."""
    fits = math.floor((ratio * (stages - stage - 1) - stage) / (1 + ratio) + 1e-9)
    return max(0, min(most_fills(stages, ratio), fits))


def cooldown_fills(stage: int, stages: int, ratio: float) -> int:
    """Cool-down fills of a stage (from 0)."""
    return max(0, min(most_fills(stages, ratio), math.floor(ratio * stage / (1 + ratio) + 1e-9)))


@lru_cache(maxsize=64)
def plan_step(
    stages: int,
    full: int,
    ratio: float,
    with_exits: tuple[bool, ...] = (),
    warmup: bool = False,
    cooldown: bool = False,
) -> Plan:
    """Orders every stage's passes of one global batch.

    Args:
        stages: P.
        full: M, full micro-batches.
        ratio: r, time of a backward pass relative to a forward pass.
        with_exits: per stage, whether it has an exit: a warm-up fill goes no deeper than the last exit that
            it can reach, and is left out without one.
        warmup: fill the warm-up bubbles.
        cooldown: fill the cool-down bubbles.

    Returns:
        The plan; fills that do not fit (few micro-batches) are left out.
    """
    timetable = [list(stage) for stage in _one_forward_one_backward(stages, full, ratio)]
    end = max(stage[-1].end for stage in timetable)
    warmup_depth: list[int] = []
    for index in range(warmup_fills(0, stages, ratio) if warmup else 0):
        reach = max(s for s in range(stages) if warmup_fills(s, stages, ratio) > index)
        depth = max((s for s in range(reach + 1) if with_exits[s]), default=None)
        if depth is not None and _place_warmup(timetable, full + len(warmup_depth), depth, ratio):
            warmup_depth.append(depth)
    cooldown_depth: list[int] = []
    for index in range(cooldown_fills(stages - 1, stages, ratio) if cooldown else 0):
        depth = min(s for s in range(stages) if cooldown_fills(s, stages, ratio) > index)
        sample = full + len(warmup_depth) + len(cooldown_depth)
        if _place_cooldown(timetable, sample, depth, ratio, end):
            cooldown_depth.append(depth)
    ordered = tuple(tuple(sorted(stage, key=lambda p: (p.start, p.end))) for stage in timetable)
    return Plan(ordered, full, tuple(warmup_depth), tuple(cooldown_depth))


def _one_forward_one_backward(stages: int, full: int, ratio: float) -> list[list[Pass]]:
    """Megatron's non-interleaved schedule, every pass as early as its inputs allow."""
    orders = []
    for stage in range(stages):
        ahead = min(stages - stage - 1, full)
        order = [(False, i) for i in range(ahead)]
        for i in range(full - ahead):
            order += [(False, ahead + i), (True, i)]
        orders.append(order + [(True, i) for i in range(full - ahead, full)])
    ends: dict[tuple[int, bool, int], float] = {}
    passes: list[list[Pass]] = [[] for _ in range(stages)]
    position, free = [0] * stages, [0.0] * stages
    while any(position[s] < len(orders[s]) for s in range(stages)):
        for s in range(stages):
            while position[s] < len(orders[s]):
                backward, i = orders[s][position[s]]
                before = (s + 1, True, i) if backward else (s - 1, False, i)
                outside = s == stages - 1 if backward else s == 0
                if not outside and before not in ends:
                    break
                start = max(free[s], 0.0 if outside else ends[before])
                free[s] = start + (ratio if backward else 1.0)
                ends[s, backward, i] = free[s]
                passes[s].append(Pass(backward, i, FULL, start, free[s]))
                position[s] += 1
    return passes


def _place_warmup(timetable: list[list[Pass]], sample: int, depth: int, ratio: float) -> bool:
    """Puts a fill between the stages' first forward passes and their first backward passes, if it fits."""
    limits = [min(p.start for p in stage if p.backward and p.kind == FULL) for stage in timetable]
    placed, ready = [], 0.0
    for stage in range(depth + 1):
        last_forward = max(p.end for p in timetable[stage] if not p.backward and p.end <= limits[stage])
        ready = _earliest(timetable[stage], max(ready, last_forward), 1.0)
        placed.append((stage, Pass(False, sample, WARMUP, ready, ready + 1.0)))
        ready += 1.0
    for stage in reversed(range(depth + 1)):
        ready = _earliest(timetable[stage], ready, ratio)
        placed.append((stage, Pass(True, sample, WARMUP, ready, ready + ratio)))
        ready += ratio
    return _commit(timetable, placed, limits)


def _place_cooldown(timetable: list[list[Pass]], sample: int, depth: int, ratio: float, end: float) -> bool:
    """Puts a fill behind the stages' last full forward passes, if it ends in time."""
    placed, ready = [], 0.0
    for stage, passes in enumerate(timetable):
        last_forward = max(p.end for p in passes if not p.backward and p.kind == FULL)
        ready = _earliest(passes, max(ready, last_forward), 1.0)
        placed.append((stage, Pass(False, sample, COOLDOWN, ready, ready + 1.0)))
        ready += 1.0
    for stage in reversed(range(depth, len(timetable))):
        ready = _earliest(timetable[stage], ready, ratio)
        placed.append((stage, Pass(True, sample, COOLDOWN, ready, ready + ratio)))
        ready += ratio
    return _commit(timetable, placed, [end] * len(timetable))


def _commit(timetable: list[list[Pass]], placed: list[tuple[int, Pass]], limits: list[float]) -> bool:
    if any(p.end > limits[stage] + 1e-9 for stage, p in placed):
        return False
    for stage, p in placed:
        timetable[stage].append(p)
    return True


def _earliest(passes: list[Pass], ready: float, length: float) -> float:
    """The earliest start of a gap of that length."""
    start = ready
    for p in sorted(passes, key=lambda p: p.start):
        if p.start >= start + length - 1e-9:
            break
        start = max(start, p.end)
    return start
