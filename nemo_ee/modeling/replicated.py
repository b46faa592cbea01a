# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Checkpoint entries of tensors that are whole on every tensor- and data-parallel rank."""

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.utils import make_sharded_tensor_for_checkpoint
from torch import Tensor


def replicated(tensor: Tensor, key: str, offsets: tuple = ()) -> ShardedTensor:
    """The tensor under `key`, written by the first rank only.

    Args:
        tensor: the same on all ranks.
        key: in the checkpoint.
        offsets: of an axis of stacked layers in front, as megatron-core's `sharded_offsets`.
    """
    replica = (
        0,
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
    return make_sharded_tensor_for_checkpoint(tensor, key, prepend_offsets=offsets, replica_id=replica)
