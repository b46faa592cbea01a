# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Copies of the output weight on pipeline stages whose exits share it while the backbone trains.

Megatron keeps the embedding's copy on the last stage equal to the first one's by summing their gradients over
its embedding group. Exits add copies on stages between. They get a group of their own: widening Megatron's
would change who takes part in NeMo's broadcasts over it.
"""

from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from torch import Tensor

from nemo_ee.modeling.gpt import EarlyExitGPTModel
from nemo_ee.runtime.collective import gather


@dataclass(frozen=True)
class TiedWeight:
    """One stage's part in keeping all copies of the output weight equal.

    Attributes:
        weight: [Vp/TP, H], this stage's copy or the original.
        group: all stages with one.
        source: global rank of the stage with the original.
        counted_elsewhere: Megatron has added this stage's gradient to the source's already.
    """

    weight: torch.nn.Parameter
    group: torch.distributed.ProcessGroup
    source: int
    counted_elsewhere: bool

    def synchronise_values(self) -> None:
        """Gives every copy the original's values. Collective over `group`."""
        torch.distributed.broadcast(self.weight.data, self.source, group=self.group)

    def sum_gradients(self) -> None:
        """Sums the copies' gradients, after Megatron's own sum of the first and last stage's.

        Call it when gradients have been reduced over data parallelism. Collective over `group`.
        """
        gradient = gradient_of(self.weight)
        if self.counted_elsewhere:
            gradient.zero_()
        torch.distributed.all_reduce(gradient, group=self.group)


def gradient_of(parameter: torch.nn.Parameter) -> Tensor:
    """Where the optimizer reads a gradient: Megatron's buffer, or `.grad` (zeros if it is unset)."""
    if getattr(parameter, "main_grad", None) is not None:
        return parameter.main_grad
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def tie_output_weights(gpt: EarlyExitGPTModel) -> TiedWeight | None:
    """Sets up the copies of one pipeline; None on stages that have none, and where there are none at all.

    Collectives: one all-gather over the world, and the creation of the groups by all ranks.

    Args:
        gpt: this stage's module, built with `trains_backbone`.
    """
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return None
    copy = gpt.output_copy is not None and gpt.output_copy.requires_grad
    original = gpt.pre_process if gpt.tied_to_embedding else gpt.post_process
    owner = original or (gpt.post_process and gpt.tied_to_embedding)
    pipeline = torch.distributed.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group())
    stages = gather((tuple(pipeline), copy, owner, original))
    mine, rank = None, torch.distributed.get_rank()
    for column in sorted({stage[0] for stage in stages}):
        if not any(stages[r][1] for r in column):
            continue
        members = [r for r in column if stages[r][1] or stages[r][2]]
        group = torch.distributed.new_group(members)
        if rank in members:
            source = next(r for r in column if stages[r][3])
            weight = gpt.output_copy if copy else gpt.output_weight()
            if copy:
                weight.shared = True  # counted once in the gradient's norm
            weight.shared_embedding = True  # a bucket of its own, so that ranks' shards of it are alike
            mine = TiedWeight(weight, group, source, owner and not original)
    if mine is not None:
        mine.synchronise_values()
    return mine
