# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Reductions over logits whose rows are sharded over the tensor-parallel group; nothing to do where TP is 1.

Suffixes: N tokens, R rows of this rank.
"""

import torch
from megatron.core import parallel_state
from torch import Tensor


def reduce_over_ranks(
    tensor: Tensor, op: torch.distributed.ReduceOp = torch.distributed.ReduceOp.SUM
) -> Tensor:
    """All-reduces over the tensor-parallel group, in place."""
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        torch.distributed.all_reduce(tensor, op, group=parallel_state.get_tensor_model_parallel_group())
    return tensor


def max_over_ranks(values: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum of values [N] over all ranks, and its (lowest) row [N]. Collectives: two all-reduces of [N]."""
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return values, rows
    highest = reduce_over_ranks(values.clone(), torch.distributed.ReduceOp.MAX)
    rows = rows.masked_fill(values < highest, torch.iinfo(rows.dtype).max)
    return highest, reduce_over_ranks(rows, torch.distributed.ReduceOp.MIN)


def log_sum_over_ranks(log_sum: Tensor) -> Tensor:
    """log sum exp over all ranks' rows, from each rank's own [N], finite on one rank at least.

    Collectives: two all-reduces of [N].
    """
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return log_sum
    top = reduce_over_ranks(log_sum.clone(), torch.distributed.ReduceOp.MAX)
    return top + reduce_over_ranks((log_sum - top).exp()).log()


def gather_columns(local: Tensor) -> Tensor:
    """Joins [N, R] of all ranks along the last axis: [N, R x TP]. Collectives: one all-gather."""
    world = parallel_state.get_tensor_model_parallel_world_size()
    if world == 1:
        return local
    parts = [torch.empty_like(local) for _ in range(world)]
    group = parallel_state.get_tensor_model_parallel_group()
    torch.distributed.all_gather(parts, local.contiguous(), group=group)
    return torch.cat(parts, dim=-1)
