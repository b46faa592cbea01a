# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""torch_dist checkpoints (megatron-core's format of ``model_weights/`` and of training checkpoints).

megatron-core needs process groups and a built model to read such a directory, and unpickles its metadata, common
state and objects freely. Here they are unpickled with an allow-list of the classes the format consists of, and all
that the metadata says is held against the files before anything is allocated. megatron-core gets what was checked
(:mod:`.handover`), never the directory itself.

Format: ``torch.distributed.checkpoint.metadata`` of torch 2.13 and
``megatron/core/dist_checkpointing/strategies/torch.py`` of megatron-core 0.13.1.
"""

from nemo_ee.checkpoint.torch_dist.checkpoint import TorchDistCheckpoint
from nemo_ee.checkpoint.torch_dist.handover import handed_over
from nemo_ee.checkpoint.torch_dist.join import join

__all__ = ["TorchDistCheckpoint", "handed_over", "join"]
