# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""EE-Tuning's step: the backbone forward only, through Megatron's own schedule, and the exits on top.

Nothing is ever back-propagated through the backbone or between stages. With distillation over several
stages, the last one returns its final normed state to the stages with exits, which wait for it with
their loss.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from nemo_ee.modeling.gpt import EarlyExitGPTModel, StageStates
from nemo_ee.modeling.micro_batch import MicroBatch
from nemo_ee.modeling.token_layout import by_position, own_share, whole_tokens
from nemo_ee.training.exit_loss import ExitInput, ExitLossResult, exit_losses

WINDOW = 4
"""Micro-batches per pipeline stage whose states wait for the final one: more cost memory, fewer idle stages."""

Consumer = Callable[[MicroBatch, StageStates, Tensor | None], None]
"""Called once per micro-batch with the stage's states and, if wanted, the final normed state [S, B, H].

That state is valid during the call only. Where it came from another stage, the states' `output` is empty.
"""


def run_backbone(
    gpt: EarlyExitGPTModel,
    batches: Iterator[MicroBatch],
    num_microbatches: int,
    needs_final: bool,
    consume: Consumer,
) -> None:
    """Runs micro-batches through the frozen backbone and hands each one's states to `consume`.

    They may have different lengths. Stages of a pipeline send states of one shape, so there those of a window are
    padded to its longest, with tokens that do not count.

    With `needs_final` and P > 1 stages they run in windows of at most `WINDOW` P micro-batches: at most so many
    wait with their states for the final one, however many a global batch has. A window of W costs the time of
    W + P - 1 forward passes.

    Collectives: Megatron's forward sends between stages; with `needs_final` and more than one stage, one
    broadcast of [S, B, H] over the pipeline group per micro-batch, after the last stage has seen its window.

    Args:
        gpt: this stage's module.
        batches: micro-batches, the same on every stage.
        num_microbatches: how many to run.
        needs_final: whether `consume` gets the final normed state.
        consume: called in order of micro-batches; gradients are enabled by it where it needs them.
    """
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    pipelined = stages > 1
    windows = [num_microbatches]
    if pipelined and needs_final:
        windows = even_parts(num_microbatches, WINDOW * stages)
    last = parallel_state.is_pipeline_last_stage()
    waiting: deque[tuple[MicroBatch, StageStates]] = deque()
    received: Tensor | None = None

    def forward_step(iterator: Iterator[MicroBatch], _model: object) -> tuple[Tensor, Callable]:
        nonlocal received
        batch = next(iterator)
        states = gpt.forward_states(batch.tokens, batch.position_ids, batch.attention_mask, needs_final)
        if pipelined and needs_final and last:
            waiting.append((batch, states))
        elif pipelined and needs_final:
            received = torch.empty_like(states.output) if received is None else received
            waiting.append((batch, replace(states, output=received[:0])))
        else:
            consume(batch, states, states.output if needs_final else None)
        return states.output, lambda output: (output.new_zeros(()), {})

    def deliver(batch: MicroBatch, states: StageStates) -> None:
        final = states.output if last else received
        torch.distributed.broadcast(
            final,
            parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
        consume(batch, states, final)

    with torch.no_grad():
        for window in windows:
            size, length, source = 0, 0, batches  # sizes that one stage alone does not read
            if pipelined:
                alike = of_one_length(list(islice(batches, window)))
                (size, length), source, received = alike[0].tokens.shape, iter(alike), None
            get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=source,
                model=[gpt],
                num_microbatches=window,
                seq_length=length,
                micro_batch_size=size,
                forward_only=True,
            )
            while waiting:
                deliver(*waiting.popleft())


def of_one_length(batches: list[MicroBatch]) -> list[MicroBatch]:
    """Micro-batches padded to the longest of them; what is added is no token that counts, and none before it sees
    it, since attention is causal."""
    longest = max(batch.tokens.shape[1] for batch in batches)
    return [_padded(batch, longest - batch.tokens.shape[1]) for batch in batches]


def _padded(batch: MicroBatch, more: int) -> MicroBatch:
    if not more:
        return batch
    assert batch.attention_mask is None, "a mask says nothing of positions that are added"
    parts = (batch.tokens, batch.labels, batch.loss_mask, batch.position_ids)
    return MicroBatch(*(torch.nn.functional.pad(part, (0, more)) for part in parts))


def even_parts(count: int, largest: int) -> list[int]:
    """Splits a number into as few parts of at most `largest` as can be, nearly equal, larger ones first."""
    parts = -(-count // largest)
    return [count // parts + (index < count % parts) for index in range(parts)]


def exit_step(
    gpt: EarlyExitGPTModel,
    batch: MicroBatch,
    states: StageStates,
    final: Tensor | None,
    scale: Tensor | float | None,
    autocast_dtype: torch.dtype | None = None,
) -> ExitLossResult:
    """Losses of this stage's exits on one micro-batch; with `scale`, their gradients are added to `.grad`.

    Args:
        gpt: this stage's module.
        batch: the micro-batch.
        states: what the backbone left on this stage.
        final: final normed state, sharded as `states`; None without distillation.
        scale: factor of the summed token losses; None computes statistics only.
        autocast_dtype: compute the heads in this dtype.
    """
    if not gpt.exits and (final is None or not parallel_state.is_pipeline_last_stage()):
        return ExitLossResult()
    device = states.output.device.type
    cast = torch.autocast(device, autocast_dtype) if autocast_dtype is not None else nullcontext()
    gradients = torch.enable_grad() if scale is not None else torch.no_grad()
    exit_states = {}
    with gradients, cast:
        for n in gpt.exit_layers:
            head = gpt.exits[str(n)]
            exit_states[n] = head(states.exits[n].detach(), batch.attention_mask, states.rotary_pos_emb)

    def prepared(x: Tensor) -> Tensor:
        """Statistics alone are exact: logits in half precision have many equal maxima."""
        return x if scale is not None else x.to(torch.promote_types(x.dtype, torch.float32))

    teacher = None
    if final is not None:
        teacher = ExitInput(prepared(whole_tokens(final, gpt.config.sequence_parallel)), gpt.final_projection)
    result = exit_losses(
        {
            n: ExitInput(
                prepared(whole_tokens(x.detach(), gpt.config.sequence_parallel)),
                gpt.exits[str(n)].projection,
                gpt.early_exit.loss_weight(n),
            )
            for n, x in exit_states.items()
        },
        gpt.output_weight(),
        by_position(batch.labels),
        by_position(batch.loss_mask),
        gpt.early_exit.tuning,
        teacher,
        scale,
    )
    if scale is not None:
        for parameter, gradient in result.parameter_gradients.items():
            accumulate(parameter, gradient)
        result.parameter_gradients.clear()
        for n, x in exit_states.items():
            gradient = own_share(result.state_gradients.pop(n), x, gpt.config.sequence_parallel)
            if x.requires_grad:
                torch.autograd.backward(x, gradient)
    return result


def accumulate(parameter: Tensor, gradient: Tensor) -> None:
    """Adds to `.grad`."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    parameter.grad += gradient.to(parameter.dtype)
