# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Runs a global batch in the order of a `nemo_ee.training.bubble_plan.Plan`, with Megatron's step functions.

Megatron's own point-to-point functions pair a send with a receive in one call, which fixes who talks when;
passes of fills come between. Here every message between two stages goes one way through a group of that
direction's own, sends never wait, and a stage receives in the order in which its neighbour sends (both know
the plan). Nothing can wait in a circle, with NCCL or gloo, in whatever order the stages compute.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import (
    backward_step,
    deallocate_output_tensor,
    forward_step,
    get_tensor_shapes,
)
from megatron.core.utils import get_model_config, get_model_type
from torch import Tensor

from nemo_ee.modeling.tied_weight import gradient_of
from nemo_ee.runtime.collective import gather
from nemo_ee.training.bubble_plan import FULL, Pass, Plan


@dataclass(frozen=True)
class Event:
    """One pass as it really ran, in seconds of `time.perf_counter`.

    Attributes:
        stage: which ran it, from 0.
        step: the pass, with its times by the plan.
        start: when the stage turned to it.
        ready: when what it needs from its neighbour was there; between `start` and this the stage was idle.
        end: when it was done.
    """

    stage: int
    step: Pass
    start: float
    ready: float
    end: float


class DirectionGroups:
    """The groups of a pipeline through which stages send: one per direction. Collective over the world."""

    def __init__(self) -> None:
        pipeline = torch.distributed.get_process_group_ranks(
            parallel_state.get_pipeline_model_parallel_group()
        )
        self.ranks = pipeline
        for column in sorted(set(gather(tuple(pipeline)))):
            forward, backward = torch.distributed.new_group(column), torch.distributed.new_group(column)
            if column == tuple(pipeline):
                self.forward, self.backward = forward, backward


class _Inbox:
    """Receives one neighbour's messages in the order in which it sends them."""

    def __init__(self, source: int, group: Any, order: Sequence[int], empty: Callable[[], Tensor]):
        self.source, self.group, self.empty = source, group, empty
        self.coming, self.here = deque(order), {}

    def take(self, sample: int) -> Tensor:
        """Waits for a micro-batch's message; those that come before it are kept."""
        while sample not in self.here:
            buffer = self.empty()
            torch.distributed.recv(buffer, self.source, group=self.group)
            self.here[self.coming.popleft()] = buffer
        return self.here.pop(sample)


class _Outbox:
    """Sends to one neighbour without waiting; keeps what has not left yet."""

    def __init__(self, target: int, group: Any):
        self.target, self.group, self.leaving = target, group, deque()

    def send(self, tensor: Tensor) -> None:
        """Sends the tensor as it is now; its memory must not be written to."""
        while self.leaving and self.leaving[0][0].is_completed():
            self.leaving.popleft()
        tensor = tensor.detach().contiguous()
        self.leaving.append((torch.distributed.isend(tensor, self.target, group=self.group), tensor))

    def close(self) -> None:
        """Waits until all has left."""
        while self.leaving:
            self.leaving.popleft()[0].wait()


def forward_backward_by_plan(
    plan: Plan,
    links: DirectionGroups,
    forward_step_func: Callable,
    model: torch.nn.Module,
    batches: Sequence[Any],
    seq_length: int,
    micro_batch_size: int,
    before_forward: Callable[[Pass], None],
    events: list[Event] | None = None,
) -> list:
    """One global batch and its fills, as Megatron's `forward_backward_pipelining_without_interleaving`.

    Args:
        plan: of all stages.
        links: of this pipeline.
        forward_step_func: Megatron's; reads one batch from the iterator it is given.
        model: this stage's module, wrapped or not.
        batches: micro-batches, full ones first, then fills in the plan's order; the same on every stage.
        seq_length: S.
        micro_batch_size: B.
        before_forward: told what the next forward pass is, so that losses can be scaled.
        events: gets what ran when.

    Returns:
        On the last stage what the loss function returned per full micro-batch, else nothing.
    """
    stage = parallel_state.get_pipeline_model_parallel_rank()
    run = _StagePasses(plan, links, model, stage, seq_length, micro_batch_size)
    config = run.config
    results: dict[int, Any] = {}
    no_sync = config.no_sync_func if config.no_sync_func is not None else nullcontext
    with no_sync():
        for step in plan.passes[stage]:
            started = time.perf_counter()
            received = run.receive(step)
            ready = time.perf_counter()
            if step.backward:
                run.backward(step, received)
            else:
                before_forward(step)
                found = run.forward(step, received, forward_step_func, batches[step.sample])
                if step.kind == FULL and found:
                    results[step.sample] = found[0]
            if events is not None:
                events.append(Event(stage, step, started, ready, time.perf_counter()))
        run.close()
        _scale_gradients(model, plan.gradient_scale(stage))
    _reduce(model, config)
    return [results[sample] for sample in sorted(results)]


