# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What exits should cost in training: FLOPs of pipeline stages, and 1F1B's timetable made of them."""

from collections.abc import Sequence
from dataclasses import dataclass

BACKWARD = 2
"""FLOPs of a backward pass per FLOP of its forward pass: gradients of inputs and of weights."""


@dataclass(frozen=True)
class Size:
    """A GPT with exits, and its global batch."""

    layers: int = 12
    hidden: int = 512
    heads: int = 8
    vocabulary: int = 8192
    sequence: int = 256
    exits: tuple[int, ...] = (3, 6)
    micro_batch: int = 1
    micro_batches: int = 8

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.micro_batch * self.sequence

    @property
    def layer(self) -> float:
        """FLOPs of a layer's forward pass on a micro-batch: matrix products, and causal attention."""
        return self.tokens * (24 * self.hidden**2 + 2 * self.sequence * self.hidden)

    @property
    def projection(self) -> float:
        """FLOPs of a projection to the vocabulary on a micro-batch."""
        return self.tokens * 2 * self.hidden * self.vocabulary

    def head(self, mlp: bool) -> float:
        """FLOPs of an exit's forward pass on a micro-batch."""
        return self.projection + (self.tokens * 16 * self.hidden**2 if mlp else 0.0)


@dataclass(frozen=True)
class Stage:
    """FLOPs of a pipeline stage on a micro-batch."""

    forward: float
    backward: float


def exit_stage(layer: int, size: Size, stages: int) -> int:
    """The stage (from 0) of an exit; on a stage's last layer it belongs to the next one (`pre_exit`)."""
    return min(layer // (size.layers // stages), stages - 1)


def stage_costs(size: Size, stages: int, mlp: bool | None) -> list[Stage]:
    """FLOPs of every stage. An exit runs forward and backward within its stage's backward pass.

    Args:
        size: of the model.
        stages: P, which divides the layers.
        mlp: whether exits have one; None: without exits.
    """
    costs = []
    for stage in range(stages):
        forward = size.layers // stages * size.layer + (size.projection if stage == stages - 1 else 0.0)
        here = 0 if mlp is None else sum(exit_stage(n, size, stages) == stage for n in size.exits)
        exits = here * (1 + BACKWARD) * size.head(bool(mlp))
        costs.append(Stage(forward, BACKWARD * forward + exits))
    return costs


def total(costs: Sequence[Stage]) -> float:
    """FLOPs of all stages on a micro-batch."""
    return sum(stage.forward + stage.backward for stage in costs)


def step_time(costs: Sequence[Stage], micro_batches: int, workers: int) -> float:
    """Time of a step under 1F1B, in FLOPs of one worker; messages take no time.

    Stages that have something to do share the workers evenly, at most one each, as an operating system shares
    its cores. With a worker per stage it is the pipeline's critical path; with fewer it comes close to all
    FLOPs over the number of workers.

    Args:
        costs: of every stage.
        micro_batches: M.
        workers: cores or GPUs, counted in what one process uses.
    """
    stages, orders = len(costs), []
    for stage in range(stages):
        ahead = min(stages - stage - 1, micro_batches)
        order = [(False, i) for i in range(ahead)]
        for i in range(micro_batches - ahead):
            order += [(False, ahead + i), (True, i)]
        orders.append(order + [(True, i) for i in range(micro_batches - ahead, micro_batches)])
    done: set[tuple[int, bool, int]] = set()

    def is_ready(stage: int) -> bool:
        if not orders[stage]:
            return False
        backward, i = orders[stage][0]
        outside = stage == (stages - 1 if backward else 0)
        return outside or (stage + (1 if backward else -1), backward, i) in done

    def work(stage: int) -> float:
        if not orders[stage]:
            return 0.0
        return costs[stage].backward if orders[stage][0][0] else costs[stage].forward

    now, left = 0.0, [work(stage) for stage in range(stages)]
    while any(orders):
        running = [stage for stage in range(stages) if is_ready(stage)]
        speed = min(1.0, workers / len(running))
        least = min(left[stage] for stage in running)
        now += least / speed
        for stage in running:
            left[stage] -= least
        for stage in running:
            if left[stage] <= 1e-9 * max(costs[stage].backward, 1.0):
                done.add((stage, *orders[stage].pop(0)))
                left[stage] = work(stage)
    return now


@dataclass(frozen=True)
class Prediction:
    """Time of a step with exits over that of a step without.

    Attributes:
        here: on the workers that there are.
        flops: all FLOPs over all FLOPs: what a pipeline without idle time would take.
        worker_per_stage: the critical path with a worker per stage.
    """

    here: float
    flops: float
    worker_per_stage: float


def predict(size: Size, stages: int, mlp: bool, workers: int) -> Prediction:
    """See `Prediction`."""
    exits, plain = stage_costs(size, stages, mlp), stage_costs(size, stages, None)

    def ratio(workers: int) -> float:
        return step_time(exits, size.micro_batches, workers) / step_time(plain, size.micro_batches, workers)

    return Prediction(ratio(min(workers, stages)), total(exits) / total(plain), ratio(stages))
