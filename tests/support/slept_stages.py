# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Pipeline stages whose work is a sleep of known length: what a schedule costs, without a core per stage."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_ee.training.bubble_plan import Pass, Plan

SEQUENCE, BATCH, HIDDEN = 4, 1, 8
"""Shape of the messages between stages: small, so that sending them takes next to nothing."""


@dataclass(frozen=True)
class Step:
    """One global batch as this stage ran it: the plan's name, and its `Event`s."""

    plan: str
    events: tuple


class _Sleep(torch.autograd.Function):
    """The identity; its forward and its backward sleep."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.backward_seconds = backward
        time.sleep(forward)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        time.sleep(ctx.backward_seconds)
        return gradient, None, None


class SleptStage(torch.nn.Module):
    """What Megatron's step functions need of a stage, and sleeps for layers.

    Args:
        stages: P.
        forward: seconds of a forward pass.
        backward: seconds of a backward pass.
    """

    def __init__(self, stages: int, forward: float, backward: float):
        from megatron.core.enums import ModelType
        from megatron.core.transformer.transformer_config import TransformerConfig

        super().__init__()
        self.seconds, self.model_type, self.received = (forward, backward), ModelType.encoder_or_decoder, None
        self.weight = torch.nn.Parameter(torch.zeros(HIDDEN))
        self.config = TransformerConfig(
            num_layers=stages,
            hidden_size=HIDDEN,
            num_attention_heads=1,
            pipeline_model_parallel_size=stages,
            pipeline_dtype=torch.float32,
            deallocate_pipeline_outputs=True,
        )

    def set_input_tensor(self, received: list[Tensor | None]) -> None:
        """Called by Megatron with what the stage before has sent."""
        (self.received,) = received

    def forward(self) -> Tensor:
        """[S, B, H] of no meaning, `seconds[0]` later."""
        x = torch.ones(SEQUENCE, BATCH, HIDDEN) if self.received is None else self.received
        return _Sleep.apply(x + self.weight, *self.seconds)


def run_alternately(plans: dict[str, Plan], unit: float, ratio: float, steps: int) -> list[Step]:
    """Runs every plan in turn, `steps` times after one round that warms up. In every rank of a pipeline.

    Args:
        plans: name -> plan; all of one pipeline, as long as the world.
        unit: seconds of a forward pass.
        ratio: of a backward pass to a forward pass.
        steps: rounds.

    Returns:
        This stage's steps in the order in which they ran.
    """
    from megatron.core import parallel_state

    from nemo_ee.training.bubble_schedule import DirectionGroups, forward_backward_by_plan

    stages = torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=stages)
    links, model, found = DirectionGroups(), SleptStage(stages, unit, ratio * unit), []

    def forward_step(batches: Iterator, model: SleptStage) -> tuple:
        next(batches)
        return model(), lambda output: (output.mean(), {})

    for index in range(steps + 1):
        for name, plan in plans.items():
            events: list = []
            model.zero_grad()
            torch.distributed.barrier()
            forward_backward_by_plan(
                plan, links, forward_step, model, [None] * plan.samples, SEQUENCE, BATCH, _ignore, events
            )
            if index:
                found.append(Step(name, tuple(events)))
    return found


def durations(ranks: Sequence[Sequence[Step]], plan: str) -> list[float]:
    """Seconds of each of a plan's steps, from the first stage's start to the last one's end.

    Stages are processes of one machine, whose `time.perf_counter` is one clock.
    """
    steps = [step for step in zip(*ranks, strict=True) if step[0].plan == plan]
    return [
        max(stage.events[-1].end for stage in step) - min(stage.events[0].start for stage in step)
        for step in steps
    ]


def _ignore(_step: Pass) -> None:
    """Nothing depends on which pass comes next."""