class _Samples:
    """Micro-batches of one stage in the order of their forward and of their backward passes."""

    def __init__(self, passes: Sequence[Pass]):
        self.forward = [p.sample for p in passes if not p.backward]
        self.backward = [p.sample for p in passes if p.backward]
        self.seen = set(self.forward)


class _StagePasses:
    """One stage's messages and tensors between passes."""

    def __init__(
        self, plan: Plan, links: DirectionGroups, model: Any, stage: int, seq_length: int, batch_size: int
    ):
        self.plan, self.model, self.stage = plan, model, stage
        self.config, self.model_type = get_model_config(model), get_model_type(model)
        self.last = len(plan.passes) - 1
        (shape,) = get_tensor_shapes(
            rank=stage,
            model_type=self.model_type,
            seq_length=seq_length,
            micro_batch_size=batch_size,
            decoder_seq_length=None,
            config=self.config,
            encoder_decoder_xattn=False,
        )
        device = next(model.parameters()).device

        def empty() -> Tensor:
            return torch.empty(shape, dtype=self.config.pipeline_dtype, device=device)

        self.inputs: dict[int, Tensor | None] = {}
        self.outputs: dict[int, Tensor] = {}
        self.from_before = self.from_behind = self.to_before = self.to_behind = None
        mine = _Samples(plan.passes[stage])
        if stage > 0:
            before = _Samples(plan.passes[stage - 1])
            self.from_before = _Inbox(
                links.ranks[stage - 1], links.forward, [i for i in before.forward if i in mine.seen], empty
            )
            self.to_before = _Outbox(links.ranks[stage - 1], links.backward)
            self.goes_back = set(mine.backward) & set(before.backward)
        if stage < self.last:
            behind = _Samples(plan.passes[stage + 1])
            self.from_behind = _Inbox(
                links.ranks[stage + 1],
                links.backward,
                [i for i in behind.backward if i in mine.backward],
                empty,
            )
            self.to_behind = _Outbox(links.ranks[stage + 1], links.forward)
            self.goes_on, self.comes_back = behind.seen, set(behind.backward)
        self.returns = set(mine.backward)

    def receive(self, step: Pass) -> Tensor | None:
        """Waits for a pass's input, or for the gradient of its output; None where nobody sends one."""
        if not step.backward:
            return self.from_before.take(step.sample) if self.from_before else None
        if self.stage == self.last or step.sample not in self.comes_back:
            return None
        return self.from_behind.take(step.sample)

    def forward(self, step: Pass, received: Tensor | None, forward_step_func: Callable, batch: Any) -> list:
        """Runs a forward pass and sends its output on."""
        found: list = []
        returns = step.sample in self.returns
        if received is not None and returns:
            received.requires_grad_()
        with nullcontext() if returns else torch.no_grad():
            output, _ = forward_step(
                forward_step_func,
                iter([batch]),
                self.model,
                self.plan.full,
                received,
                found,
                self.config,
                is_first_microbatch=step is self.plan.passes[self.stage][0],
                current_microbatch=step.sample,
            )
        if self.to_behind and step.sample in self.goes_on:
            self.to_behind.send(output)
        if returns:
            self.inputs[step.sample], self.outputs[step.sample] = received, output
            if self.stage < self.last:
                # The message holds the memory until it has left; Megatron's backward needs the graph alone.
                deallocate_output_tensor(output, self.config.deallocate_pipeline_outputs)
        return found

    def backward(self, step: Pass, gradient: Tensor | None) -> None:
        """Runs a backward pass and sends the input's gradient back."""
        received, output = self.inputs.pop(step.sample), self.outputs.pop(step.sample)
        if gradient is None and self.stage < self.last:
            # The deepest stage of a warm-up fill: its exits' losses are all there is.
            gradient = self.from_behind.empty().zero_()
        found = backward_step(received, output, gradient, self.model_type, self.config)
        if self.to_before and step.sample in self.goes_back:
            self.to_before.send(found)

    def close(self) -> None:
        """Waits for messages that have not left."""
        for box in (self.to_before, self.to_behind):
            if box is not None:
                box.close()


def _scale_gradients(model: torch.nn.Module, factor: float) -> None:
    if factor != 1.0:
        for parameter in model.parameters():
            if parameter.requires_grad:
                gradient_of(parameter).mul_(factor)


def _reduce(model: torch.nn.Module, config: Any) -> None:
    """Reduces gradients over data parallelism, where Megatron does that; fills leave no overlap to use."""
    settings = getattr(model, "ddp_config", None)
    if settings is not None and settings.overlap_grad_reduce:
        model.start_grad_sync()
    if config.finalize_model_grads_func is not None:
        config.finalize_model_grads_func([model], None)
