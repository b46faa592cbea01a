# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Between hidden states [S, B, H], sharded over the sequence or not, and rows of tokens [T, H], T = S * B."""

import torch
from megatron.core import parallel_state
from torch import Tensor


def by_position(x: Tensor) -> Tensor:
    """[B, S] -> [S * B], the order of hidden states [S, B, H]."""
    return x.t().reshape(-1)


def whole_tokens(state: Tensor, sequence_parallel: bool) -> Tensor:
    """[S, B, H] -> [S * B, H]; gathered over the tensor-parallel group under sequence parallelism."""
    if sequence_parallel:
        world = parallel_state.get_tensor_model_parallel_world_size()
        whole = state.new_empty((world * state.shape[0], *state.shape[1:]))
        group = parallel_state.get_tensor_model_parallel_group()
        torch.distributed.all_gather_into_tensor(whole, state.contiguous(), group=group)
        state = whole
    return state.reshape(-1, state.shape[-1])


def own_share(gradient: Tensor, like: Tensor, sequence_parallel: bool) -> Tensor:
    """Sums [S * B, H] over the tensor-parallel group and returns this rank's part, shaped `like`."""
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        group = parallel_state.get_tensor_model_parallel_group()
        torch.distributed.all_reduce(gradient, group=group)
        if sequence_parallel:
            rank = parallel_state.get_tensor_model_parallel_rank()
            gradient = gradient.view(-1, *like.shape)[rank]
    return gradient.view(like.shape)
