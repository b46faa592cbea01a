# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Reductions over logits whose rows are sharded over the tensor-parallel group; nothing to do where TP is 1.

Suffixes: N tokens, R rows of this rank.
"""

import torch
from megatron.core import parallel_state
from torch import Tensor

CHUNK_BYTES = 2**27
"""Of one exit's logits on one rank in float32, where no number of tokens is given."""


def chunk_tokens(tokens: int | None, columns: int) -> int:
    """How many tokens to compute logits of at a time: `tokens`, or None for as many as `CHUNK_BYTES` hold."""
    return max(1, CHUNK_BYTES // (4 * columns)) if tokens is None else tokens


def reduce_over_ranks(
    tensor: Tensor, op: torch.distributed.ReduceOp = torch.distributed.ReduceOp.SUM
) -> Tensor:
    """All-reduces over the tensor-parallel group, in place."""
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        torch.distributed.all_reduce(tensor, op, group=parallel_state.get_tensor_model_parallel_group())
    return tensor


def sum_over_ranks(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Sums of tensors [N] over all ranks. Collectives: one all-reduce of all together."""
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return tensors
    return reduce_over_ranks(torch.stack(tensors)).unbind()


def max_over_ranks(values: Tensor, rows: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Maximum of values [N] over all ranks, its (lowest) row [N], and maxima of other tensors [N].

    Collectives: one all-reduce of all maxima together, one of the rows.
    """
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return values, rows, *others
    maxima = reduce_over_ranks(torch.stack([values, *others]), torch.distributed.ReduceOp.MAX).unbind()
    rows = rows.masked_fill(values < maxima[0], torch.iinfo(rows.dtype).max)
    return maxima[0], reduce_over_ranks(rows, torch.distributed.ReduceOp.MIN), *maxima[1:]


def log_sum_over_ranks(log_sum: Tensor, top: Tensor | None = None) -> Tensor:
    """log sum exp over all ranks' rows, from each rank's own [N], finite on one rank at least.

    Collectives: one all-reduce of [N], and a second one without `top`.

    Args:
        log_sum: [N] of this rank.
        top: [N] its maximum over all ranks, where that is known.
    """
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return log_sum
    if top is None:
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
